"""mem_ratio.py compares with the images that a run was trained on, unless told otherwise; one snapshot alone."""

import json

import pytest
from builders import digit_images
from test_mem_ratio_cli import FAST, add_snapshot, records_of

import emm
import mem_ratio as cli
from memorization.report.commands import measure_command
from memorization.runs import records_that_count
from training.dataset import ImageFolderDataset
from training.fingerprint import array_sha256, dataset_sha256


@pytest.fixture
def sets(make_zip, tmp_path):
    """Training set, the same packed again under another name, the same in another order, held-out images."""
    images = digit_images()
    parts = {"trained": images[:40], "renamed": images[:40], "reversed": images[39::-1], "held-out": images[40:80]}
    return {name: make_zip(part, None, tmp_path / f"{name}.zip") for name, part in parts.items()}


@pytest.fixture
def run(tmp_path, sets):
    folder = tmp_path / "run"
    for kimg in (100, 200):
        add_snapshot(folder, kimg)
    write_options(folder, sets["trained"])
    return folder


def write_options(folder, data, xflip=False, **more):
    options = dict(
        dataset_kwargs=dict(path=data, max_size=80 if xflip else 40, xflip=xflip), total_nimg=200_000, seed=1,
        dataset_sha256=dataset_sha256(ImageFolderDataset(data)), network_kwargs={},
    )  # fmt: skip
    (folder / "training_options.json").write_text(json.dumps(options | more))


def arguments(run, reference, *options):
    return [f"--expdir={run}", f"--knn-ref={reference}", "--seeds=0-3", *FAST, *options]


def test_another_reference_is_refused(run, sets, run_cli):
    digests = [array_sha256(ImageFolderDataset(sets[name]).images())[:12] for name in ("held-out", "trained")]
    result = run_cli(cli.main, arguments(run, sets["held-out"]), code=1)
    assert all(text in result.stderr for text in [sets["held-out"], sets["trained"], *digests, "--other-reference"])
    assert not (run / "mem_traj.jsonl").exists() and not (run / "knn-dist").exists()
    assert "in another order" in run_cli(cli.main, arguments(run, sets["reversed"]), code=1).stderr


@pytest.mark.parametrize("name", ["trained", "renamed"])
def test_the_training_images_are_taken_under_any_name(run, sets, run_cli, name):
    run_cli(cli.main, arguments(run, sets[name]))
    assert ["other_reference" in r for r in records_of(run)] == [False, False]


def test_a_held_out_reference_is_noted(run, sets, run_cli, tmp_path):
    result = run_cli(cli.main, arguments(run, sets["held-out"], "--other-reference"))
    assert "is not what the network was trained on" in result.stdout
    records = records_of(run)
    assert [r["other_reference"] for r in records] == [True, True]
    assert "--other-reference" in measure_command(records[0], run)
    curve = ["curve", run, f"--out={tmp_path}/curve.png"]
    note = f'{run} was compared with "held-out.zip", on which it was not trained'
    assert note in run_cli(emm.main, curve).stderr
    assert note in json.loads((tmp_path / "curve.json").read_text())["notes"]
    run_cli(cli.main, arguments(run, sets["trained"]))  # counts from now on
    assert note not in run_cli(emm.main, curve).stderr
    assert all("other_reference" not in r for r in records_that_count(records_of(run), 40))


def test_a_record_from_before_is_noted(run, sets, run_cli):
    """It was measured before there was the check; the ratio is not measured again."""
    options = (run / "training_options.json").read_text()
    (run / "training_options.json").unlink()
    run_cli(cli.main, arguments(run, sets["held-out"]))
    assert "other_reference" not in records_of(run)[0]
    (run / "training_options.json").write_text(options)
    run_cli(cli.main, arguments(run, sets["held-out"], "--other-reference"))
    assert len(records_of(run)) == 2 and records_of(run)[0]["other_reference"] is True


@pytest.mark.parametrize("digest", [None, "listing:" + "0" * 64])
def test_where_nothing_is_known_nothing_is_refused(run, sets, run_cli, digest):
    write_options(run, sets["trained"], dataset_sha256=digest)
    run_cli(cli.main, arguments(run, sets["held-out"]))
    assert "other_reference" not in records_of(run)[0]


def test_mirrored_and_different_images(run, sets, run_cli, make_zip, tmp_path):
    write_options(run, sets["trained"], xflip=True)
    run_cli(cli.main, arguments(run, sets["trained"]))  # the originals
    assert "(40 images" in run_cli(cli.main, arguments(run, sets["held-out"]), code=1).stderr.partition("trained on")[2]
    images = digit_images()
    repeated = make_zip([*images[:30], *images[:10]], None, tmp_path / "repeated.zip")
    write_options(run, repeated)
    run_cli(cli.main, arguments(run, repeated, "--unique"))  # with the 30 different ones of these
    assert "other_reference" not in records_of(run)[-1]


def test_one_snapshot(run, sets, run_cli):
    snapshot = run / "network-snapshot-000100.safetensors"
    args = [f"--network={snapshot}", f"--knn-ref={sets['trained']}", "--seeds=0-3", *FAST]
    result = run_cli(cli.main, args)
    assert "kimg 000100" in result.stdout and "000200" not in result.stdout and "optimum" not in result.stdout
    assert [r["kimg"] for r in records_of(run)] == [100]
    result = run_cli(cli.main, arguments(run, sets["trained"]))  # the same measurement
    assert result.stdout.count("(measured before)") == 1 and len(records_of(run)) == 2
    (run / "other").mkdir()
    renamed = run / "other" / "best.safetensors"
    renamed.write_bytes(snapshot.read_bytes())
    run_cli(cli.main, [f"--network={renamed}", *args[1:]])  # the header says it
    assert [r["kimg"] for r in records_of(run / "other")] == [100]
    assert (
        "not what the network"
        in run_cli(cli.main, [args[0], f"--knn-ref={sets['held-out']}", *args[2:]], code=1).stderr
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--network=a.safetensors"], "--network=SNAPSHOT needs --knn-ref"),
        (["--network=a.safetensors", "--knn-ref=x.zip", "--cond=1"], "a snapshot knows by itself"),
        (["--network=https://localhost/a.pkl", "--knn-ref=x.zip"], "needs --log"),
        (["--network=x.zip", "--log=o/l.log", "--other-reference"], "--other-reference belongs to"),
    ],
)
def test_wrong_options(run_cli, options, message):
    assert message in run_cli(cli.main, options, code=2).stderr
