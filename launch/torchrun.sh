#!/usr/bin/env bash
# One machine:       launch/torchrun.sh NUM_PROCESSES OVERRIDES...
# Several machines, the same line on each, NODE_RANK counting from 0:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-host launch/torchrun.sh 8 experiment=demo
# Starting the same command again continues the run.
set -euo pipefail

usage() {
    echo "$0: $1" >&2
    sed -n '2,5s/^# //p' "$0" >&2
    exit 2
}

[[ $# -ge 2 ]] || usage "NUM_PROCESSES and OVERRIDES are missing"
[[ $1 =~ ^[1-9][0-9]*$ ]] || usage "NUM_PROCESSES=$1 is not a positive number"
num_processes=$1
shift

# Megatron's tensor parallelism relies on kernels being queued in program order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Processes share the cores; without a limit each would take all of them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if ((${NNODES:-1} == 1)); then
    where=(--standalone)
else
    [[ ${NODE_RANK:-} =~ ^[0-9]+$ ]] || usage "NNODES=$NNODES needs NODE_RANK on each machine"
    # Every machine must name the same one; "localhost" would be another on each, and all would wait.
    case ${MASTER_ADDR:-} in
        "" | localhost | 127.*) usage "NNODES=$NNODES needs MASTER_ADDR, the first machine's name" ;;
    esac
    where=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi

# Both signals that ask a run to save reach the ranks, and saving may take a while.
exec torchrun "${where[@]}" --nproc-per-node "$num_processes" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 300 \
    -m nvlm_train train "$@"
