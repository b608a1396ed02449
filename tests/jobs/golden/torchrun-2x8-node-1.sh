#!/usr/bin/env bash
# Run big: node 1 of 2, 8 ranks started by torchrun.
set -eo pipefail
module load cuda/13
source /opt/venv/bin/activate
set -u  # behind set-up lines, which may read what is not set
: "${WANDB_API_KEY:?cluster.env names it, but cluster.setup has run and left it unset}"
: "${HF_TOKEN:?cluster.env names it, but cluster.setup has run and left it unset}"
: "${LAUNCHER_RENDEZVOUS:?set it to HOST:PORT of node 0}"
export MESSAGE='it'"'"'s'
export NCCL_DEBUG=WARN
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(nproc) > 8 ? $(nproc) / 8 : 1 ))}"
exec torchrun --nnodes=2 \
  --nproc-per-node=8 \
  --max-restarts=0 \
  --rdzv-backend=c10d \
  --rdzv-endpoint="$LAUNCHER_RENDEZVOUS" \
  --rdzv-id=big \
  --rdzv-conf=is_host=0,join_timeout=3600,read_timeout=3600 \
  -m launcher.trainer /shared/runs/big
