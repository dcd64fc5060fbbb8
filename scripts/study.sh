# What the factor scripts share: settings, datasets, runs, the curve. Sourced, not run.
#
#   SCALE=small    digits (8x8) on a CPU, minutes             SCALE=paper    CIFAR-10 with torchrun, as published
#   OUT            results: runs/VALUE/SIZE-seedSEED, FACTOR.png, .csv, .json     [studies/$SCALE/FACTOR]
#   DATASETS       dataset zips, shared by all factors        [datasets/$SCALE]; one of another SOURCE is made anew
#   SOURCE         labelled images to draw the sets from      [CIFAR-10's archive; digits]
#   SIZES, SEEDS   |D| of the runs; training seeds            [per factor; 1024]
#   DURATION       epochs / 20                                [2000; 60]
#   SAMPLES        images per measured snapshot               [10000; 1000]
#   NPROC, JOBS    processes per run; runs at a time          [8, 1; 1, 2]
#   LAUNCH         what starts a Python script            [python, or torchrun --standalone --nproc_per_node=$NPROC]
#   TRAIN, MEASURE further options of every train.py and mem_ratio.py
#   PLAN=1         only say what would be trained
#   PREPARE=1      only make the datasets and say how many runs there are
#   TASK=N         only the N-th run, from 1 (for the arrays of scripts/slurm)
#
# A dataset, a run or a measurement that is done is not done again; an interrupted run continues from its last
# training state. A run that was trained on another dataset than is there now is refused. Options given in TRAIN come
# last, so they win.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export SCALE=${SCALE:-paper} PYTHON=${PYTHON:-python} PLAN=${PLAN:-} PREPARE=${PREPARE:-} TASK=${TASK:-}
export SEEDS=${SEEDS:-1024} TRAIN=${TRAIN:-} MEASURE=${MEASURE:-}
case $SCALE in
paper)
    export SOURCE=${SOURCE:-datasets/cifar10/cifar-10-python.tar.gz}
    export DURATION=${DURATION:-2000} SAMPLES=${SAMPLES:-10000} NPROC=${NPROC:-8} JOBS=${JOBS:-1}
    basic="--arch=ddpmpp --precond=vp --num-blocks=2 --num-channels=128 --augment=0 --window-size=0 --lr=2e-4 --batch=512"
    sample="--batch=512 --subdirs"
    ;;
small)
    export SOURCE=${SOURCE:-digits} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export DURATION=${DURATION:-60} SAMPLES=${SAMPLES:-1000} NPROC=${NPROC:-1} JOBS=${JOBS:-2}
    basic="--num-channels=16 --cres=1,2 --num-blocks=1 --attn-resolutions=4 --dropout=0 --augment=0 --batch=16"
    basic="$basic --lr=1e-2 --ema=4 --ema_mode=mode1 --tick=4 --snap=1000 --device=cpu"
    sample="--batch=250 --device=cpu"
    ;;
*)
    echo "SCALE=$SCALE: choose small or paper." >&2
    exit 2
    ;;
esac
export LAUNCH=${LAUNCH:-} basic sample
# launch SCRIPT OPTIONS...: start a Python script as LAUNCH says.
launch() {
    if [ -n "$LAUNCH" ]; then
        $LAUNCH "$@"
    elif [ "$NPROC" = 1 ]; then
        "$PYTHON" "$@"
    else
        torchrun --standalone --nproc_per_node="$NPROC" "$@"
    fi
}
export -f launch
FACTOR=${FACTOR:-$(basename "$0" .sh)}
export DATASETS=${DATASETS:-datasets/$SCALE} OUT=${OUT:-studies/$SCALE/$FACTOR}
queue=()

# dataset DEST SCRIPT OPTIONS...: make a dataset, unless it is there and made from the same images in the same way.
dataset() {
    local dest=$DATASETS/$1
    shift
    if [ -z "$PLAN" ]; then
        "$PYTHON" "$@" --dest="$dest" --reuse
    fi
}

# balanced SIZE: the class-balanced set of that size; `data` becomes its path.
balanced() {
    data=$DATASETS/size-$1.zip
    dataset "size-$1.zip" dataset_utils/dataset_size.py --source="$SOURCE" --max-images="$1" --uneven
}

