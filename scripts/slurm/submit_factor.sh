#!/usr/bin/env bash
# A whole factor on Slurm: make the datasets here, submit one array task per run, and a last job for the curve.
#
#   scripts/slurm/submit_factor.sh scripts/model_width.sh --partition=gpu --account=me
#
# Further options go to sbatch; variables (SIZES, WIDTHS, OUT, ...) are taken from the environment.
set -euo pipefail
script=$1
shift
runs=$(PREPARE=1 "$script" | tee /dev/stderr | grep -c '|D| =')
name=$(basename "$script" .sh)
here=$(dirname "$0")
array=$(sbatch --parsable --job-name="$name" --array="1-$runs" "$@" "$here/factor.sbatch" "$script")
curve=$(sbatch --parsable --job-name="$name-curve" --dependency="afterok:$array" "$@" "$here/curve.sbatch" "$script")
echo "Submitted $runs runs as job $array, the curve as job $curve."
