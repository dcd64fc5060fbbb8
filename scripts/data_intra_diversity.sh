#!/usr/bin/env bash
# Diversity within a class (published Figure 2c): a part alpha of the images of one class of CIFAR-10 is replaced by
# ImageNet images of the same animal. IMAGENET is the folder with n02085620, ...; ANIMAL dog, cat or bird.
# At small scale: digits 3 and shoes of Fashion-MNIST. At medium scale: sneakers, and sandals of Fashion-MNIST, which
# differ more among themselves (mean distance of 400 images at 28x28: 78 against 63).
# Usage: SCALE=small scripts/data_intra_diversity.sh; the variables are explained in scripts/study.sh.
source "$(dirname "$0")/study.sh"
ANIMAL=${ANIMAL:-dog}
case $SCALE in
paper)
    SIZES=${SIZES:-"500 1000 2000"} CLASS=${CLASS:-} IMAGENET=${IMAGENET:-datasets/imagenet/train} MIX=${MIX:-}
    if [ -z "$CLASS" ]; then
        case $ANIMAL in bird) CLASS=2 ;; cat) CLASS=3 ;; dog) CLASS=5 ;; esac
    fi
    if [ -z "$MIX" ]; then
        MIX=$DATASETS/imagenet-$ANIMAL.txt
        most=$(printf '%s\n' $SIZES | sort -n | tail -n 1)
        dataset "imagenet-$ANIMAL.txt" dataset_utils/sample_imagenet.py --root="$IMAGENET" --class="$ANIMAL" \
            --num-samples="$most"
    fi
    ;;
medium)
    SIZES=${SIZES:-50} CLASS=${CLASS:-7} ALPHAS=${ALPHAS:-"0 0.5 1"}
    MIX=${MIX:-$SOURCE} MIX_CLASS=${MIX_CLASS:-5}
    ;;
small)
    SIZES=${SIZES:-"20 40 80"} CLASS=${CLASS:-3}
    MIX=${MIX:-/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz} MIX_CLASS=${MIX_CLASS:-7}
    ;;
esac
ALPHAS=${ALPHAS:-"0 0.2 0.5 0.8 1"}

for alpha in $ALPHAS; do
    for size in $SIZES; do
        name=intra-$CLASS-$alpha-$size.zip
        dataset "$name" dataset_utils/intra_diversity.py --source="$SOURCE" --class="$CLASS" --mix="$MIX" \
            ${MIX_CLASS:+--mix-class="$MIX_CLASS"} --inter-rate="$alpha" --max-images="$size" $images
        study "alpha=$alpha" "$size" "$DATASETS/$name"
    done
done
TITLE="Diversity within a class"
finish folder alpha=0
