#!/usr/bin/env bash
# Data dimension (published Figure 2a): the same images at several resolutions. Attention stays at the second level.
# Usage: SCALE=small scripts/data_dimension.sh; the variables are explained in scripts/study.sh.
case ${SCALE:-} in small) SOURCE=${SOURCE:-/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz} ;; esac
source "$(dirname "$0")/study.sh"
case $SCALE in
paper) SIZES=${SIZES:-"1000 2000 4000 8000 16000"} RESOLUTIONS=${RESOLUTIONS:-"32 16 8"} ;;
medium) SIZES=${SIZES:-50} RESOLUTIONS=${RESOLUTIONS:-"32 16 8"} ;;
small) SIZES=${SIZES:-"20 40 80"} RESOLUTIONS=${RESOLUTIONS:-"16 8"} ;; # 32x32: four times as long
esac

for resolution in $RESOLUTIONS; do
    for size in $SIZES; do
        name=dimension-$resolution-$size.zip
        dataset "$name" dataset_utils/dataset_dimension.py --source="$SOURCE" --max-images="$size" --uneven \
            --resolution="${resolution}x$resolution"
        shape=$resolution,${shape#*,} study "${resolution}x$resolution" "$size" "$DATASETS/$name" --attn-resolutions=$((resolution / 2))
    done
done
TITLE="Data dimension"
finish resolution "${RESOLUTIONS%% *}"
