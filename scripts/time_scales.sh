#!/usr/bin/env bash
# When networks become good and when they begin to copy, over |D| (Bonnaire et al. 2025): R_mem and the quality
# against held-out images at logarithmically spaced steps, equally many for every |D|; tau_gen, tau_mem, the collapse.
# Usage: SCALE=small scripts/time_scales.sh; the variables are explained in scripts/study.sh. SOURCE is cut in two:
# training sets are taken from one half, held-out images are the other. WIDTH: channels at paper scale.
case ${SCALE:-} in
small) STEPS=${STEPS:-4000} SAMPLES=${SAMPLES:-500} ;;
medium) STEPS=${STEPS:-8000} SAMPLES=${SAMPLES:-500} ;;
*) STEPS=${STEPS:-2000000} SOURCE=${SOURCE:-datasets/celeba/img_align_celeba} ;;
esac
source "$(dirname "$0")/study.sh"
case $SCALE in
paper) # CelebA 32x32, gray; noise prediction at 1000 levels; SGD; no EMA. The sizes are of our choice.
    SIZES=${SIZES:-"256 512 1024 2048 4096 8192"} HELD_OUT=${HELD_OUT:-10000}
    images="--transform=center-crop --resolution=32x32 --grayscale"
    basic="--arch=ddpmpp --precond=vp --vp-steps=1000 --num-channels=${WIDTH:-32} --cres=1,2,4 --attn-resolutions=16,8"
    basic="$basic --num-blocks=2 --dropout=0.1 --augment=0 --window-size=0 --ema=0 --lr-rampup=0"
    basic="$basic --optimizer=SGD --momentum=0.95 --lr=0.01"
    SNAP_AT=${SNAP_AT:-250:10000:250,15000:2000000:5000}
    shape=32,1,1
    most=512
    ;;
medium)
    SIZES=${SIZES:-"50 100 200 400"} HELD_OUT=${HELD_OUT:-2000}
    basic=${basic/--ema=4 --ema_mode=mode1/--ema=0 --lr-rampup=0}
    SNAP_AT=${SNAP_AT:-log:12}
    most=16
    ;;
small)
    SIZES=${SIZES:-"16 32 64 128"} HELD_OUT=${HELD_OUT:-890}
    basic=${basic/--ema=4 --ema_mode=mode1/--ema=0 --lr-rampup=0}
    basic=${basic/--lr=1e-2/--lr=2e-3}
    SNAP_AT=${SNAP_AT:-log:16}
    most=16
    ;;
esac

dataset held-out.zip dataset_tool.py --source="$SOURCE" --split=1/2 --max-images="$HELD_OUT" $images
MEASURE="--quality=$DATASETS/held-out.zip $MEASURE"
for size in $SIZES; do
    dataset "first-$size.zip" dataset_tool.py --source="$SOURCE" --split=0/2 --max-images="$size" $images
    batch=$((size < most ? size : most))
    study basic "$size" "$DATASETS/first-$size.zip" --snap-at="$SNAP_AT" --batch="$batch"
done
TITLE="R_mem over |D| after $STEPS steps"
finish folder
if [ -z "$PLAN$PREPARE$TASK" ]; then
    mkdir -p "$OUT/times"
    "$PYTHON" emm.py timescales "$OUT/runs" --out="$OUT/times/timescales.png" --title="Time scales"
    "$PYTHON" emm.py trajectory "$OUT/runs" --x=steps --log --out="$OUT/times/trajectory.png"
fi
