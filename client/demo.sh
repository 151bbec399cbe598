#!/usr/bin/env bash
# ./run demo: quantizes SmolLM2-135M-Instruct to 4 and to 2 bits with GSR and GPTQ, prints what that
# cost, and streams an answer from each. Everything goes through the real service and client.
#
# Environment: WALSH_BIN_DIR    folder of walsh, walsh-coordinator, walsh-worker
#              WALSH_SMOLLM2    the GGUF file; default: where `./run fetch-model` puts it
#              WALSH_CACHE_DIR  where the demo's data folder lives
# Every other WALSH_ variable is ignored: it would point at another service or change what is printed.
set -euo pipefail

for variable in "${!WALSH_@}"; do
  case $variable in
    WALSH_BIN_DIR | WALSH_SMOLLM2 | WALSH_CACHE_DIR) ;;
    *) unset "$variable" ;;
  esac
done

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${WALSH_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/walsh}
model=${WALSH_SMOLLM2:-$cache/models/SmolLM2-135M-Instruct.Q4_1.gguf}
: "${WALSH_BIN_DIR:?is not set; use ./run demo}"
walsh=$WALSH_BIN_DIR/walsh
data=$cache/demo
question="What is the capital of France, and what is it known for?"
# Chosen so that both jobs take a few minutes on two cores; docs/quality.md has the long runs.
calibration=(--calibration self --num-samples 32 --seq-len 512)
evaluation=(--eval-text "$here/demo-data/evaluation.txt" --eval-windows 4)

say() { printf '\n== %s\n' "$*"; }
die() {
  printf 'demo: %s\n' "$*" >&2
  exit 1
}
[[ -x $walsh ]] || die "there is no $walsh; use ./run demo"
[[ -f $model ]] || die "there is no $model; use ./run fetch-model"

# Stops what the demo started, on success, failure and Ctrl-C alike. `walsh up` stops its daemons.
up_pid=
stop() {
  local code=$?
  trap - EXIT
  trap '' INT TERM HUP # stopping takes a moment; nothing may cut it short
  if [[ -n $up_pid ]] && kill -0 "$up_pid" 2> /dev/null; then
    say "stopping the service"
    ((code == 0)) || printf 'a job that is not finished goes on when the service is started again\n'
    kill -TERM "$up_pid"
    wait "$up_pid" || true
  fi
  exit "$code"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

say "starting walsh up"
mkdir -p "$data"
# A banner from an earlier run must not pass for this one's.
rm -f "$data/up.txt"
# In a session of its own: Ctrl-C reaches this script, which stops it in order.
setsid "$walsh" --data-dir "$data" up --port 0 \
  --model-root "$(dirname "$model")" --model-root "$here/demo-data" > "$data/up.txt" &
up_pid=$!
until [[ -s $data/up.txt ]]; do
  kill -0 "$up_pid" 2> /dev/null || die "walsh up ended; its logs are in $data/log"
  sleep 0.2
done
cat "$data/up.txt"
# Everything below is for the service that this script has started, wherever another one runs.
WALSH_SERVER=$(awk '$1 == "gRPC" {print $2}' "$data/up.txt")
[[ -n $WALSH_SERVER ]] || die "walsh up did not say where it listens"
export WALSH_SERVER

# What an earlier run made. A job that is not finished is cancelled first.
for bits in 4 2; do
  name=smollm2-${bits}bit
  "$walsh" jobs list --filter "model_name=$name" --limit 1000 2> /dev/null |
    awk 'NR > 1 {print $1, $2}' | while read -r id state; do
    case $state in
      SUCCEEDED | FAILED | CANCELLED) ;;
      *)
        "$walsh" jobs cancel "$id" > /dev/null
        "$walsh" jobs watch "$id" > /dev/null 2>&1 || true
        ;;
    esac
    "$walsh" jobs delete "$id"
  done
  if "$walsh" models get "$name" > /dev/null 2>&1; then
    "$walsh" models delete "$name" --force
  fi
done

for bits in 4 2; do
  say "SmolLM2-135M-Instruct to $bits bits: GSR rotation, GPTQ, calibrated on text that it writes itself"
  "$walsh" quantize "$model" --name "smollm2-${bits}bit" --bits "$bits" --rotation gsr --method gptq \
    "${calibration[@]}" "${evaluation[@]}" --load < /dev/null # Ctrl-C ends the demo without a question
done

for bits in 4 2; do
  say "asking smollm2-${bits}bit: $question"
  "$walsh" chat "smollm2-${bits}bit" --message "$question" --max-tokens 96 --temperature 0 --stats
done

say "the models"
"$walsh" models list
printf '\nThe data folder is %s; start it again with\n  %s --data-dir %s up\n' "$data" "$walsh" "$data"
