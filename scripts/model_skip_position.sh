#!/usr/bin/env bash
# Skip connections by position (published Figure 4): a single one kept.
# NETWORK=ddpmpp or ncsnpp. SKIPS holds one list of 0s and 1s per line of the figure, high resolution first.
# Usage: SCALE=small scripts/model_skip_position.sh; the variables are explained in scripts/study.sh.
NETWORK=${NETWORK:-ddpmpp}
FACTOR=model_skip_position-$NETWORK
source "$(dirname "$0")/study.sh"
network_options=$(skip_network)
case $SCALE in
paper)
    SIZES=${SIZES:-1000}
    SKIPS=${SKIPS:-"100000000 010000000 001000000 000100000 000010000 000001000 000000100 000000010 000000001"}
    ;;
medium)
    SIZES=${SIZES:-50}
    SKIPS=${SKIPS:-"100000000 010000000 001000000 000100000 000010000 000001000 000000100 000000010 000000001"}
    ;;
small)
    SIZES=${SIZES:-40}
    SKIPS=${SKIPS:-"100000 010000 001000 000100 000010 000001"}
    ;;
esac

skip_runs "$network_options"
TITLE="Skip connections by position ($NETWORK)"
finish folder
