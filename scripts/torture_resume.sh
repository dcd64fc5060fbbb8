#!/usr/bin/env bash
# Trains a small network undisturbed, then again while it is killed (SIGKILL) at random moments and continues with
# --resume=latest, and compares the final weights and the statistics bit by bit. Exit status 1: they differ.
#
#   KILLS    how often it is killed                                                   [20]
#   NPROC    processes of the training; with several, torchrun restarts them when one is killed, and in every
#            fourth case torchrun is killed, too                                      [1]
#   MOMENTS  seed of the moments                                                      [drawn]
#   WORK     folder for the two runs                                                  [a temporary one, removed]
#
# A third of the kills falls on a start, a third on any moment of the training, a third on the writing of a state.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python} KILLS=${KILLS:-20} NPROC=${NPROC:-1} MOMENTS=${MOMENTS:-$RANDOM}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
RANDOM=$MOMENTS
if [ -z "${WORK:-}" ]; then
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
fi
data=$WORK/digits-50.zip

# With dropout, augmentation and labels, and as many ticks as the kills can use up.
options="--data=$data --cond=1 --augment=0.12 --dropout=0.13 --embed=fourier --cres=1 --num-channels=8 --num-blocks=1
    --attn-resolutions=4 --batch=32 --seed=7 --tick=1 --snap=8 --dump=1 --keep-states=3 --device=cpu
    --duration=$((3 * KILLS + 5)) --nosubdir"
launch=$PYTHON
if [ "$NPROC" -gt 1 ]; then
    launch="$PYTHON -m torch.distributed.run --standalone --nproc_per_node=$NPROC --max-restarts=$KILLS"
fi

start() { # in the background; $! becomes $top
    $launch train.py --outdir="$WORK/killed" $options --resume=latest >> "$WORK/killed.txt" 2>&1 &
    top=$!
}
processes() { # those that train
    if [ "$NPROC" = 1 ]; then echo "$top"; else pgrep -P "$top" || true; fi
}
newest() { # kimg of the newest state
    local files=("$WORK"/killed/training-state-*.pt)
    basename "${files[-1]}" .pt | tr -cd 0-9
}
wait_until() { # a command is true, or the training is over
    until "$@"; do
        kill -0 "$top" 2> /dev/null || return 0
        sleep 0.01
    done
}
other_processes() { # all have started, and none is of before
    local now
    now=$(processes)
    [ "$(wc -w <<< "$now")" = "$NPROC" ] && ! grep -qxF "${victims:-none}" <<< "$now"
}
another_state() { [ "$(newest)" != "$before" ]; }
writing() { compgen -G "$WORK/killed/.training-state-*.tmp" > /dev/null; }
pause() { # a random part of $1 seconds
    sleep "$(awk -v longest="$1" -v part=$RANDOM 'BEGIN { print longest * part / 32768 }')"
}

mkdir -p "$WORK"
"$PYTHON" dataset_tool.py --source=digits --dest="$data" --max-images=50 > "$WORK/data.txt"
echo "Undisturbed run: NPROC=$NPROC, $((3 * KILLS + 5)) kimg."
began=$(date +%s.%N)
$launch train.py --outdir="$WORK/whole" $options > "$WORK/whole.txt" 2>&1
took=$(awk -v began="$began" -v ended="$(date +%s.%N)" 'BEGIN { print ended - began }')
tick=$(awk -v took="$took" -v kimg=$((3 * KILLS + 5)) 'BEGIN { print took / kimg }')

echo "Killed run: KILLS=$KILLS, MOMENTS=$MOMENTS."
printf '%6s  %-24s %-14s %s\n' kill moment who "newest state"
start
for ((i = 1; i <= KILLS; i++)); do
    wait_until other_processes
    before=$(newest)
    case $((i % 3)) in
    0) moment="start" && pause 6 ;;
    1) moment="training" && wait_until another_state && pause "$tick" ;;
    2) moment="writing a state" && wait_until another_state && wait_until writing ;;
    esac
    if ! kill -0 "$top" 2> /dev/null; then
        echo "The run has ended after $((i - 1)) kills; see $WORK/killed.txt." >&2
        trap - EXIT
        exit 1
    fi
    victims=$(processes | shuf -n 1 --random-source=<(yes "$RANDOM"))
    who="one of $NPROC"
    if [ "$NPROC" -gt 1 ] && [ $((i % 4)) = 0 ]; then
        victims="$(processes) $top" who="all, torchrun"
    fi
    kill -KILL $victims 2> /dev/null || true
    case " ${victims//$'\n'/ } " in *" $top "*) { wait "$top" || true; } 2> /dev/null && start ;; esac
    printf '%6d  %-24s %-14s %s\n' "$i" "$moment" "$who" "$(newest)"
done
wait "$top" || { echo "The killed run did not end well; see $WORK/killed.txt." >&2; trap - EXIT; exit 1; }

"$PYTHON" - "$WORK" << 'EOF'
import hashlib, json, sys
from pathlib import Path

import safetensors.torch

digests, losses = [], []
for name in ("whole", "killed"):
    run = Path(sys.argv[1], name)
    snapshot = sorted(run.glob("network-snapshot-*.safetensors"))[-1]
    digest = hashlib.sha256()
    for key, tensor in sorted(safetensors.torch.load_file(snapshot).items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    digests.append(digest.hexdigest())
    losses.append([json.loads(line)["Loss/loss"] for line in open(run / "stats.jsonl")])
    left = [path.name for path in run.glob(".*.tmp")]
    print(f"{name:<7} {snapshot.name}  sha256 of the tensors {digests[-1]}  {len(losses[-1])} ticks{'  ' * bool(left)}{left or ''}")
same = digests[0] == digests[1] and losses[0] == losses[1]
print("Same weights and losses, bit by bit." if same else "They differ.")
sys.exit(not same)
EOF
