#!/usr/bin/env bash
# The whole job on scikit-learn's bundled digits (8x8): datasets of several sizes, a network trained on each
# for the same number of epochs, its memorization ratio, and the EMM curve. A size that is done is not done
# again; delete the output folder to start anew.
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHON=${PYTHON:-python}
export OUT=${OUT:-demo-out}                    # results lie here
export SIZES=${SIZES:-"8 16 32 64 128"}        # |D|
export DURATION=${DURATION:-60}                # epochs / 20
export SAMPLES=${SAMPLES:-1000}                # images per measurement
export SEEDS=${SEEDS:-1}                       # training seeds, for example "1 2"; each takes the time of the first
export JOBS=${JOBS:-2}                         # sizes at a time, one core each
export OMP_NUM_THREADS=1

study() {
    set -euo pipefail
    local size=$1 seed=$2 name run data
    name=digits-$size-seed$seed run=$OUT/runs/digits-$size-seed$seed data=$OUT/data/digits-$size.zip
    if [ ! -f "$run/trained-$DURATION" ]; then
        echo "$name: training (log: $run.log)"
        rm -rf "$run" && mkdir -p "$OUT/runs"
        "$PYTHON" dataset_tool.py --source=digits --dest="$data" --max-images="$size" --reuse > "$run.log"
        "$PYTHON" train.py --outdir="$run" --nosubdir --data="$data" --seed="$seed" --duration="$DURATION" \
            --num-channels=16 --cres=1,2 --num-blocks=1 --attn-resolutions=4 --dropout=0 --augment=0 --batch=16 \
            --lr=1e-2 --ema=4 --ema_mode=mode1 --tick=4 --snap=1000 --device=cpu >> "$run.log"
        touch "$run/trained-$DURATION"
    fi
    "$PYTHON" mem_ratio.py --expdir="$run" --knn-ref="$data" --seeds="0-$((SAMPLES - 1))" --batch=250 --device=cpu \
        --grid="$OUT/grid-$size-seed$seed.png" > "$run/ratio.log"
    echo "$name: $(sed -n 's/^Highest: *//p' "$run/ratio.log")"
}
export -f study

# On a terminal: how far the runs are, below what they print, until all are done.
watch_runs() {
    while sleep 2; do
        local line="" log
        for log in "$OUT"/runs/*.log; do
            [ -f "${log%.log}/trained-$DURATION" ] || line+=" $(basename "$log" .log) $(sed -n 's/^tick [0-9]* *\(kimg [0-9.]*\).*/\1/p' "$log" | tail -n 1);"
        done
        printf '\r\033[K%.150s' "${line:+in training:$line}" >&2
    done
}
if [ -t 2 ]; then
    watch_runs &
    watcher=$!
    trap 'kill $watcher 2> /dev/null' EXIT
fi

# The largest first, so that the processes finish together.
for size in $(printf '%s\n' $SIZES | sort -rn); do
    for seed in $SEEDS; do echo "$size $seed"; done
done | xargs -P "$JOBS" -L 1 bash -c 'study "$0" "$1"'

if [ -t 2 ]; then kill "$watcher" 2> /dev/null || true; trap - EXIT; printf '\r\033[K' >&2; fi
echo
"$PYTHON" emm.py curve "$OUT/runs" --out="$OUT/curve.png" --title="Digits, 8x8"
middle=$(printf '%s\n' $SIZES | sort -n | awk '{ size[NR] = $1 } END { print size[int(NR / 2) + 1] }')
echo "Grid:   $OUT/grid-$middle-seed${SEEDS%% *}.png (and one for each other run)"
echo "To go on by hand: source .venv/bin/activate"
