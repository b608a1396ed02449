#!/usr/bin/env bash
# Run golden: 1 node with 8 ranks each, on a Ray cluster.
# Ray ships this folder to the nodes; the driver starts on the cluster and waits there for its nodes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export RAY_API_SERVER_ADDRESS=http://head:8265
# HF_TOKEN: read from the environment here, passed on through a pipe, in none of our files.
exec ray job submit --no-wait \
  --submission-id "${1:-golden-$(date +%s)}" \
  --runtime-env <(python -m launcher.jobs.targets.ray runtime_env.json HF_TOKEN) \
  -- python -m launcher.jobs.ray_driver /shared/runs/golden --recipe recipe.yaml
