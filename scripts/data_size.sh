#!/usr/bin/env bash
# Size of the training set (published Figure 1): R_mem over |D| in the basic setting, and over the training.
# Usage: SCALE=small scripts/data_size.sh; the variables are explained in scripts/study.sh.
source "$(dirname "$0")/study.sh"
case $SCALE in
paper) SIZES=${SIZES:-"500 1000 2000 3000 4000 5000"} ;;
medium) SIZES=${SIZES:-"50 100 200"} ;;
small) SIZES=${SIZES:-"10 20 40 80 160"} ;;
esac

for size in $SIZES; do
    balanced "$size"
    study basic "$size" "$data"
done
TITLE="Size of the training set"
finish folder
