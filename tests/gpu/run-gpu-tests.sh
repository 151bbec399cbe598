#!/usr/bin/env bash
# run-gpu-tests.sh [--sanitize | --bench]
#
# In the bundle: every GPU test, or each of them under compute-sanitizer's memcheck and racecheck, or the
# benches of the kernels. Fails where a test is skipped; says why and succeeds where there is no GPU.
#
# SmolLM2 on the GPU beside the CPU needs WALSH_SMOLLM2, the GGUF file; texts come with the bundle.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
what=${1:-}
[[ -z $what || $what == --sanitize || $what == --bench ]] || {
  sed -n '2,7p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

if ! nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null; then
  echo "skipped: there is no GPU (nvidia-smi finds none)"
  exit 0
fi

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
export WALSH_TEST_DATA=${WALSH_TEST_DATA:-$here/data} WALSH_SOURCE_DIR=$here  # for tests/golden

log=$(mktemp)
trap 'rm -f "$log"' EXIT
run() {
  echo "== $*"
  "$@" 2>&1 | tee "$log"
  # A skipped test here would be a test that nobody ran.
  if grep -q '^\[  SKIPPED \]' "$log"; then
    echo "run-gpu-tests: $* skipped tests" >&2
    exit 1
  fi
}

# Without factorizations of thousands of columns, which take minutes each and have no other kernels of ours
# than the smaller ones. Hazards inside cuBLAS' kernels, which share no memory with ours, are not counted.
racecheck() {
  local test=$1 n_parts=12 part parts=() logs failed=
  logs=$(mktemp -d)
  echo "== racecheck of $test, in $n_parts processes"
  for ((part = 0; part < n_parts; ++part)); do
    GTEST_TOTAL_SHARDS=$n_parts GTEST_SHARD_INDEX=$part compute-sanitizer --tool racecheck \
      "$test" --gtest_filter='-*Large*' > "$logs/$part" 2>&1 &
    parts+=($!)
  done
  for part in "${parts[@]}"; do wait "$part" || failed=1; done
  cat "$logs"/*
  grep -hE '(Read|Write) access at ' "$logs"/* | grep -v 'access at nvjet_' && failed=1
  grep -q '^\[  SKIPPED \]' "$logs"/* && failed=1
  grep -q 'RACECHECK SUMMARY' "$logs/0" || failed=1
  rm -r "$logs"
  [[ -z $failed ]] || {
    echo "run-gpu-tests: racecheck of $test failed" >&2
    exit 1
  }
}

if [[ $what == --bench ]]; then
  run "$here/bin/block_walsh_cuda_bench"
  run "$here/bin/cuda_quantize_bench"
  run "$here/bin/cuda_low_bit_bench"
  exit
fi
for test in "$here"/bin/*gpu_test; do
  if [[ $what == --sanitize ]]; then
    [[ $test == */smollm2_gpu_test ]] && continue  # the same kernels, for hours
    # Errors of the API are part of what is tested.
    run compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 "$test"
    # A job launches the kernels of the other tests many times, and the libraries' between them, which
    # take minutes each under racecheck.
    [[ $test == */job_gpu_test ]] || racecheck "$test"
    continue
  fi
  if [[ $test == */smollm2_gpu_test && -z ${WALSH_SMOLLM2:-} ]]; then
    echo "smollm2_gpu_test is left out: WALSH_SMOLLM2 (the GGUF file) is not set"
    continue
  fi
  WALSH_SYNC_LAUNCHES=1 run "$test"
done
[[ $what == --sanitize ]] || "$here/bin/walsh" doctor
