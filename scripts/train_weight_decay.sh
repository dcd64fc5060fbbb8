#!/usr/bin/env bash
# Weight decay (published Table 2).
# Usage: SCALE=small scripts/train_weight_decay.sh; the variables are explained in scripts/study.sh.
source "$(dirname "$0")/study.sh"
case $SCALE in
paper)
    SIZES=${SIZES:-"1000 2000 3000"}
    DECAYS=${DECAYS:-"0 1e-5 1e-4 1e-3 1e-2 2e-2 5e-2 8e-2 1e-1"}
    ;;
medium) SIZES=${SIZES:-50} DECAYS=${DECAYS:-"0 1e-4 1e-2"} ;;
small) SIZES=${SIZES:-"20 40 80"} DECAYS=${DECAYS:-"0 1e-4 1e-2"} ;;
esac

for decay in $DECAYS; do
    for size in $SIZES; do
        balanced "$size"
        study "$decay" "$size" "$data" --weight-decay="$decay"
    done
done
TITLE="Weight decay"
finish weight_decay 0
