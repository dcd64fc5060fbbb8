# What the factor scripts share: settings, datasets, runs, the curve. Sourced, not run.
#
#   SCALE=small    digits (8x8) on a CPU, minutes             SCALE=paper    CIFAR-10 with torchrun, as published
#   SCALE=medium   Fashion-MNIST (16x16), two cores for a night or a GPU for less, see README.md
#   OUT            results: runs/VALUE/SIZE-seedSEED, FACTOR.png, .csv, .json     [studies/$SCALE/FACTOR]
#   DATASETS       dataset zips, shared by all factors        [datasets/$SCALE]; one of another SOURCE is made anew
#   SOURCE         labelled images to draw the sets from      [CIFAR-10's archive; Fashion-MNIST's; digits]
#   SIZES, SEEDS   |D| of the runs; training seeds            [per factor; 1024, at medium scale "1 2 3"]
#   DURATION       epochs / 20; 1000 images at least          [2000; 120; 60]
#   STEPS          instead: steps, the same for every |D|; 1000 images at least
#   SAMPLES        images per measured snapshot               [10000; 1000; 1000]
#   SNAPS          snapshots of a run, evenly over its training, the last at its end; all are measured, and the curve
#                  says where R_mem still rises in the second half    [2; at paper scale those of train.py --snap]
#   NPROC, JOBS    processes per run; runs at a time          [8, 1; 1, 2; 1, 2]
#   LAUNCH         what starts a Python script            [python, or torchrun --standalone --nproc_per_node=$NPROC]
#   RATES          learning rates of which each VALUE takes the one with the lowest training loss, with its largest set
#                  and seed 0 (memorization/search/learning_rate.py); those runs lie in OUT/tune     [width and depth]
#   TRAIN, MEASURE further options of every train.py and mem_ratio.py
#   AGAINST        the value with which the others are compared: differences of R_mem, ratio of EMM [the basic setting]
#   PLAN=1         only say what would be trained, and how long that takes: each network is timed here and now
#   PREPARE=1      only make the datasets and say how many runs there are
#   GRID=1         also a picture of generated images of each run, OUT/grid-VALUE-SIZE-seedSEED.png
#   TASK=N         only the N-th run, from 1 (for the arrays of scripts/slurm); with PART=rates of the runs that choose rates
#
# A dataset, a run or a measurement that is done is not done again; an interrupted run continues from its last
# training state, and one of which more epochs or steps are asked for from its end, to the weights that it would have had
# at once. A run that was trained on another dataset than is there now, or with other options, is refused. Options given in
# TRAIN come last, so they win. What a run printed is in its job.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
awk() { LC_ALL=C command awk "$@"; } # else some write a decimal comma

export SCALE=${SCALE:-paper} PYTHON=${PYTHON:-python} PLAN=${PLAN:-} PREPARE=${PREPARE:-} TASK=${TASK:-} PART=${PART:-}
export RATES=${RATES:-} TRAIN=${TRAIN:-} MEASURE=${MEASURE:-} GRID=${GRID:-} STEPS=${STEPS:-}
images=   # options of the scripts that make datasets from SOURCE
shape=    # of the images: resolution, channels, classes; what is empty is as in SOURCE
other=${SOURCE:-}   # images that the scale does not know
case $SCALE in
paper)
    export SOURCE=${SOURCE:-datasets/cifar10/cifar-10-python.tar.gz}
    export DURATION=${DURATION:-2000} SAMPLES=${SAMPLES:-10000} NPROC=${NPROC:-8} JOBS=${JOBS:-1}
    basic="--arch=ddpmpp --precond=vp --num-blocks=2 --num-channels=128 --augment=0 --window-size=0 --lr=2e-4 --batch=512"
    sample="--batch=512 --subdirs"
    shape=${other:+,,} shape=${shape:-32,3,10}
    ;;
medium)
    # Between the others: published depth, resolutions (16, 8, 4) and skip connections, half of the published channels
    # and no dropout, with small batches as at small scale. 2400 epochs are 7,500 steps at |D| = 50 and 30,000 at 200 (small
    # scale: 1,500 at 20; paper scale: 78,000 at 1000). README.md has the why of the epochs and of the learning rate.
    export SOURCE=${SOURCE:-/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} SEEDS=${SEEDS:-1 2 3}
    export DURATION=${DURATION:-120} SAMPLES=${SAMPLES:-1000} NPROC=${NPROC:-1} JOBS=${JOBS:-2}
    basic="--num-channels=64 --cres=1,1,1 --num-blocks=2 --attn-resolutions=8 --dropout=0 --augment=0 --batch=16"
    basic="$basic --lr=5e-4 --ema=4 --ema_mode=mode1 --tick=4 --device=auto"
    sample="--batch=250 --device=auto"
    images=--resolution=16x16
    shape=${other:+16,,} shape=${shape:-16,1,10}
    ;;
