"""Held-out images as a control for copies by group, and how far away a copy still counts."""

import json

import numpy as np
import pytest

import mem_ratio
import outlier_study
import train
from dataset_utils import dataset_inject
from memorization.measure.criteria import memorized
from memorization.measure.gap import ImageSet
from memorization.measure.held_out import HeldOutControl, copies_of_each, radii
from memorization.measure.knn import plain_neighbors
from memorization.measure.results import Reference
from memorization.records import read_records


def plane(rng, count):
    """Images 8x8 of two numbers: they fill a plane evenly."""
    return np.repeat(rng.integers(0, 256, [count, 1, 1, 2], dtype=np.uint8), 32, axis=2).reshape(count, 1, 8, 8)


def test_radius_of_one_neighbour():
    """D/4 towards it, D/2 away, D / sqrt(8) across: in 64 dimensions a random direction is nearly across."""
    pair = np.zeros([2, 1, 8, 8], dtype=np.uint8)
    pair[1] = 80
    assert radii(pair) == pytest.approx([80 / 8**0.5] * 2, rel=0.03)
    line = np.zeros([2, 1, 1, 1], dtype=np.uint8)  # in one dimension half of the directions lead to it
    line[1] = 80
    found = radii(line, directions=1, seed=0)
    assert found[0] == pytest.approx(80 / 4) or found[0] == pytest.approx(80 / 2)
    assert radii(np.concatenate([pair, pair[:1]])).tolist()[::2] == [0, 0]


def test_radius_is_where_the_criterion_changes(digits):
    """Just inside a perturbed image counts as a copy, just outside it does not; held-out ones as if they were added."""
    some, rng = digits[:40], np.random.default_rng(1)
    at = radii(some)
    direction = rng.standard_normal([200, 64])
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    for i in range(0, 40, 8):
        y, others = some[i].reshape(64).astype(float), np.delete(some, i, axis=0).reshape(39, 64).astype(float)

        def counted(factor, y=y, others=others, r=at[i] * 8):
            x = y + factor * r * direction
            d2 = np.linalg.norm(x[:, None] - others, axis=2).min(axis=1)
            return np.mean(factor * r / d2 < 1 / 3)

        assert counted(0.9) > 0.9 and 0.3 < counted(1.0) < 0.7 and counted(1.1) < 0.1
    assert radii(some[:5], some[5:]) == pytest.approx(
        [radii(np.concatenate([some[i : i + 1], some[5:]]))[0] for i in range(5)]
    )


def test_copies_of_each_are_those_of_a_reference_with_it_added(digits):
    rng = np.random.default_rng(0)
    training, held = digits[:30], digits[100:112]
    made = np.concatenate(
        [held[:3], digits[200:240], np.clip(held[3:6].astype(int) + rng.integers(-9, 9, held[3:6].shape), 0, 255)]
    )
    made = made.astype(np.uint8)
    nearest = plain_neighbors(made, training)[0][:, 0]
    expected = []
    for h in held:
        distance, index = plain_neighbors(made, np.concatenate([training, h[None]]))
        expected.append(int((memorized(distance) & (index[:, 0] == 30)).sum()))
    assert copies_of_each(made, nearest, held).tolist() == expected and sum(expected) >= 6


def test_chance_is_the_same_for_training_and_held_out_images():
    """Of images drawn as all others are, a ninth is nearer to one by three (in a plane, and more at its edge).

    Per image that is 1 / (9 N) among N training images and 1 / (9 (N + 1)) of a held-out one that is added.
    """
    rng, counts = np.random.default_rng(0), np.zeros(2)
    for _ in range(20):
        training, held, made = plane(rng, 30), plane(rng, 30), plane(rng, 1000)
        nearest, _ = plain_neighbors(made, training)
        counts += memorized(nearest).sum(), copies_of_each(made, nearest[:, 0], held).sum()
    assert 1 / 9 < counts[0] / 20_000 < 1.35 / 9
    assert counts[1] / counts[0] == pytest.approx(30 / 31, abs=0.08)


def control(rng, reference=None, held=None):
    training = np.concatenate([plane(rng, 12), 255 - plane(rng, 3)]) if reference is None else reference
    reference = Reference("train.zip", training, "cpu", groups=["inlier"] * 12 + ["outlier"] * 3)
    held = np.concatenate([training[:1], plane(rng, 5)]) if held is None else held
    return HeldOutControl(reference, ImageSet("held.zip", held), ["inlier"] * 4 + ["outlier"] * 2), training, held


def test_entry_of_a_record():
    meter, training, held = control(np.random.default_rng(0))
    made = np.concatenate([held[[1, 1, 4]], training[[0, 12, 12]]])
    entry = meter.measure(made)
    assert meter.left_out == {"held-out images that are training images": 1}
    assert {n: (g["num_images"], g["num_counted"], g["num_copied"]) for n, g in entry["groups"].items()} == {
        "inlier": (3, 2, 1), "outlier": (2, 1, 1),
    }  # fmt: skip
    assert {name: row["num_within"] for name, row in entry["training"].items()} == {"inlier": 1, "outlier": 2}
    own = radii(training)
    assert entry["inlier_radius"] == pytest.approx(np.median(own[:12]))
    assert entry["training"]["outlier"]["radius"] == pytest.approx(
        [np.median(own[12:]), own[12:].min(), own[12:].max()]
    )
    assert meter.holds({"held_out": json.loads(json.dumps(entry, allow_nan=False))}) and not meter.holds({})
    assert not control(np.random.default_rng(1))[0].holds({"held_out": entry})


