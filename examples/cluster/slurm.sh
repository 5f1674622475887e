#!/usr/bin/env bash
# Score a corpus on all nodes of a SLURM allocation:
#
#     sbatch slurm.sh /shared/shards /shared/run /shared/out
#
# Shards, RUN and OUT lie where every node sees them. When the time is up, or too much was lost, submit the same again:
# it goes on with the shards that are left.
#SBATCH --job-name=noisyclean
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=128
#SBATCH --exclusive
#SBATCH --time=12:00:00
set -euo pipefail
shards=$1 run=$2 out=$3

export RAY_USAGE_STATS_ENABLED=0
export RAY_worker_niceness=0 # the model's process is not to give way to those that decode
# Whoever reaches a cluster without a token can run code on it. All nodes get this one from the environment.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

port=$((20000 + SLURM_JOB_ID % 10000)) # another job may have a node of this one
resources=(--num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$SLURM_GPUS_ON_NODE")
trap 'ray stop' EXIT
ray start --head --port "$port" --include-dashboard false "${resources[@]}"
if ((SLURM_NNODES > 1)); then
    others=$((SLURM_NNODES - 1))
    srun --nodes "$others" --ntasks "$others" --exclude "$SLURMD_NODENAME" \
        ray start --address "$(hostname -f):$port" --block "${resources[@]}" &
fi

# Models are put on the nodes that are there when the command starts. A node that is not there in five minutes never is.
python - "$SLURM_NNODES" <<'END'
import sys
import time

import ray

ray.init("auto", log_to_driver=False)
wanted, deadline = int(sys.argv[1]), time.monotonic() + 300
while (there := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"only {there} of {wanted} nodes have joined the Ray cluster")
    time.sleep(2)
END

noisyclean score "$shards" -m "$run" -o "$out" --engine ray --address auto
