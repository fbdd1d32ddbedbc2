#!/usr/bin/env bash
# A launch file, written by: flmjax launch xpk --config=configs/flm_101b.py:tpu_v5p '--config.mesh.topology=v5p:4x8x8*2' '--config.stages[0].mesh.replica=2' '--config.stages[1].mesh.replica=2' '--config.stages[2].mesh.replica=2' --workdir=gs://bucket/runs/flm_101b --site=./site.toml
# 2 slices of 256 v5p chips; hosts of a slice: 64 (mesh.topology=v5p:4x8x8*2).
# Every pod finds the others by the variables that GKE sets for TPUs. xpk restarts the run --max-restarts times in all,
# and counts crashes, saved runs and preemptions alike; exit status 2 (the command or the config is wrong) ends the run.
set -euo pipefail

pod_command() {
  cat << 'FLMJAX_END'
module load cuda
export PYTHONUNBUFFERED=1
exec flmjax train --config=configs/flm_101b.py:tpu_v5p '--config.mesh.topology=v5p:4x8x8*2' '--config.stages[0].mesh.replica=2' '--config.stages[1].mesh.replica=2' '--config.stages[2].mesh.replica=2' --workdir=gs://bucket/runs/flm_101b
FLMJAX_END
}

exec xpk workload create \
  --workload=flm-101b \
  --cluster=cluster \
  --project=project \
  --zone=us-central2-b \
  --tpu-type=v5p-4x8x8 \
  --num-slices=2 \
  --docker-image=europe-docker.pkg.dev/project/flmjax:1 \
  --max-restarts=100 \
  --restart-on-exit-codes=1,3-126 \
  --termination-grace-period-seconds=300 \
  --env=NCCL_IB_HCA=mlx5_0,mlx5_1 \
  --priority=high \
  --command="eval \"\$(base64 -d <<< $(pod_command | base64 -w 0))\"" # xpk's own YAML takes one line only
