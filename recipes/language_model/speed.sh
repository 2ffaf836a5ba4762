#!/usr/bin/env bash
# GPT-2-sized attention with ALiBi over the length. An H200, about 4 minutes; --flashbias-repo PATH adds the paper's code.
set -euo pipefail
exec flashbias language-model speed "$@"