def test_what_does_not_fit():
    rng = np.random.default_rng(0)
    images = plane(rng, 4)
    reference = Reference("train.zip", images, "cpu", groups=["inlier"] * 4)
    for held, groups, message in [
        (images[:2], ["inlier"] * 2, "All images"), (images[:2], None, '"held.zip" has no groups'),
        (images[:, :, :4, :4], ["inlier"] * 4, "same --resolution"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            HeldOutControl(reference, ImageSet("held.zip", held), groups)
    with pytest.raises(ValueError, match='"train.zip" has no groups'):
        HeldOutControl(Reference("train.zip", images, "cpu"), ImageSet("held.zip", images[:2]), ["inlier"] * 2)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A set with its held-out images, and a tiny network that was trained on it, measured with 16 seeds."""
    from click.testing import CliRunner

    folder = tmp_path_factory.mktemp("study")

    def call(main, *args):
        result = CliRunner().invoke(main, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
        return result.output

    call(
        dataset_inject.main, "--source=digits", "--max-images=20", "--duplicates=2", "--copies=3", "--outliers=4",
        "--outliers-inverted", f"--dest={folder / 'set.zip'}", f"--held-out={folder / 'held.zip'}",
    )  # fmt: skip
    tiny = "--cres=1,1 --num-channels=4 --num-blocks=1 --attn-resolutions=4 --batch=15 --augment=0"
    call(
        train.main, f"--outdir={folder / 'run'}", "--nosubdir", f"--data={folder / 'set.zip'}", *tiny.split(),
        "--total-kimg=1", "--tick=1", "--snap=1", "--device=cpu",
    )  # fmt: skip
    measured = [
        f"--expdir={folder / 'run'}",
        f"--knn-ref={folder / 'set.zip'}",
        "--unique",
        "--seeds=0-15",
        "--steps=6",
    ]
    call(mem_ratio.main, *measured, "--device=cpu", "--quiet")
    return folder, measured


def test_measured_with_the_run_or_later(study, run_cli, tmp_path):
    """Both ways count the same images; then they are noted, and generated no more; a table draws the same again."""
    folder, measured = study
    run, held = folder / "run", f"--held-out={folder / 'held.zip'}"
    args = ["images", run, f"--out={tmp_path / 'a.png'}", "--device=cpu"]
    text = run_cli(outlier_study.main, [*args, held, "--optimum"]).output
    later = [r["held_out"] for r in read_records(run / "mem_traj.jsonl") if not r["optimum"]]
    assert later[0]["num_samples"] == 16 and set(later[0]["groups"]) == {"inlier", "duplicate", "outlier"}
    assert (
        "The optimum: " in text
        and "held-out " in text
        and "of its share" in text
        and "Counts as a copy up to this far" in text
    )
    again = run_cli(outlier_study.main, [*args, held, "--optimum"]).output
    assert again.startswith("|D| = 30 (24 in the reference), 1 run, ") and text.endswith(again)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["runs"] == [str(run)] and record["sizes"][0]["size"] == 30
    outliers = record["sizes"][0]["groups"]["outlier"]
    assert set(outliers["of_the_optimum"]) == {"copies", "copied"} and len(outliers["held_out_share"]) == 3
    text = run_cli(
        outlier_study.main, ["images", f"--from-csv={tmp_path / 'a.csv'}", f"--out={tmp_path / 'b.png'}"]
    ).output  # fmt: skip
    assert text.splitlines()[:-1] == again.splitlines()[: len(text.splitlines()) - 1]
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    text = run_cli(mem_ratio.main, [*measured, "--device=cpu", "--quiet", held, "--remeasure"]).output
    assert [r["held_out"] for r in read_records(run / "mem_traj.jsonl") if not r["optimum"]] == later
    assert "copies per image" in text


def test_the_optimum_is_measured_as_the_run_was(study):
    """With its seeds, sampler and reference; its images are training images."""
    folder, _ = study
    records = read_records(folder / "run" / "mem_traj.jsonl")
    optimum, network = ([r for r in records if bool(r["optimum"]) == wanted][-1] for wanted in (True, False))
    for key in ("seeds", "sampler", "reference_sha256", "reference_size"):
        assert optimum[key] == network[key]
    assert optimum["num_memorized"] > 12 and optimum["mean_distance"] < network["mean_distance"]


def test_what_cannot_be_compared(study, run_cli, tmp_path):
    folder, _ = study
    args = ["images", folder / "run", f"--out={tmp_path / 'x.png'}", "--device=cpu"]
    text = run_cli(outlier_study.main, [*args, f"--held-out={folder / 'set.zip'}"], 1).output
    assert "are training images" in text and not (tmp_path / "x.png").exists()
    run_cli(dataset_inject.main, ["--source=digits", "--max-images=10", "--outliers=2", "--outliers-inverted",
                                  f"--dest={tmp_path / 'o.zip'}", "--resolution=4x4"])  # fmt: skip
    assert "same --resolution" in run_cli(outlier_study.main, [*args, f"--held-out={tmp_path / 'o.zip'}"], 1).output
    text = run_cli(outlier_study.main, ["images", "--from-csv=a.csv", "--out=b.png", "--optimum"], 2).output
    assert "leave out --held-out" in text
