#!/usr/bin/env bash
# Starts any `longrope` command on this node, one process per GPU (one without GPUs). On several nodes, run on each:
#
#   MASTER_ADDR=node-a NNODES=2 NODE_RANK=0 configs/launch/torchrun.sh run RECIPE --out /shared/runs/mine
#   MASTER_ADDR=node-a NNODES=2 NODE_RANK=1 configs/launch/torchrun.sh run RECIPE --out /shared/runs/mine
#
# In the configuration leave `trainer.devices: auto` and `num_nodes` away; --out must be on a file system all nodes share.
# A process that dies makes all nodes start theirs again, MAX_RESTARTS times, and `longrope run` goes on from what is
# saved; for a node that is lost the others wait ten minutes. With `fit` give `--ckpt_path last` and a ModelCheckpoint
# with `save_last: true`. After all of that the same command, given again, goes on too.
#
# Where nodes have several networks, or a node's own name leads to 127.0.0.1, nothing connects or everything hangs: name
# the network with NCCL_SOCKET_IFNAME=eth0 and, for gloo, GLOO_SOCKET_IFNAME=eth0, and this node's address on it with
# LOCAL_ADDR.
set -euo pipefail

gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
nodes=${NNODES:-1} node=${NODE_RANK:-0}
# A store that outlives a restart sends the new processes to the addresses of the old (pytorch/pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec python -m torch.distributed.run \
    --nnodes="$nodes" \
    --nproc-per-node="${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}" \
    --max-restarts="${MAX_RESTARTS:-3}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" \
    --rdzv-id="${RUN_ID:-longrope}" \
    --rdzv-conf="is_host=$((node == 0))" \
    ${LOCAL_ADDR:+--local-addr="$LOCAL_ADDR"} \
    -m lightning_longrope "$@"
