#!/usr/bin/env bash
# Model width (published Figure 3): number of channels.
# At small and medium scale each value is trained with the one of RATES that gives the lowest training loss.
# Usage: SCALE=small scripts/model_width.sh; the variables are explained in scripts/study.sh.
source "$(dirname "$0")/study.sh"
case $SCALE in
paper) SIZES=${SIZES:-"500 1000 2000 3000 4000 5000"} WIDTHS=${WIDTHS:-"128 192 256 320"} ;;
medium) SIZES=${SIZES:-50} WIDTHS=${WIDTHS:-"32 64 96"} RATES=${RATES:-"2.5e-4 5e-4 1e-3"} ;;
small) SIZES=${SIZES:-"20 40 80"} WIDTHS=${WIDTHS:-"8 16 32"} RATES=${RATES:-"6.25e-4 1.25e-3 2.5e-3 5e-3 1e-2"} ;;
esac

for width in $WIDTHS; do
    for size in $SIZES; do
        balanced "$size"
        study "$width" "$size" "$data" --num-channels="$width"
    done
done
TITLE="Model width (channels)"
case $SCALE in paper) finish num_channels 128 ;; medium) finish num_channels 64 ;; small) finish num_channels 16 ;; esac