small)
    export SOURCE=${SOURCE:-digits} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export DURATION=${DURATION:-60} SAMPLES=${SAMPLES:-1000} NPROC=${NPROC:-1} JOBS=${JOBS:-2}
    basic="--num-channels=16 --cres=1,2 --num-blocks=1 --attn-resolutions=4 --dropout=0 --augment=0 --batch=16"
    basic="$basic --lr=1e-2 --ema=4 --ema_mode=mode1 --tick=4 --device=cpu"
    sample="--batch=250 --device=cpu"
    shape=${other:+,,} shape=${shape:-8,1,10}
    ;;
*)
    echo "SCALE=$SCALE: choose small, medium or paper." >&2
    exit 2
    ;;
esac
if [ "$NPROC" != 1 ]; then LAUNCH=${LAUNCH:-torchrun --standalone --nproc_per_node=$NPROC}; fi
long=--duration=$DURATION
if [ -n "$STEPS" ]; then long=--total-steps=$STEPS; fi
if [ "$SCALE" = paper ]; then SNAPS=${SNAPS:-}; else SNAPS=${SNAPS:-2}; fi # at paper scale as published
if [[ -n $SNAPS && ! $SNAPS =~ ^[1-9][0-9]{0,4}$ ]]; then
    echo "SNAPS=$SNAPS: choose a number of snapshots, 1 or more." >&2
    exit 2
fi
export SNAPS LAUNCH=${LAUNCH:-} SEEDS=${SEEDS:-1024} basic sample long
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
    dataset "size-$1.zip" dataset_utils/dataset_size.py --source="$SOURCE" --max-images="$1" --uneven \
        $images
}

# study VALUE SIZE DATA OPTIONS...: queue a run for each seed, on images of $shape. Tabs are between the fields, so that a
# path may have spaces.
study() {
    local value=$1 size=$2 data=$3 seed
    shift 3
    for seed in $SEEDS; do
        queue+=("$size"$'\t'"$value"$'\t'"$seed"$'\t'"$data"$'\t'"$shape"$'\t'"$*")
    done
}

# One queued run: a job that trains what is not trained and measures what is not measured.
run_one() {
    set -euo pipefail
    IFS=$'\t' read -r size value seed data shape options <<< "$1"
    local run=$OUT/runs/$value/$size-seed$seed name="$value, |D| = $size, seed $seed" start=("$PYTHON")
    if [ -n "$LAUNCH" ]; then start=($LAUNCH); fi
    local rate=$RATES
    if [[ $RATES == *" "* ]]; then rate=$(tune "$value" "$options" "${start[@]}"); fi
    if ! grep -qs '"complete"' "$run/run-state.json"; then echo "$name: training (log: $run/job.log)"; fi
    "$PYTHON" -m memorization.search.job "$run" \
        "${start[@]}" train.py --outdir="$run" --nosubdir --data="$data" --seed="$seed" "$long" \
        $(snapshots "$options") $basic $options ${rate:+"--lr=$rate"} $TRAIN --resume=latest \
        --then "${start[@]}" mem_ratio.py --expdir="$run" --knn-ref="$data" --seeds="0-$((SAMPLES - 1))" $sample \
        ${GRID:+"--grid=$OUT/grid-$value-$size-seed$seed.png"} $MEASURE || {
        local status=$?
        echo "$name: see $run/job.log. If its images have changed, move that folder away or set OUT to another." >&2
        return $status
    }
    echo "$name: $(sed -n 's/^Highest: *//p' "$run/job.log" | tail -n 1)"
}

# snapshots OPTIONS [N]: the option for N snapshots, or SNAPS, unless the options of a run say when they are taken.
snapshots() {
    local number=${2:-$SNAPS}
    if [[ -n $number && " $basic $1 $TRAIN" != *" --snap"* ]]; then echo "--snap-at=even:$number"; fi
}

