#!/usr/bin/env bash
# Model depth (published Figure 3): residual blocks per resolution.
# At small and medium scale each value is trained with the one of RATES that gives the lowest training loss.
# Usage: SCALE=small scripts/model_depth.sh; the variables are explained in scripts/study.sh.
source "$(dirname "$0")/study.sh"
case $SCALE in
paper) SIZES=${SIZES:-"500 1000 2000 3000 4000 5000"} DEPTHS=${DEPTHS:-"2 4 6 8 10 12"} ;;
medium) SIZES=${SIZES:-50} DEPTHS=${DEPTHS:-"1 2 3"} RATES=${RATES:-"2.5e-4 5e-4 1e-3"} ;;
small) SIZES=${SIZES:-"20 40 80"} DEPTHS=${DEPTHS:-"1 2 3"} RATES=${RATES:-"6.25e-4 1.25e-3 2.5e-3 5e-3 1e-2"} ;;
esac

for depth in $DEPTHS; do
    for size in $SIZES; do
        balanced "$size"
        study "$depth" "$size" "$data" --num-blocks="$depth"
    done
done
TITLE="Model depth (blocks per resolution)"
case $SCALE in small) finish num_blocks 1 ;; *) finish num_blocks 2 ;; esac
