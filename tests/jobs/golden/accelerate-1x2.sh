#!/usr/bin/env bash
# Run tiny: 2 ranks started by accelerate.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(nproc) > 2 ? $(nproc) / 2 : 1 ))}"
# Node 0's first act: the run directory and the data.
python -m launcher.jobs.begin "$here/recipe.yaml"
cd "$here"  # accelerate looks for the files that its configuration names where it is started
exec accelerate launch \
  --config_file accelerate.yaml \
  -m launcher.trainer '/runs/with space/tiny'
