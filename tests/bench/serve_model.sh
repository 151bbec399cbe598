#!/usr/bin/env bash
# serve_model.sh BIN MODEL DEVICE OUT BITS [STREAMS …]: what a model of BITS bits serves through the real service.
#
# BIN has walsh, walsh-coordinator and walsh-worker; MODEL is a folder with calibration.txt beside the weights
# (random_checkpoint.py). The model is rounded to nearest in groups of 128, served from a fresh start (its artifact in
# the page cache) and measured by `walsh bench`: prompts of 32 tokens with 256 new ones by one stream, then prompts of
# 512 with 256 at each number of STREAMS. OUT gets the JSON of each, engine.md from cuda_engine_bench where BIN has it, and load.txt: the seconds from the start of the
# processes until the model is ready. The worker's flags come by their environment twins, such as WALSH_MAX_NUM_SEQS. The
# data folder is a temporary one beside MODEL and is removed.
set -euo pipefail
bin=$1 model=$2 device=$3 out=$4 bits=$5
shift 5
mkdir -p "$out"
data=$(mktemp -d "$(dirname "$model")/serve-model-XXXXXX")
up_pid=
stop_up() {
  if [[ -n $up_pid ]]; then
    kill -TERM "$up_pid" 2> /dev/null || true
    wait "$up_pid" || true
    up_pid=
  fi
}
stop() {
  stop_up
  cp -r "$data/log" "$out/" 2> /dev/null || true
  rm -rf "$data"
}
trap stop EXIT
start_up() {
  rm -f "$data/up.txt"
  "$bin/walsh" --data-dir "$data" up --port 0 --device "$device" --model-root "$(dirname "$model")" \
    > "$data/up.txt" &
  up_pid=$!
  until [[ -s $data/up.txt ]]; do
    kill -0 "$up_pid" 2> /dev/null || {
      cat "$data"/log/* >&2
      exit 1
    }
    sleep 0.02
  done
  WALSH_SERVER=$(awk '$1 == "gRPC" {print $2}' "$data/up.txt")
  export WALSH_SERVER
}
start_up
"$bin/walsh" quantize "$model" --name served --calibration "$model/calibration.txt" --method rtn --rotation none \
  --bits "$bits" --group-size 128 --no-eval --no-load < /dev/null
stop_up
if [[ -x $bin/cuda_engine_bench && $device == cuda* ]]; then
  "$bin/cuda_engine_bench" "$data/models/served" --streams=64 > "$out/engine.md"
fi

begin=$(date +%s.%N)
start_up
"$bin/walsh" models load served
awk -v a="$begin" -v b="$(date +%s.%N)" 'BEGIN {printf "seconds from the start of the processes until the model is ready: %.2f\n", b - a}' |
  tee "$out/load.txt"
"$bin/walsh" bench served --prompt-tokens 32 --output-tokens 256 --requests 8 --warmup 2 --output json \
  > "$out/streams-1-prompt-32.json"
for streams in "$@"; do
  requests=$((streams == 1 ? 4 : streams * 2))
  "$bin/walsh" bench served --concurrency "$streams" --prompt-tokens 512 --output-tokens 256 \
    --requests "$requests" --warmup 1 --output json > "$out/streams-$streams-prompt-512.json"
done
"$bin/walsh" models unload served
