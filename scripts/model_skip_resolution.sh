#!/usr/bin/env bash
# Skip connections by resolution (published Figure 4): all kept, or only those at one resolution.
# NETWORK=ddpmpp or ncsnpp. SKIPS holds one list of 0s and 1s per line of the figure, high resolution first.
# Usage: SCALE=small scripts/model_skip_resolution.sh; the variables are explained in scripts/study.sh.
NETWORK=${NETWORK:-ddpmpp}
FACTOR=model_skip_resolution-$NETWORK
source "$(dirname "$0")/study.sh"
network_options=$(skip_network)
case $SCALE in
paper)
    SIZES=${SIZES:-1000}
    SKIPS=${SKIPS:-"111111111 111000000 110000000 101000000 011000000 100000000 010000000 001000000
                    000111000 000110000 000101000 000011000 000100000 000010000 000001000
                    000000111 000000110 000000101 000000011 000000100 000000010 000000001"}
    ;;
medium)
    SIZES=${SIZES:-50}
    SKIPS=${SKIPS:-"111111111 111000000 000111000 000000111"}
    ;;
small)
    SIZES=${SIZES:-"20 40 80"}
    SKIPS=${SKIPS:-"111111 110000 001100 000011"}
    ;;
esac

skip_runs "$network_options"
TITLE="Skip connections by resolution ($NETWORK)"
finish folder "${SKIPS%%[[:space:]]*}"
