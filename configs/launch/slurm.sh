#!/usr/bin/env bash
# Any `longrope` command as a Slurm job, submitted from the folder that holds configs/:
#
#   sbatch --nodes=4 configs/launch/slurm.sh run RECIPE --out /shared/runs/mine
#
# Every node runs torchrun.sh, which starts a process per GPU and starts it again when one dies. Before the time is up the
# job puts itself in the queue again, and goes on from what is saved; a preempted job is put there by Slurm (--requeue).
#SBATCH --job-name=longrope
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=longrope-%j.log
#SBATCH --signal=B:USR1@120
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) NNODES=$SLURM_NNODES
export RUN_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0  # see torchrun.sh

# shellcheck disable=SC2016  # for the shells of the nodes
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec "$0" "$@"' \
    "$SLURM_SUBMIT_DIR/configs/launch/torchrun.sh" "$@" &
step=$!

# USR1: the time is nearly up. TERM: the job is cancelled, or preempted, and then Slurm queues it again itself.
trap 'echo "Time is nearly up: queued again."; scontrol requeue "$SLURM_JOB_ID"' USR1
trap 'kill -TERM "$step"' TERM
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do  # a signal ends `wait`, not the step
    status=0
    wait "$step" || status=$?
done
exit "$status"
