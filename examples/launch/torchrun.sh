#!/usr/bin/env bash
# Trains on the GPUs of one or more machines under PyTorch's torchrun; the same command on every machine:
#
#     examples/launch/torchrun.sh train b16/imagenet21k --data packed --out runs/b16 --resume
#     NODES=4 HEAD=first-machine examples/launch/torchrun.sh train b16/imagenet21k --data packed --out /shared/runs/b16 --resume
#
# GPUS is the number of ranks on this machine, by default one to a GPU. VITRUM is the program. torchrun hands on SIGTERM, not SIGUSR1,
# and kills the ranks 30 seconds later.
set -euo pipefail

options=(--no-python --nproc-per-node "${GPUS:-gpu}")
if [ "${NODES:-1}" -gt 1 ]; then
    : "${HEAD:?the name of the first machine}"
    options+=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29400}" --rdzv-id "${JOB:-vitrum}")
else
    options+=(--standalone)
fi
exec torchrun "${options[@]}" "${VITRUM:-vitrum}" "$@"
