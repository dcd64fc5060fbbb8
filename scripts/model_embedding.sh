#!/usr/bin/env bash
# Time embedding (published Figure 3): positional or Fourier features.
# Usage: SCALE=small scripts/model_embedding.sh; the variables are explained in scripts/study.sh.
source "$(dirname "$0")/study.sh"
EMBEDDINGS=${EMBEDDINGS:-"positional fourier"}
case $SCALE in
paper) SIZES=${SIZES:-"500 1000 2000 3000 4000 5000"} DEPTHS=${DEPTHS:-"2 4"} ;;
medium) SIZES=${SIZES:-"50 100"} DEPTHS=${DEPTHS:-2} ;;
small) SIZES=${SIZES:-"20 40 80"} DEPTHS=${DEPTHS:-1} ;;
esac

for embedding in $EMBEDDINGS; do
    for depth in $DEPTHS; do
        for size in $SIZES; do
            balanced "$size"
            study "$embedding-$depth" "$size" "$data" --embed="$embedding" --num-blocks="$depth"
        done
    done
done
TITLE="Time embedding and blocks per resolution"
finish folder "positional-${DEPTHS%% *}"