# study VALUE SIZE DATA OPTIONS...: queue a run for each seed. Tabs are between the fields, so that a path may have spaces.
study() {
    local value=$1 size=$2 data=$3 seed
    shift 3
    for seed in $SEEDS; do
        queue+=("$size"$'\t'"$value"$'\t'"$seed"$'\t'"$data"$'\t'"$*")
    done
}

# failed RUN LOG: show the end of the log; 75 if a signal stopped the training, which can go on.
failed() {
    tail -n 5 "$1/$2" >&2
    if grep -qs '"stopped"' "$1/run-state.json"; then return 75; fi
    return 1
}
export -f failed

# One queued run: train what is not trained, measure what is not measured.
run_one() {
    set -euo pipefail
    IFS=$'\t' read -r size value seed data options <<< "$1"
    local run=$OUT/runs/$value/$size-seed$seed digest
    digest=$(cksum < "$data")
    if [ -f "$run/data.cksum" ] && [ "$digest" != "$(cat "$run/data.cksum")" ]; then
        echo "$run was trained on other images than $data holds now; move it away, or set OUT to another folder." >&2
        return 1
    fi
    if ! grep -qs '"complete"' "$run/run-state.json"; then
        mkdir -p "$run"
        echo "$digest" > "$run/data.cksum"
        echo "$value, |D| = $size, seed $seed: training (log: $run/log.txt)"
        launch train.py --outdir="$run" --nosubdir --data="$data" --seed="$seed" --duration="$DURATION" \
            $basic $options $TRAIN --resume=latest > "$run/out.txt" 2>&1 || failed "$run" out.txt || return $?
    fi
    launch mem_ratio.py --expdir="$run" --knn-ref="$data" --seeds="0-$((SAMPLES - 1))" $sample $MEASURE \
        > "$run/ratio.txt" 2>&1 || failed "$run" ratio.txt || return $?
    echo "$value, |D| = $size, seed $seed: $(sed -n 's/^Highest: *//p' "$run/ratio.txt")"
}
export -f run_one

# finish KEY: work through the queue, the largest sets first, then draw the curve with a line per KEY.
finish() {
    local images
    images=$(printf '%s\n' "${queue[@]}" | awk -F '\t' -v duration="$DURATION" '{ sum += 20 * duration * $1 } END { print sum / 1e6 }')
    echo "$FACTOR ($SCALE): ${#queue[@]} runs, $images million training images."
    if [ -n "$PLAN$PREPARE" ]; then
        printf '%s\n' "${queue[@]}" | awk -F '\t' '{ print "  |D| = " $1 ", " $2 ", seed " $3 }'
        return
    fi
    if [ -n "$TASK" ]; then
        run_one "${queue[TASK - 1]}"
        return
    fi
    printf '%s\n' "${queue[@]}" | sort -k1,1nr -s | tr '\n' '\0' | xargs -0 -P "$JOBS" -I{} bash -c 'run_one "$1"' run_one {}
    "$PYTHON" emm.py curve "$OUT/runs" --by="$1" --out="$OUT/$FACTOR.png" --title="${TITLE:-$FACTOR}"
}

# skip_network: the options of NETWORK, in the experiments on skip connections.
skip_network() {
    case $NETWORK in
    ddpmpp) echo "--arch=ddpmpp --embed=positional" ;;
    ncsnpp) echo "--arch=ncsnpp --embed=fourier$([ "$SCALE" = paper ] && echo " --precond=ve")" ;;
    *)
        echo "NETWORK=$NETWORK: choose ddpmpp or ncsnpp." >&2
        exit 2
        ;;
    esac
    if [ "$SCALE" = small ]; then echo "--cres=1,2,2"; fi # three resolutions, as published: 8, 4, 2
}

# skip_runs OPTIONS: queue a run for each of SIZES and SKIPS.
skip_runs() {
    local skips size
    for skips in $SKIPS; do
        for size in $SIZES; do
            balanced "$size"
            study "$skips" "$size" "$data" $1 --skip-connections="$(sed 's/./&,/g; s/,$//' <<< "$skips")"
        done
    done
}
