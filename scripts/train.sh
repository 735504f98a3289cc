#!/usr/bin/env bash
# Train on every device of one or several machines: scripts/train.sh CONFIG.yaml [options of vidlada train]
#
# Several machines: run it on each with NNODES (how many), RANK (which this is, from 0), MASTER_ADDR and MASTER_PORT
# (of machine 0). NPROC_PER_NODE overrides the number of devices; without GPUs it is one process.
# Passes per step follow from the config's batch_size and per_device_batch, whatever the number of devices.
# The configs read LLM_VERSION, VISION_MODEL_VERSION, VIDEO_FOLDER, DATA and OUTPUT; VISION_TOWER_CACHE_DIR is searched
# for towers.
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: scripts/train.sh CONFIG.yaml [options of vidlada train]" >&2
    exit 2
fi
python=${PYTHON:-python}
devices=${NPROC_PER_NODE:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
node=${RANK:-0}
unset RANK  # torchrun gives every process its own
# seconds that torchrun gives processes to save after SIGTERM, before it kills them; it would be 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}

exec "$python" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node-rank "$node" --nproc-per-node "$devices" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    -m vidlada train "$@"
