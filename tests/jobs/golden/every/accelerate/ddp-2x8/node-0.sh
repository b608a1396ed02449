#!/usr/bin/env bash
# Run golden: node 0 of 2, 8 ranks started by accelerate.
set -eo pipefail
source /shared/venv/bin/activate
set -u  # behind set-up lines, which may read what is not set
: "${HF_TOKEN:?cluster.env names it, but cluster.setup has run and left it unset}"
: "${LAUNCHER_RENDEZVOUS:?set it to HOST:PORT of node 0}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(nproc) > 8 ? $(nproc) / 8 : 1 ))}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Node 0's first act: the run directory and the data, once the port is free.
python -m launcher.jobs.begin "$here/recipe.yaml" "$LAUNCHER_RENDEZVOUS"
( for ((s = 0; s < 3300; s++)); do sleep 1; kill -0 $$ 2>/dev/null || exit; done; echo 'time limit' > /shared/runs/golden/control/stop-request ) &
cd "$here"  # accelerate looks for the files that its configuration names where it is started
exec accelerate launch \
  --config_file accelerate.yaml \
  --machine_rank 0 \
  --main_process_ip "${LAUNCHER_RENDEZVOUS%:*}" \
  --main_process_port "${LAUNCHER_RENDEZVOUS##*:}" \
  --rdzv_backend c10d \
  --rdzv_conf is_host=1,join_timeout=3600,read_timeout=3600 \
  -m launcher.trainer /shared/runs/golden
