"""The learning rate of a factor's values: chosen by the training loss alone."""

import json

import pytest
from builders import write_run

from memorization.search import learning_rate
from memorization.search.learning_rate import best_rate, last_loss, read_training, try_rates
from training.run.state import NOT_FINITE

LOST = f"{NOT_FINITE} in 3 ticks in a row, up to 8 kimg"


def tried(folder, rate, losses, state="complete", reason="", **command):
    """A run of 8 kimg whose loss fell as `losses`, one per tick."""
    run = write_run(folder, 20, [], lr=rate, command={"lr": rate, "num_channels": 16} | command)
    kimg = [8 * (i + 1) / len(losses) for i in range(len(losses))]
    (run / "stats.jsonl").write_text("".join(
        json.dumps({
            "Loss/loss": {"mean": loss}, "Progress/kimg": {"mean": k}, "Loss/not_finite": {"mean": float(loss != loss)}
        }) + "\n" for k, loss in zip(kimg, losses)
    ))  # fmt: skip
    (run / "run-state.json").write_text(json.dumps(dict(state=state, kimg=8, reason=reason)))
    return run


def test_the_lowest_loss_of_the_last_quarter_wins(run_cli, tmp_path):
    """Not the lowest loss ever, nor that of the whole training; a run that diverged is out, a compiled one is not."""
    early = tried(tmp_path / "a", 1e-2, [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.9])
    late = tried(tmp_path / "b", 2e-3, [9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 0.6, 0.8], compile=True)
    gone = tried(tmp_path / "c", 1.0, [1.0, float("nan")], state="failed", reason=LOST)
    rates = try_rates([read_training(run) for run in (early, late, gone)])
    assert [(r.value, r.loss) for r in rates] == [(2e-3, pytest.approx(0.7)), (1e-2, pytest.approx(0.9)), (1.0, None)]
    assert best_rate(rates).value == 2e-3
    result = run_cli(learning_rate.main, [str(early), str(late), str(gone)])
    assert result.stdout == "0.002\n"
    assert "the end of what was tried" in result.stderr and "1: not finite" in result.stderr


def test_a_run_that_diverged_at_its_end_is_out(tmp_path):
    """It is complete: its last ticks were too few for training to give up."""
    nan = float("nan")
    gone = tried(tmp_path / "a", 1e-2, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, nan])
    early = tried(tmp_path / "b", 2e-3, [nan, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5])
    all_of_it = tried(tmp_path / "c", 1e-1, [0.9, nan])
    rates = try_rates([read_training(run) for run in (gone, early, all_of_it)])
    assert [(rate.value, rate.loss) for rate in rates] == [(2e-3, pytest.approx(0.5)), (1e-2, None), (1e-1, None)]
    assert best_rate(rates).value == 2e-3


def test_one_tick_is_its_own_last_quarter(tmp_path):
    assert last_loss(read_training(tried(tmp_path / "a", 1e-2, [0.5]))) == 0.5


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(rate=2e-3, losses=[1.0], state="stopped"), "has ended"),
        (dict(rate=2e-3, losses=[1.0], state="failed", reason="the disk is full"), "has ended"),
        (dict(rate=2e-3, losses=[1.0], num_channels=32), "differ in num_channels"),
        (dict(rate=1e-2, losses=[1.0]), "Two runs have the learning rate 0.01"),
        (dict(rate=2e-3, losses=[]), "no loss"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(other, message, run_cli, tmp_path):
    first = tried(tmp_path / "a", 1e-2, [1.0])
    second = tried(tmp_path / "b", **other)
    result = run_cli(learning_rate.main, [str(first), str(second)], code=1)
    assert message in result.stderr and result.stdout == ""


def test_a_folder_that_is_no_run(run_cli, tmp_path):
    (tmp_path / "training_options.json").write_text("[1]")
    assert "name folders that train.py has written" in run_cli(learning_rate.main, [str(tmp_path)], code=1).stderr
    (tmp_path / "training_options.json").write_text('{"dataset_kwargs": {"max_size": 10}, "total_nimg": 100}')
    assert "train it anew" in run_cli(learning_rate.main, [str(tmp_path)], code=1).stderr
    assert "training_options.json" in run_cli(learning_rate.main, [str(tmp_path / "x")], code=1).stderr


def test_all_diverged(run_cli, tmp_path):
    run = tried(tmp_path / "a", 1e-2, [1.0], state="failed", reason=LOST)
    assert "try lower ones" in run_cli(learning_rate.main, [str(run)], code=1).stderr
