#!/usr/bin/env bash
# Moving average of the weights (published Table 3): the final EMA ratio per step.
# Usage: SCALE=small scripts/train_ema.sh; the variables are explained in scripts/study.sh.
source "$(dirname "$0")/study.sh"
case $SCALE in
paper) SIZES=${SIZES:-"1000 2000 3000"} RATIOS=${RATIOS:-"0.99929 0.999 0.99 0.9 0.8 0.5 0.2 0.1 0"} ;;
medium) SIZES=${SIZES:-50} RATIOS=${RATIOS:-"0.99929 0.99 0.9 0"} ;;
small) SIZES=${SIZES:-"20 40 80"} RATIOS=${RATIOS:-"0.99929 0.99 0.9 0"} ;;
esac

for ratio in $RATIOS; do
    for size in $SIZES; do
        balanced "$size"
        study "$ratio" "$size" "$data" --ema_mode=mode4 --ema=0.5 --final-ema="$ratio"
    done
done
TITLE="Final EMA ratio"
case $SCALE in paper) finish final_ema 0.99929 ;; *) finish final_ema 0 ;; esac