# tune VALUE OPTIONS START...: the one of RATES with which the networks of a value are trained, by the training loss alone.
tune() {
    local value=$1 options=$2 rate size runs=()
    shift 2
    size=$(awk -F '\t' -v value="$value" '$1 == value { print $4 }' <<< "$LARGEST")
    for rate in $RATES; do
        runs+=("$OUT/tune/$value/$size/$rate")
        try_rate "$value" "$options" "$rate" "$@" >&2 || return
    done
    echo -n "$value: " >&2
    "$PYTHON" -m memorization.search.learning_rate "${runs[@]}"
}

# try_rate VALUE OPTIONS RATE START...: train the network of a value at a rate, with its largest set and seed 0.
try_rate() {
    local value=$1 options=$2 rate=$3 data size run
    shift 3
    IFS=$'\t' read -r data size <<< "$(awk -F '\t' -v value="$value" '$1 == value { print $2 "\t" $4 }' <<< "$LARGEST")"
    run=$OUT/tune/$value/$size/$rate
    "$PYTHON" -m memorization.search.job "$run" \
        "$@" train.py --outdir="$run" --nosubdir --data="$data" --seed=0 "$long" \
        $(snapshots "$options" 1) $basic $options "--lr=$rate" $TRAIN --resume=latest --then
}
export -f run_one snapshots tune try_rate

# On a terminal: how far the runs in training are, below what they print, until it is killed.
watch_runs() {
    local line log
    while sleep 2; do
        line=""
        for log in "$OUT"/runs/*/*/job.log; do
            if [ -f "$log" ] && [ ! -f "${log%.log}.exit" ]; then
                line+=" $(sed 's|.*/runs/||; s|/job.log||' <<< "$log") $(sed -n 's/^tick [0-9]* *\(kimg [0-9.]*\).*/\1/p' "$log" | tail -n 1);"
            fi
        done
        printf '\r\033[K%.150s' "${line:+in training:$line}" >&2
    done
}

# What each run takes on this machine, and all of them, from a few steps of each network; nothing is written.
plan_costs() {
    local size value seed data shape options runs=""
    while IFS=$'\t' read -r size value seed data shape options; do
        runs+=$size$'\t'$value$'\t'$seed$'\t'$OUT/runs/$value/$size-seed$seed$'\t'$shape$'\t'"$long $(snapshots "$options") $basic $options $TRAIN"$'\n'
    done < <(printf '%s\n' "${queue[@]}")
    "$PYTHON" -m memorization.search.cost --measure="--seeds=0-$((SAMPLES - 1)) $sample $MEASURE" --jobs="$JOBS" \
        --nproc="$NPROC" ${other:+"--source=$other"} <<< "${runs%$'\n'}"
}

