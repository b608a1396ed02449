#!/usr/bin/env bash
# Run big: node 1 of 2, 8 ranks started by accelerate.
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
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here"  # accelerate looks for the files that its configuration names where it is started
exec accelerate launch \
  --config_file accelerate.yaml \
  --machine_rank 1 \
  --main_process_ip "${LAUNCHER_RENDEZVOUS%:*}" \
  --main_process_port "${LAUNCHER_RENDEZVOUS##*:}" \
  --rdzv_backend c10d \
  --rdzv_conf is_host=0,join_timeout=3600,read_timeout=3600 \
  -m launcher.trainer /shared/runs/big
