"""Two torchrun agents as two nodes on loopback: train, generate and measure across them; the Slurm scripts."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from builders import forking_python
from conftest import ROOT
from PIL import Image
from test_resume import children
from test_training import last_snapshot

from training.run.checkpoint import list_states
from training.run.state import read_run_state

TINY = ["--num-channels=8", "--cres=1", "--num-blocks=1", "--attn-resolutions=4", "--augment=0", "--dropout=0.1"]
TINY += ["--batch=16", "--duration=1", "--tick=1", "--seed=3", "--device=cpu"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_nodes(script, *args):
    """Run a script as one process on each of two nodes; the output of both, rank 0 first."""
    port = free_port()
    results = [None, None]

    def node(rank):
        results[rank] = subprocess.run(
            [
                *(forking_python(), "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}"),
                *("--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"),
                *("--no-python", forking_python(), str(ROOT / script), *map(str, args)),
            ],
            capture_output=True, text=True, timeout=180, cwd=ROOT, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        )  # fmt: skip

    threads = [threading.Thread(target=node, args=[rank]) for rank in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for done in results:
        assert done.returncode == 0, done.stdout + done.stderr
    return [done.stdout for done in results]


@pytest.mark.slow
def test_two_nodes_train_generate_and_measure(digits_zip, tmp_path):
    data = tmp_path / "digits-60.zip"
    subprocess.run(
        [forking_python(), "dataset_tool.py", f"--source={digits_zip}", f"--dest={data}", "--max-images=60"],
        check=True, cwd=ROOT, capture_output=True,
    )  # fmt: skip
    run = tmp_path / "run"
    first, second = two_nodes("train.py", f"--outdir={run}", "--nosubdir", f"--data={data}", *TINY)
    assert "Processes" in first and "tick" in first
    assert "tick" not in second  # one node reports
    options = json.loads((run / "training_options.json").read_text())
    assert options["num_processes"] == 2

    snapshot = last_snapshot(run)
    two_nodes("generate.py", f"--network={snapshot}", f"--outdir={tmp_path / 'two'}", "--seeds=0-6", "--device=cpu")
    subprocess.run(
        [forking_python(), "generate.py", f"--network={snapshot}", f"--outdir={tmp_path / 'one'}", "--seeds=0-6",
         "--device=cpu"],
        check=True, cwd=ROOT, capture_output=True,
    )  # fmt: skip
    for seed in range(7):
        pair = [np.asarray(Image.open(tmp_path / name / f"{seed:06d}.png")) for name in ("one", "two")]
        assert np.array_equal(*pair), f"seed {seed} depends on the nodes"

    out, _ = two_nodes(
        "mem_ratio.py", f"--expdir={run}", f"--knn-ref={data}", "--seeds=0-8", "--batch=4", "--device=cpu"
    )
    assert "Highest:" in out
    records = [json.loads(line) for line in (run / "mem_traj.jsonl").read_text().splitlines()]
    assert records and all(record["num_samples"] == 9 for record in records)


# ----------------------------------------------------------------------------
# scripts/slurm, with stand-ins for Slurm's commands.


@pytest.fixture
def slurm(tmp_path):
    """An environment in which srun runs its command here, and scontrol and sbatch note what they are told."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    stand_ins = {
        "srun": 'while [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"\n',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol\n[ "$1" = show ] && echo 127.0.0.1\nexit 0\n',
        "sbatch": f'echo "$@" >> {tmp_path}/sbatch\necho $((100 + $(wc -l < {tmp_path}/sbatch)))\n',
    }
    for name, text in stand_ins.items():
        (bin_dir / name).write_text("#!/usr/bin/env bash\n" + text)
        (bin_dir / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost", "NPROC": "2",
    }  # fmt: skip


def run(command, env, code=0):
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_sbatch_trains_and_continues(slurm, digits_zip, tmp_path):
    outdir = tmp_path / "run"
    options = [f"--outdir={outdir}", f"--data={digits_zip}", *TINY, "--duration=0.05"]
    run(["scripts/slurm/train.sbatch", *options], slurm)
    state = json.loads((outdir / "run-state.json").read_text())
    assert state["state"] == "complete"
    assert not (tmp_path / "scontrol").read_text().count("requeue")
    assert "--outdir" in run(["scripts/slurm/train.sbatch", *TINY], slurm, code=2)


@pytest.mark.slow
def test_sbatch_queues_again_what_a_signal_stopped(slurm, digits_zip, tmp_path):
    outdir = tmp_path / "run"
    command = ["scripts/slurm/train.sbatch", f"--outdir={outdir}", f"--data={digits_zip}", *TINY, "--duration=1000"]
    process = subprocess.Popen(
        command, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    for line in process.stdout:
        if line.startswith("tick 0"):
            break
    (agent,) = [pid for pid in children(process.pid) if len(children(pid)) == 2]
    os.kill(agent, signal.SIGTERM)  # what Slurm signals: the steps of the job, not its script
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "queued again" in out, out
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == f"requeue {slurm['SLURM_JOB_ID']}"
    assert read_run_state(outdir)["state"] == "stopped" and list_states(outdir)

    # A start that fails is a failure, whatever the one before has left.
    (tmp_path / "scontrol").unlink()
    wrong = ["scripts/slurm/train.sbatch", f"--outdir={outdir}", "--data=missing.zip", *TINY]
    run(wrong, slurm | {"RESTARTS": "0"}, code=1)
    assert "requeue" not in (tmp_path / "scontrol").read_text()


@pytest.mark.slow
def test_submitting_a_factor(slurm, tmp_path):
    env = slurm | {"SCALE": "small", "SIZES": "10 20", "WIDTHS": "8 16", "DATASETS": str(tmp_path / "data")}
    env |= {"RATES": "2e-3 5e-3 1e-2", "OUT": str(tmp_path / "out"), "PYTHON": forking_python()}
    text = run(["scripts/slurm/submit_factor.sh", "scripts/model_width.sh", "--partition=gpu"], env)
    assert "Submitted 4 runs as job 102, the curve as job 103." in text
    assert "Submitted 6 runs that choose learning rates as job 101." in text
    rates, array, curve = (tmp_path / "sbatch").read_text().splitlines()
    assert "--array=1-6" in rates and "--partition=gpu" in rates and "--dependency=afterok:101" in array
    assert "--array=1-4" in array and "--partition=gpu" in array and "factor.sbatch scripts/model_width.sh" in array
    assert "--dependency=afterok:102" in curve
    assert len(list((tmp_path / "data").glob("*.zip"))) == 2
