#!/usr/bin/env bash
# whole_job.sh BIN MODEL DEVICE JSON [walsh quantize's flags]: one job through the real service, timed from the
# command to its end; prints the client's report and the seconds, and writes the job to the file JSON.
#
# BIN has walsh, walsh-coordinator and walsh-worker; MODEL is a folder with calibration.txt beside the weights
# (random_checkpoint.py). The data folder is a temporary one beside MODEL, on the same disk, and is removed.
set -euo pipefail
bin=$1 model=$2 device=$3 json=$4
shift 4
data=$(mktemp -d "$(dirname "$model")/whole-job-XXXXXX")
up_pid=
stop() {
  if [[ -n $up_pid ]]; then
    kill -TERM "$up_pid" 2> /dev/null || true
    wait "$up_pid" || true
  fi
  rm -rf "$data"
}
trap stop EXIT
"$bin/walsh" --data-dir "$data" up --port 0 --device "$device" --model-root "$(dirname "$model")" > "$data/up.txt" &
up_pid=$!
until [[ -s $data/up.txt ]]; do
  kill -0 "$up_pid" 2> /dev/null || {
    cat "$data"/log/* >&2
    exit 1
  }
  sleep 0.1
done
WALSH_SERVER=$(awk '$1 == "gRPC" {print $2}' "$data/up.txt")
export WALSH_SERVER
"$bin/walsh" workers list
begin=$(date +%s.%N)
"$bin/walsh" quantize "$model" --name whole-job --calibration "$model/calibration.txt" --no-load "$@" < /dev/null ||
  tail -n 30 "$data"/log/*
printf 'wall seconds from the command to its end: %.1f\n' "$(awk -v a="$begin" -v b="$(date +%s.%N)" 'BEGIN {print b - a}')"
job=$("$bin/walsh" --output json jobs list | python3 -c 'import json, sys; print(json.load(sys.stdin)["quantization_jobs"][0]["name"].split("/")[-1])')
"$bin/walsh" --output json jobs get "$job" > "$json"
