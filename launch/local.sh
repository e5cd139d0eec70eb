#!/usr/bin/env bash
# Several processes of one training on this machine, to try out what will run on several.
#
#   launch/local.sh 2 --config=configs/quickstart.py --workdir=runs/two --devices=4
#
# starts two processes with four virtual CPU devices each; Ctrl-C stops all of them at one step, after saving.
# DRY_RUN=1 prints the commands instead. PORT and PYTHON may be set.
set -euo pipefail

count=${1:?usage: launch/local.sh PROCESSES --config=... --workdir=...}
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command=("${PYTHON:-.venv/bin/python}" experiments/train.py "$@" "--coordinator=localhost:${PORT:-29500}" "--processes=$count")

pids=()
for ((i = 0; i < count; i++)); do
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}" "--process=$i"
    echo
  else
    "${command[@]}" "--process=$i" &
    pids+=($!)
  fi
done
[[ -n ${DRY_RUN:-} ]] && exit 0

# One signal is enough: the processes agree on the step at which all of them stop.
trap 'kill -TERM "${pids[0]}" 2>/dev/null || true' INT TERM
status=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do # the trap has ended the wait, and not the process
    code=0
    wait "$pid" || code=$?
  done
  ((code > status)) && status=$code
done
exit "$status"
