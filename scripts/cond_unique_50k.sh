#!/usr/bin/env bash
# Unique labels on the whole of CIFAR-10 (published Figure 5): EDM, unconditional against 50,000 classes of one image.
# Ends with the curve and the ratio over the epochs. At small scale: 1,000 digits; at medium scale
# 2,000 images.
# Usage: SCALE=small scripts/cond_unique_50k.sh; the variables are explained in scripts/study.sh.
case ${SCALE:-} in small | medium) DURATION=${DURATION:-8} ;; *) DURATION=${DURATION:-600} ;; esac
source "$(dirname "$0")/study.sh"
case $SCALE in
paper) SIZES=${SIZES:-50000} NETWORK="--precond=edm --num-blocks=4 --lr=10e-4" ;;
medium) SIZES=${SIZES:-2000} NETWORK="--tick=40 --snap=2" ;;
small) SIZES=${SIZES:-1000} NETWORK="--tick=20 --snap=2" ;;
esac

for size in $SIZES; do
    balanced "$size"
    study unconditional "$size" "$data" $NETWORK
    name=unique-$size.zip
    dataset "$name" dataset_utils/dataset_unique.py --source="$data"
    shape=${shape%,*},$size study unique-labels "$size" "$DATASETS/$name" --cond=1 $NETWORK
done
TITLE="Unique labels, |D| = $SIZES"
finish folder unconditional
if [ -z "$PLAN$PREPARE$TASK" ]; then
    "$PYTHON" emm.py trajectory "$OUT/runs" --by=folder --out="$OUT/trajectory.png" --title="$TITLE"
fi
