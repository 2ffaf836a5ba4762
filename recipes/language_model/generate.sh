#!/usr/bin/env bash
# What BLOOM, Falcon, MPT and T5 write, beside the host in fp32. A GPU; --layers 4 makes it short.
set -euo pipefail
exec flashbias language-model generate "$@"
