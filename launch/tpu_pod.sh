#!/usr/bin/env bash
# A training on the hosts of a Cloud TPU slice, requested as a queued resource.
#
#   export NAME=moe ZONE=us-central1-a ACCELERATOR=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite
#   launch/tpu_pod.sh create [--spot]          request the slice
#   launch/tpu_pod.sh status                   until it says ACTIVE
#   launch/tpu_pod.sh setup                    copy this checkout to every host and install it
#   launch/tpu_pod.sh train --config=configs/quickstart.py --workdir=/mnt/shared/runs/a
#   launch/tpu_pod.sh stop                     all hosts save at one step and end
#   launch/tpu_pod.sh delete
#
# The work directory lies on a file system that all hosts mount (Filestore, or a bucket by gcsfuse): MOUNT, if it is set,
# is a command that setup runs on every host. DRY_RUN=1 prints the commands instead. PROJECT may be set.
set -euo pipefail

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
action=${1:-}
[[ -n $action ]] && shift || usage
: "${NAME:?name the slice, as in NAME=moe}" "${ZONE:?name the zone, as in ZONE=us-central1-a}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
where=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})

run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

everywhere() { run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all "--command=$1"; }

case $action in
  create)
    run gcloud compute tpus queued-resources create "$NAME" "--node-id=$NAME" "${where[@]}" \
      "--accelerator-type=${ACCELERATOR:?as in ACCELERATOR=v5litepod-16}" \
      "--runtime-version=${RUNTIME:?as in RUNTIME=v2-alpha-tpuv5-lite}" "$@"
    ;;
  status) run gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" '--format=value(state.state)' ;;
  setup)
    run git archive --format=tar.gz --prefix=sparse_lm/ --output=sparse_lm.tar.gz HEAD
    run gcloud compute tpus tpu-vm scp sparse_lm.tar.gz "$NAME:" "${where[@]}" --worker=all
    everywhere "${MOUNT:+$MOUNT && }tar xzf sparse_lm.tar.gz && cd sparse_lm && python3 -m venv .venv && .venv/bin/pip install -e '.[tpu]'"
    ;;
  train)
    (($#)) || usage
    printf -v arguments '%q ' "$@"
    everywhere "cd sparse_lm && .venv/bin/python experiments/train.py --cluster=tpu --supervise $arguments"
    ;;
  stop) everywhere "pkill -TERM -f '^[^ ]*python[^ ]* experiments/train.py .*--supervise'" ;;
  delete) run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force "$@" ;;
  *) usage ;;
esac
