#!/usr/bin/env bash
# The whole job on scikit-learn's bundled digits (8x8): datasets of several sizes, a network trained on each
# for the same number of epochs, its memorization ratio, and the EMM curve. Settings and variables: study.sh,
# SCALE=small. A size that is done is not done again; delete the output folder to start anew.
SCALE=small FACTOR=curve OUT=${OUT:-demo-out} GRID=1 TITLE="Digits, 8x8"
DATASETS=${DATASETS:-$OUT/data} SEEDS=${SEEDS:-1}
source "$(dirname "$0")/study.sh"
SIZES=${SIZES:-"8 16 32 64 128"}

for size in $SIZES; do
    dataset "digits-$size.zip" dataset_tool.py --source=digits --max-images="$size"
    study digits "$size" "$DATASETS/digits-$size.zip"
done
finish ""
middle=$(printf '%s\n' $SIZES | sort -n | awk '{ size[NR] = $1 } END { print size[int(NR / 2) + 1] }')
echo "Grid:   $OUT/grid-digits-$middle-seed${SEEDS%% *}.png (and one for each other run)"
echo "To go on by hand: source .venv/bin/activate"
