#!/usr/bin/env bash
# Run golden: 8 ranks started by torchrun.
set -eo pipefail
source /shared/venv/bin/activate
set -u  # behind set-up lines, which may read what is not set
: "${HF_TOKEN:?cluster.env names it, but cluster.setup has run and left it unset}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(nproc) > 8 ? $(nproc) / 8 : 1 ))}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LAUNCHER_TARGET=torchrun
export LAUNCHER_JOB_ID="${LAUNCHER_JOB_ID:-$(date +%Y%m%d-%H%M%S)-$$}"
# A signal asks for a checkpoint and the end.
worker='' stopped=''
trap 'stopped=yes; [[ -z $worker ]] || kill -TERM "$worker" 2>/dev/null || true' TERM INT HUP USR1
# The worker holds the run's lease, prepares the data, has the ranks started by the command behind --, and
# says how they ended; 75 is: start me again. That is done here after a failure that may pass,
# and left to a person after a stop.
for (( restart = 0; ; restart++ )); do
  [[ -z $stopped ]] || exit 75
  export LAUNCHER_JOB_RESTART=$restart
  launcher worker /shared/runs/golden --recipe "$here/recipe.yaml" -- \
    torchrun --standalone \
    --nproc-per-node=8 \
    --max-restarts=0 \
    -m launcher.trainer /shared/runs/golden &
  worker=$!
  while kill -0 "$worker" 2>/dev/null; do wait "$worker" || true; done  # a signal interrupts `wait`
  code=0; wait "$worker" || code=$?
  [[ $code == 75 && -z $stopped ]] || exit "$code"
  if grep -q '"status": "preempted"' /shared/runs/golden/state.json; then exit "$code"; fi
done
