#!/usr/bin/env bash
# One machine: launch/torchrun.sh NUM_PROCESSES OVERRIDES...
# For example: launch/torchrun.sh 4 experiment=demo loader.data_root=runs/demo-data
# Starting the same command again continues the run.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[0-9]+$ ]]; then
    echo "usage: $0 NUM_PROCESSES OVERRIDES..." >&2
    exit 2
fi
num_processes=$1
shift

# Megatron's tensor parallelism relies on kernels being queued in program order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Processes share the cores; without a limit each would take all of them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec torchrun --standalone --nproc-per-node "$num_processes" -m nvlm_train train "$@"
