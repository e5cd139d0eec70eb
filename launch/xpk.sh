#!/usr/bin/env bash
# A training on TPU slices of a GKE cluster, as a workload of xpk (github.com/AI-Hypercomputer/xpk).
#
#   export CLUSTER=pods ZONE=us-central1-a PROJECT=lab TPU=v5litepod-16 SLICES=2
#   launch/xpk.sh moe-a --config=configs/quickstart.py --workdir=/mnt/shared/runs/a
#
# This checkout is put into a container of BASE_IMAGE and installed there. The work directory lies on a volume that all pods
# mount. Kubernetes starts all pods again after one has failed, so that no supervisor is needed. Further arguments for xpk
# go into XPK_ARGS, as in XPK_ARGS="--spot --max-restarts=10". DRY_RUN=1 prints the command instead.
set -euo pipefail

name=${1:?usage: launch/xpk.sh NAME --config=... --workdir=...}
shift
: "${CLUSTER:?name the cluster, as in CLUSTER=pods}" "${ZONE:?name the zone, as in ZONE=us-central1-a}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
printf -v arguments '%q ' "$@"
read -ra more <<<"${XPK_ARGS:---max-restarts=10}"
command=(xpk workload create "--workload=$name" "--cluster=$CLUSTER" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}
  "--tpu-type=${TPU:-v5litepod-16}" "--num-slices=${SLICES:-1}"
  "--base-docker-image=${BASE_IMAGE:-python:3.11}" --script-dir=. "${more[@]}"
  "--command=pip install -e '.[tpu]' && python experiments/train.py --cluster=tpu $arguments")

if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
