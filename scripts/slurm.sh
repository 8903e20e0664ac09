#!/usr/bin/env bash
# Trains under Slurm: one process per node with all of its GPUs. Coordinator and ranks are detected automatically.
#
#   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm.sh configs/flacuna_13b.yaml --mesh='{replica: 2, fsdp: 8}'
#
# Arguments after the config are passed to the trainer. sbatch's options go before the script and override those below.
# FLACUNA_PYTHON is the interpreter (default: python, in the environment of the sbatch call).
#
# The job requeues itself, and then continues from its newest checkpoint, at the end of its time limit, after a
# preemption, and when a node or a process fails, at most MAX_RESTARTS (50) times. It does not requeue itself if the
# input is wrong (status 2). `scancel` ends it permanently.
#
#SBATCH --job-name=flacuna
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Five minutes before the end, the trainer receives SIGTERM and saves.
#SBATCH --signal=TERM@300
set -uo pipefail

if (($# == 0)); then
    echo "usage: sbatch [options] scripts/slurm.sh CONFIG [--a.b=value ...]" >&2
    exit 2
fi

srun --kill-on-bad-exit=1 "${FLACUNA_PYTHON:-python}" -m flacuna_jax.train --config "$@"
status=$?

if [[ $status == 0 || $status == 2 ]]; then
    exit "$status"
fi
if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_RESTARTS:-50})); then
    echo "slurm.sh: status $status after ${SLURM_RESTART_COUNT:-0} restarts; not queued again" >&2
    exit "$status"
fi
echo "slurm.sh: status $status; back into the queue" >&2
scontrol requeue "$SLURM_JOB_ID" || exit "$status"
