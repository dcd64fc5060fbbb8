#!/usr/bin/env bash
# A whole factor on Slurm: make the datasets here, submit one array task per run, and a last job for the curve. Runs that choose
# learning rates (RATES) are an array of their own before them.
#
#   scripts/slurm/submit_factor.sh scripts/model_width.sh --partition=gpu --account=me
#
# Further options go to sbatch; variables (SIZES, WIDTHS, OUT, ...) are taken from the environment.
set -euo pipefail
script=$1
shift
prepared=$(PREPARE=1 PART= "$script" | tee /dev/stderr)
runs=$(grep -c '^  |D| =' <<< "$prepared")
rates=$(grep -c '^  learning rate' <<< "$prepared" || true)
name=$(basename "$script" .sh)
here=$(dirname "$0")
after=()
if [ "$rates" != 0 ]; then # before the runs that take one of them, which would only wait for each other
    first=$(PART=rates sbatch --parsable --job-name="$name-rates" --array="1-$rates" "$@" "$here/factor.sbatch" "$script")
    after=("--dependency=afterok:$first")
    echo "Submitted $rates runs that choose learning rates as job $first."
fi
array=$(PART= sbatch --parsable --job-name="$name" --array="1-$runs" "${after[@]}" "$@" "$here/factor.sbatch" "$script")
curve=$(PART= sbatch --parsable --job-name="$name-curve" --dependency="afterok:$array" "$@" "$here/curve.sbatch" "$script")
echo "Submitted $runs runs as job $array, the curve as job $curve."