# finish KEY [VALUE]: work through the queue, the largest sets first, then draw the curve with a line per KEY, or one for all,
# and compare the lines with that of VALUE.
finish() {
    local images against values rate tunings=""
    images=$(printf '%s\n' "${queue[@]}" | awk -F '\t' -v duration="$DURATION" '{ images = 20 * duration * $1; sum += images < 1000 ? 1000 : images } END { print sum / 1e6 }')
    if [ -n "$STEPS" ]; then images="$STEPS steps each"; else images="$images million training images"; fi
    echo "$FACTOR ($SCALE): ${#queue[@]} runs, $images."
    values=$(printf '%s\n' "${queue[@]}" | cut -f 2; ls "$OUT/runs" 2> /dev/null || true) # of this call and of earlier ones
    against=${AGAINST-${2:-}}
    if ! grep -qxF -e "$against" -e "${against}x$against" <<< "$values"; then
        if [ -n "${AGAINST-}" ]; then
            echo "AGAINST=$AGAINST is none of the values: $(sort -u <<< "$values" | tr '\n' ' ')" >&2
            exit 2
        fi
        against= # the basic setting is not among the values of this call, which is no mistake
    fi
    if [ "$(sort -u <<< "$values" | wc -l)" -lt 2 ]; then against=; fi
    if [[ -n $PART && ($PART != rates || -z $TASK) ]]; then
        echo "PART=$PART: it is rates, with TASK=N." >&2
        exit 2
    fi
    # The largest set of each value.
    LARGEST=$(printf '%s\n' "${queue[@]}" | awk -F '\t' '
        $1 > size[$2] + 0 { size[$2] = $1; data[$2] = $4; options[$2] = $6 }
        END { for (value in data) print value "\t" data[value] "\t" options[value] "\t" size[value] }' | sort)
    for rate in $RATES; do
        check_rate RATES "$rate"
    done
    if [ "$(printf '%s\n' $RATES | awk '{ print $1 + 0 }' | sort | uniq -d)" ]; then
        echo "RATES=\"$RATES\" has a learning rate twice." >&2
        exit 2
    fi
    if [[ $RATES == *" "* ]]; then tunings=$(awk -F '\t' -v rates="$RATES" '
        { n = split(rates, rate, " "); for (i = 1; i <= n; i++) print $1 "\t" rate[i] "\t" $3 }' <<< "$LARGEST"); fi
    export RATES LARGEST
    if [[ $RATES == *" "* && " $TRAIN" =~ " --lr"[=\ ] ]]; then
        echo "RATES chooses the learning rate, and TRAIN says it: leave --lr out of TRAIN, or set RATES to that rate." >&2
        exit 2
    fi
    if [[ $RATES == *" "* ]]; then
        echo "Before them $(wc -w <<< "$RATES") runs for each value ($(($(wc -w <<< "$RATES") * $(wc -l <<< "$LARGEST"))) in all)," \
            "with its largest set, to choose the learning rate (RATES=\"$RATES\") by the training loss."
    fi
    if [ -n "$PLAN" ]; then
        plan_costs
        if [[ $RATES == *" "* ]]; then echo "The runs that choose the learning rate are not in these times."; fi
        return
    fi
    if [ -n "$PREPARE" ]; then
        printf '%s\n' "${queue[@]}" | awk -F '\t' '{ print "  |D| = " $1 ", " $2 ", seed " $3 }'
        if [ -n "$tunings" ]; then awk -F '\t' '{ print "  learning rate " $2 " of " $1 }' <<< "$tunings"; fi
        return
    fi
    if [ "$PART" = rates ]; then
        if [[ ! $TASK =~ ^[1-9][0-9]{0,8}$ ]] || ((TASK > $(grep -c . <<< "$tunings"))); then
            echo "TASK=$TASK: choose one of the $(grep -c . <<< "$tunings") runs that choose learning rates." >&2
            exit 2
        fi
        local value rate options start=("$PYTHON")
        if [ -n "$LAUNCH" ]; then start=($LAUNCH); fi
        IFS=$'\t' read -r value rate options <<< "$(sed -n "${TASK}p" <<< "$tunings")"
        try_rate "$value" "$options" "$rate" "${start[@]}"
        return
    fi
    if [ -n "$TASK" ]; then
        if [[ ! $TASK =~ ^[1-9][0-9]{0,8}$ ]] || ((TASK > ${#queue[@]})); then
            echo "TASK=$TASK: choose a run from 1 to ${#queue[@]}." >&2
            exit 2
        fi
        run_one "${queue[TASK - 1]}"
        return
    fi
    if [ -t 2 ]; then
        watch_runs &
        trap "kill $! 2> /dev/null; printf '\r\033[K' >&2" EXIT
    fi
    printf '%s\n' "${queue[@]}" | sort -k1,1nr -s | tr '\n' '\0' | xargs -0 -P "$JOBS" -I{} bash -c 'run_one "$1"' run_one {}
    if [ -t 2 ]; then
        trap - EXIT
        kill $! && printf '\r\033[K' >&2
    fi
    if [ -z "$against" ]; then rm -f "$OUT/$FACTOR-effects.csv"; fi # of another call, with another curve
    "$PYTHON" emm.py curve "$OUT/runs" ${1:+--by="$1"} ${against:+--against="$against"} --out="$OUT/$FACTOR.png" \
        --title="${TITLE:-$FACTOR}"
}

# check_rate NAME RATE: end if a learning rate that the variable NAME says is none.
check_rate() {
    local LC_ALL=C
    if [[ ! $2 =~ ^[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$ ]] || ! awk -v rate="$2" 'BEGIN { exit !(rate + 0 > 0 && rate + 0 < 1e9) }'; then
        echo "$1=\"${!1}\": \"$2\" is no learning rate." >&2
        exit 2
    fi
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
    if [ "$SCALE" = small ]; then echo "--cres=1,2,2"; fi # three resolutions, as published and at medium scale: 8, 4, 2
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
