#!/usr/bin/env bash
# Trains on all GPUs of this machine, one rank to a GPU, under the mpirun of Open MPI or MPICH:
#
#     examples/launch/one-machine.sh train b16/imagenet21k --data packed --out runs/b16 --resume
#     RANKS=2 examples/launch/one-machine.sh train demo --device cpu --out runs/two
#
# RANKS is the number of ranks, by default that of the GPUs. VITRUM is the program. SIGUSR1 to one rank, or to this script, saves the
# run and ends it; mpirun itself gives its ranks about a second.
set -euo pipefail

gpus() { nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true; }
ranks=${RANKS:-$(gpus)}
if [ "${ranks:-0}" -lt 1 ]; then
    echo "error: no GPU was found; RANKS=N starts N ranks on this machine's cores" >&2
    exit 2
fi

options=()
if mpirun --version 2>/dev/null | grep -q 'Open MPI'; then
    # Bound to one core, a rank's loader would have one core too.
    options+=(--bind-to none --oversubscribe)
    [ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)
fi
# mpirun becomes this process, and hands SIGUSR1 on to its ranks.
exec mpirun -n "$ranks" ${options[@]+"${options[@]}"} "${VITRUM:-vitrum}" "$@"
