#!/usr/bin/env bash
# Starts the ranks of one node, one for each of its GPUs, where the scheduler starts one process to a node, as Kubernetes does:
#
#     NODES=4 NODE=0 GPUS=8 examples/launch/node.sh train b16/imagenet21k --data packed --out /shared/runs/b16 --resume
#
# The ranks get torchrun's variables, and find each other through the run directory, which all nodes have to see. Signals are handed
# on to the ranks. VITRUM is the program. Ends when all of them have, with the code of one that failed.
set -euo pipefail
: "${NODES:?the number of nodes}" "${NODE:?the number of this node, from 0}" "${GPUS:?the number of GPUs of each node}"

ranks=()
hand_on() {
    for rank in ${ranks[@]+"${ranks[@]}"}; do
        kill -s "$1" "$rank" 2>/dev/null || true
    done
}
for signal in TERM INT HUP USR1; do
    # shellcheck disable=SC2064  # the signal's name is that of now
    trap "hand_on $signal" "$signal"
done

for ((local = 0; local < GPUS; local++)); do
    RANK=$((NODE * GPUS + local)) WORLD_SIZE=$((NODES * GPUS)) LOCAL_RANK=$local LOCAL_WORLD_SIZE=$GPUS \
        "${VITRUM:-vitrum}" "$@" &
    ranks+=("$!")
done

status=0
for rank in "${ranks[@]}"; do
    code=0
    wait "$rank" || code=$?
    # A signal that was handed on ends the wait, not the rank.
    while kill -0 "$rank" 2>/dev/null; do
        code=0
        wait "$rank" || code=$?
    done
    [ "$code" = 0 ] || status=$code
done
exit "$status"
