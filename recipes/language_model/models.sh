#!/usr/bin/env bash
# BLOOM, Falcon and MPT of transformers, stock and patched. An H200, about 4 minutes; --model bloom-560m for one of them.
set -euo pipefail
exec flashbias language-model models "$@"
