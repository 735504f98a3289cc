#!/usr/bin/env bash
# Train on every device of one or several machines: scripts/train.sh [DEVICES] CONFIG [options of vidlada train]
#
# DEVICES (a number) is the published habit: how many devices of this machine, as NPROC_PER_NODE. A number without a
# CONFIG trains the published recipe.
# Several machines: run it on each with NNODES (how many), RANK (which this is, from 0), MASTER_ADDR and MASTER_PORT
# (of machine 0). NPROC_PER_NODE overrides the number of devices; without GPUs it is one process.
# Passes per step follow from the config's batch_size and per_device_batch, whatever the number of devices.
# The configs read LLM_VERSION, VISION_MODEL_VERSION, VIDEO_FOLDER, DATA and OUTPUT; VISION_TOWER_CACHE_DIR is searched
# for towers.
set -euo pipefail

if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    NPROC_PER_NODE=$1
    shift
    [[ $# -ge 1 && $1 != -* ]] || set -- vidlada-8b-llava-video-178k "$@"
fi
if [[ $# -lt 1 ]]; then
    echo "usage: scripts/train.sh [DEVICES] CONFIG [options of vidlada train]" >&2
    exit 2
fi
python=${PYTHON:-python}
nodes=${NNODES:-1} node=${RANK:-0} port=${MASTER_PORT:-29500}

refuse() {
    echo "error: $1" >&2
    exit 2
}
within() { # name, value, lowest, highest
    [[ $2 =~ ^[0-9]{1,5}$ ]] && ((10#$2 >= $3 && 10#$2 <= $4)) || refuse "$1=$2 is not a whole number from $3 to $4"
}
within NNODES "$nodes" 1 99999
within NPROC_PER_NODE "${NPROC_PER_NODE:-1}" 1 99999
within RANK "$node" 0 $((10#$nodes - 1))
within MASTER_PORT "$port" 1 65535
[[ $nodes == 1 || -n ${MASTER_ADDR:-} ]] || refuse "NNODES=$nodes needs MASTER_ADDR, where all reach machine 0"
echo "checking $1" >&2  # before what takes its time
devices=${NPROC_PER_NODE:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

unset RANK  # torchrun gives every process its own
if [[ $nodes == 1 && $devices == 1 ]]; then
    exec "$python" -m vidlada train "$@"
fi
"$python" -m vidlada train "$@" --dry-run >/dev/null  # a mistake is reported once, not by every process

# seconds that torchrun gives processes to save after SIGTERM, before it kills them; it would be 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}
exec "$python" -m vidlada.training.launch \
    --nnodes "$nodes" --node-rank "$node" --nproc-per-node "$devices" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$port" \
    -m vidlada train "$@"
