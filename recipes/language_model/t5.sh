#!/usr/bin/env bash
# A T5-large-sized encoder in training at 4,096 tokens, stock and patched. An H200, about 1 minute.
set -euo pipefail
exec flashbias language-model t5 "$@"
