#!/usr/bin/env bash
# In the bundle: every GPU test, then the bandwidth bench. Fails where there is no GPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
log=$(mktemp)
trap 'rm -f "$log"' EXIT
WALSH_SYNC_LAUNCHES=1 "$here/bin/gpu_test" | tee "$log"
# A skipped test here would be a test that nobody ran.
if grep -q '^\[  SKIPPED \]' "$log"; then
  echo "run-gpu-tests: tests were skipped" >&2
  exit 1
fi
"$here/bin/block_walsh_cuda_bench"
if [[ -x $here/bin/walsh ]]; then "$here/bin/walsh" doctor; fi
