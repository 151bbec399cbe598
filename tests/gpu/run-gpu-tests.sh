#!/usr/bin/env bash
# In the bundle: every GPU test, then the benches. Fails where there is no GPU or a test is skipped.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# The worker finds a toolkit by itself (worker/kernels/cuda/libraries.h), but not the nvidia-* Python
# packages: their folders are appended to what the environment names.
python_folders() {
  python3 -c 'import glob, nvidia
for path in nvidia.__path__:
    for folder in sorted(glob.glob(path + "/*/lib")):
        print(folder)' 2> /dev/null || true
}
packages=$(python_folders | paste -sd:)
export WALSH_CUDA_LIBRARY_PATH=${WALSH_CUDA_LIBRARY_PATH:-}${packages:+:$packages}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for test in "$here"/bin/*gpu_test; do
  if [[ $test == */smollm2_gpu_test && (-z ${WALSH_SMOLLM2:-} || -z ${WALSH_TEST_DATA:-}) ]]; then
    echo "smollm2_gpu_test is left out: WALSH_SMOLLM2 (the GGUF file) and WALSH_TEST_DATA are not set"
    continue
  fi
  WALSH_SYNC_LAUNCHES=1 "$test" | tee "$log"
  # A skipped test here would be a test that nobody ran.
  if grep -q '^\[  SKIPPED \]' "$log"; then
    echo "run-gpu-tests: $(basename "$test") skipped tests" >&2
    exit 1
  fi
done
"$here/bin/block_walsh_cuda_bench"
"$here/bin/walsh" doctor
