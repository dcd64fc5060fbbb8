#!/usr/bin/env bash
# Conditioning (published Figure 5): no labels, true labels, random labels of C classes (random-C) and unique labels.
# Usage: SCALE=small scripts/cond_labels.sh; the variables are explained in scripts/study.sh.
source "$(dirname "$0")/study.sh"
case $SCALE in
paper)
    SIZES=${SIZES:-"1000 2000 3000 4000 5000"}
    LABELS=${LABELS:-"none true random-1 random-10 random-50 random-100 random-500 random-1000 unique"}
    ;;
medium)
    SIZES=${SIZES:-50}
    LABELS=${LABELS:-"none true random-10 unique"}
    ;;
small)
    SIZES=${SIZES:-"20 40 80"}
    LABELS=${LABELS:-"none true random-10 unique"}
    ;;
esac

images_shape=${shape%,*} # without classes
for labels in $LABELS; do
    for size in $SIZES; do
        balanced "$size"
        case $labels in
        none) study none "$size" "$data" ;;
        true) study true "$size" "$data" --cond=1 ;;
        random-*)
            name=$labels-$size.zip
            dataset "$name" dataset_utils/dataset_random.py --source="$data" --num-classes="${labels#random-}"
            shape=$images_shape,${labels#random-} study "$labels" "$size" "$DATASETS/$name" --cond=1
            ;;
        unique)
            name=unique-$size.zip
            dataset "$name" dataset_utils/dataset_unique.py --source="$data"
            shape=$images_shape,$size study unique "$size" "$DATASETS/$name" --cond=1
            ;;
        *)
            echo "LABELS=$labels: choose none, true, random-C or unique." >&2
            exit 2
            ;;
        esac
    done
done
TITLE="Labels that the network is conditioned on"
finish folder none
