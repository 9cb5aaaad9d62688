#!/usr/bin/env bash
# Two stages as two jobs of different sizes, the second one queued behind the first:
#   launch/chain.sh "--nodes=4 --gpus-per-node=8" pretrain "--nodes=16 --gpus-per-node=8" pretrain,sft OVERRIDES...
# Both jobs have one run directory: the second finds the first one's stage finished and goes on.
set -euo pipefail

if [[ $# -lt 5 ]]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi
read -ra first_options <<<"$1"
first_schedule=$2
read -ra second_options <<<"$3"
second_schedule=$4
shift 4
here=$(dirname "$(readlink -f "$0")")

first=$(sbatch --parsable "${first_options[@]}" "$here/slurm.sbatch" "$@" "schedule=[$first_schedule]")
# afterok waits through requeues. A chain whose first link fails is cancelled, not left in the queue.
second=$(sbatch --parsable "--dependency=afterok:${first%%;*}" --kill-on-invalid-dep=yes \
    "${second_options[@]}" "$here/slurm.sbatch" "$@" "schedule=[$second_schedule]")
echo "$first $second"
