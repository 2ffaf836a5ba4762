#!/usr/bin/env bash
# A small GPT, trained by torch's attention and by ours. An H200, about 2 minutes; 2 CPU cores at small size, half a minute.
set -euo pipefail
exec flashbias language-model accuracy "$@"
