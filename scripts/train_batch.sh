#!/usr/bin/env bash
# Batch size (published Table 1), with the learning rate in proportion to it, unless TRAIN says one, or RATES several.
# Usage: SCALE=small scripts/train_batch.sh; the variables are explained in scripts/study.sh, but for
#   LR    learning rate of the basic batch size, 512 at paper scale and else 16    [that of the basic setting]
source "$(dirname "$0")/study.sh"
if [[ -n ${LR:-} && (-n $RATES || " $TRAIN" =~ " --lr"[=\ ]) ]]; then
    echo "LR is the learning rate of the basic batch, and RATES or TRAIN says one for all: choose one of the two." >&2
    exit 2
fi
case $SCALE in
paper) SIZES=${SIZES:-"1000 2000 3000"} BATCHES=${BATCHES:-"128 256 384 512 640 768 896"} LR=${LR:-2e-4} basic_batch=512 ;;
medium) SIZES=${SIZES:-50} BATCHES=${BATCHES:-"8 16 32"} LR=${LR:-5e-4} basic_batch=16 ;;
small) SIZES=${SIZES:-"20 40 80"} BATCHES=${BATCHES:-"8 16 32"} LR=${LR:-1e-2} basic_batch=16 ;;
esac
check_rate LR "$LR"

for batch in $BATCHES; do
    lr=$(awk -v batch="$batch" -v lr="$LR" -v basic="$basic_batch" 'BEGIN { print batch * lr / basic }')
    for size in $SIZES; do
        balanced "$size"
        study "$batch" "$size" "$data" --batch="$batch" --lr="$lr"
    done
done
TITLE="Batch size, learning rate in proportion"
if [[ -n $RATES || " $TRAIN" =~ " --lr"[=\ ] ]]; then
    TITLE="Batch size, learning rate not in proportion"
    echo "The learning rates of the batch sizes are not in proportion: RATES or TRAIN says them."
fi
finish batch_size "$basic_batch"
