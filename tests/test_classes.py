"""Classes of which training saw no image: said, recorded and not drawn; and relabelled sets keep their size."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.datasets import load_digits
from test_training import last_snapshot

import generate_optim
import mem_ratio
import train
from dataset_utils import dataset_random, dataset_size, dataset_unique
from training.dataset import ImageFolderDataset
from training.generation import draw_all_classes, drawn_classes, generate_images
from training.optim import OptimEDM
from training.samplers import StackedRandomGenerator
from training.snapshots.snapshot import load_network

DIGITS = np.round(load_digits().images * 255 / 16).astype(np.uint8)
LABELS = load_digits().target


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_zip):
    """A network with labels 0 and 5 of 0..5, and what training said."""
    path = tmp_path_factory.mktemp("gaps")
    chosen = np.isin(LABELS, [0, 5]).nonzero()[0][:16]
    make_zip(DIGITS[chosen], LABELS[chosen].tolist(), path / "two.zip")
    args = [f"--outdir={path / 'run'}", "--nosubdir", f"--data={path / 'two.zip'}", "--cond=1", "--device=cpu"]
    args += ["--cres=1", "--num-channels=8", "--num-blocks=1", "--attn-resolutions=0", "--batch=16", "--duration=0.001"]
    result = CliRunner().invoke(train.main, [*args, "--seed=1", "--augment=0"])
    assert result.exit_code == 0, result.output
    return path, result.stdout


def test_training_says_and_records_it(trained):
    path, said = trained
    assert "4 of 6 classes have no image (1, 2, 3, 4)" in said
    options = json.loads((path / "run" / "training_options.json").read_text())
    assert options["dataset_kwargs"]["empty_classes"] == [1, 2, 3, 4]
    assert options["training_images"] == {
        "images": 16, "distinct": 16, "repeated": 0, "left_out": {"classes without an image": 4},
    }  # fmt: skip
    assert said.rstrip().endswith("Left out: 4 classes without an image.")
    net, header = load_network(last_snapshot(path / "run"))
    assert header["dataset"]["empty_classes"] == net.empty_classes == [1, 2, 3, 4] and net.label_dim == 6


def test_only_classes_that_training_saw_are_drawn(trained, monkeypatch):
    net, _ = load_network(last_snapshot(trained[0] / "run"))
    seen = []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    list(generate_images(net, range(32), batch=32, sampler_kwargs={"num_steps": 2}))
    assert set(seen[0].tolist()) == {0, 5}
    draw_all_classes(net)
    list(generate_images(net, range(32), batch=32, sampler_kwargs={"num_steps": 2}))
    rnd = StackedRandomGenerator("cpu", range(32))
    rnd.randn([32, 1, 8, 8])
    assert seen[-1].tolist() == rnd.randint(6, size=[32]).tolist()  # as published


def test_measured_with_and_without_them(trained, run_cli):
    path, _ = trained
    args = [f"--expdir={path / 'run'}", f"--knn-ref={path / 'two.zip'}", "--seeds=0-7", "--steps=2", "--device=cpu"]
    out = run_cli(mem_ratio.main, args)
    assert "4 of the network's 6 classes have no training image; they are left out" in out.output
    out = run_cli(mem_ratio.main, [*args, "--all-classes"])
    assert "they are drawn all the same" in out.output and "measured before" not in out.output
    records = [json.loads(line) for line in (path / "run" / "mem_traj.jsonl").read_text().splitlines()]
    assert [record.get("all_classes") for record in records] == [None, True]


def test_the_optimum_of_a_set_with_gaps(make_zip, tmp_path, run_cli):
    """Labels {0, 5}: it was refused; only these are drawn, and all images are copies."""
    chosen = np.isin(LABELS, [0, 5]).nonzero()[0][:16]
    path = make_zip(DIGITS[chosen], LABELS[chosen].tolist(), tmp_path / "two.zip")
    args = [f"--network={path}", f"--outdir={tmp_path / 'o'}", "--seeds=0-15", "--device=cpu"]
    run_cli(generate_optim.main, [*args, "--cond=1"])
    assert len(list((tmp_path / "o").iterdir())) == 16
    assert "no image of class 3" in run_cli(generate_optim.main, [*args, "--class=3"], code=1).stderr
    assert drawn_classes(OptimEDM(DIGITS[chosen][:, None], LABELS[chosen])) == [0, 5]
    log = tmp_path / "m" / "mem_traj.log"
    run_cli(mem_ratio.main, [f"--network={path}", "--cond=1", f"--log={log}", "--seeds=0-15", "--device=cpu"])
    assert json.loads(log.with_suffix(".jsonl").read_text())["ratio"] == 1


@pytest.mark.parametrize("script", [dataset_random, dataset_unique])
def test_relabelled_images_are_all_there(script, tmp_path, run_cli):
    """64 images of 10 classes: 60 were left once they were relabelled."""
    data, dest = tmp_path / "64.zip", tmp_path / "relabelled.zip"
    run_cli(dataset_size.main, ["--source=digits", f"--dest={data}", "--max-images=64", "--uneven"])
    extra = ["--num-classes=10"] if script is dataset_random else []
    run_cli(script.main, [f"--source={data}", f"--dest={dest}", *extra])
    before, after = ImageFolderDataset(data), ImageFolderDataset(dest)
    assert len(after) == 64 and (before.images() == after.images()).all()
