#!/usr/bin/env bash
# Batch size (published Table 1), with the learning rate in proportion to it.
# Usage: SCALE=small scripts/train_batch.sh; the variables are explained in scripts/study.sh.
source "$(dirname "$0")/study.sh"
case $SCALE in
paper) SIZES=${SIZES:-"1000 2000 3000"} BATCHES=${BATCHES:-"128 256 384 512 640 768 896"} LR_PER_IMAGE=2e-4/512 ;;
medium) SIZES=${SIZES:-50} BATCHES=${BATCHES:-"8 16 32"} LR_PER_IMAGE=5e-4/16 ;;
small) SIZES=${SIZES:-"20 40 80"} BATCHES=${BATCHES:-"8 16 32"} LR_PER_IMAGE=1e-2/16 ;;
esac

for batch in $BATCHES; do
    lr=$(awk "BEGIN { print $batch * $LR_PER_IMAGE }")
    for size in $SIZES; do
        balanced "$size"
        study "$batch" "$size" "$data" --batch="$batch" --lr="$lr"
    done
done
TITLE="Batch size, learning rate in proportion"
case $SCALE in paper) finish batch_size 512 ;; *) finish batch_size 16 ;; esac
