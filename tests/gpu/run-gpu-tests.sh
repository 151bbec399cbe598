#!/usr/bin/env bash
# In the bundle: every GPU test, then the benches. Fails where there is no GPU or a test is skipped.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Folders that hold CUDA's libraries: a toolkit, or the nvidia-* Python packages.
cuda_folders() {
  local folder
  for folder in "${CUDA_HOME:-/usr/local/cuda}/lib64" /usr/local/cuda*/lib64; do
    if compgen -G "$folder/libcublas.so.*" > /dev/null; then printf '%s\n' "$folder"; fi
  done
  python3 -c 'import glob, nvidia
for path in nvidia.__path__:
    for folder in sorted(glob.glob(path + "/*/lib")):
        print(folder)' 2> /dev/null || true
}

missing=$(ldd "$here"/bin/* 2> /dev/null | awk '/not found/ {print $1}' | sort -u)
if [[ -n $missing ]]; then
  LD_LIBRARY_PATH=$(cuda_folders | paste -sd:)${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  export LD_LIBRARY_PATH
  echo "CUDA libraries from: $LD_LIBRARY_PATH"
  missing=$(ldd "$here"/bin/* 2> /dev/null | awk '/not found/ {print $1}' | sort -u)
  if [[ -n $missing ]]; then
    echo "run-gpu-tests: not on this machine: ${missing//$'\n'/, }" >&2
    exit 1
  fi
fi

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for test in "$here"/bin/*gpu_test; do
  WALSH_SYNC_LAUNCHES=1 "$test" | tee "$log"
  # A skipped test here would be a test that nobody ran.
  if grep -q '^\[  SKIPPED \]' "$log"; then
    echo "run-gpu-tests: $(basename "$test") skipped tests" >&2
    exit 1
  fi
done
"$here/bin/block_walsh_cuda_bench"
"$here/bin/walsh" doctor
