#!/usr/bin/env bash
# Number of classes (published Figure 2b): sets of one size with images of 1, 2, 5 or 10 classes.
# Usage: SCALE=small scripts/data_classes.sh; the variables are explained in scripts/study.sh.
source "$(dirname "$0")/study.sh"
CLASSES=${CLASSES:-"1 2 5 10"}
case $SCALE in
paper) SIZES=${SIZES:-"500 1000 2000 3000 5000"} ;;
medium) SIZES=${SIZES:-50} ;;
small) SIZES=${SIZES:-"20 40 80"} ;;
esac

for classes in $CLASSES; do
    for size in $SIZES; do
        name=classes-$classes-$size.zip
        dataset "$name" dataset_utils/dataset_diversity.py --source="$SOURCE" --max-images="$size" \
            --num-classes="$classes" $images
        study "C=$classes" "$size" "$DATASETS/$name"
    done
done
TITLE="Number of classes"
finish folder C=10
