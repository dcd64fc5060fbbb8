"""Effects of a factor: differences of R_mem and ratios of EMM, and how often their intervals hold the truth."""

import csv
import json
import math
import re

import numpy as np
import pytest
from builders import write_run

import emm as cli
from benchmarks.bench_effects import SETTINGS, coverage
from memorization.curve.effects import effects
from memorization.curve.lines import curve_lines
from memorization.runs import read_run
from memorization.stats.crossing import fit_crossing
from memorization.stats.effects import Cells, emm_ratio


@pytest.mark.parametrize(("name", "seeds", "tau"), [
    ("20, 40; no effect", 3, 0.0), ("20, 40; EMM 25 and 35", 3, 0.3), ("20, 40; four lines", 2, 0.5),
    ("20, 40; four lines, seeds of line 0 differ more", 3, 0.5),
    ("8 to 128; EMM 25 and 35", 3, 0.3),
])  # fmt: skip
def test_the_intervals_hold_the_truth(name, seeds, tau):
    """Nominal 95 %: 120 studies each, whose own error is 2 %; the benchmark has the whole table."""
    held, length, emm_held, emm_length = coverage(name, seeds, tau, 500, studies=120)
    assert 0.87 <= held and 0.89 <= emm_held
    assert length < 0.5 and (emm_length < 1 or math.isinf(emm_length))


def test_images_alone_do_not_hold_it():
    """What the seeds do must be known: with a spread of 0 the intervals miss as soon as there is one."""
    held, _, emm_held, _ = coverage("8 to 128; EMM 25 and 35", 1, 0.5, 1000, studies=60, seed_sd=0)
    assert held < 0.6 and emm_held < 0.6


def test_a_known_spread_gives_the_textbook_interval():
    """Many images, tau given: the logits of the means differ by a normal of variance 2 tau^2 / K."""
    n, tau, runs = 10**7, 0.2, 4
    k = np.full(runs, n // 2)
    low, high = Cells([(k, np.full(runs, n))] * 2, [0, 1], seed_sd=tau).difference(0, 1)
    half = 1.96 * tau * math.sqrt(2 / runs) / 4  # d ratio / d logit = 1 / 4 at 1/2
    assert (low, high) == (pytest.approx(-half, rel=0.03), pytest.approx(half, rel=0.03))


def test_the_spread_of_each_line_is_found():
    """From twelve cells of each of two lines whose seeds differ by 0.05 and by 0.4."""
    rng = np.random.default_rng(0)
    p = 1 / (1 + np.exp(-rng.normal(1, np.repeat([0.05, 0.4], 12)[:, None], size=(24, 3))))
    cells = Cells([(k, np.full(3, 5000)) for k in rng.binomial(5000, p)], np.repeat([0, 1], 12))
    assert cells.seed_sd(0) == pytest.approx(0.05, abs=0.04) and cells.seed_sd(1) == pytest.approx(0.4, rel=0.3)
    assert Cells([(np.array([5]), np.array([10]))] * 2, [0, 1]).seed_sd(0) is None


def test_one_run_of_a_line_learns_from_the_other_lines():
    """A line of single runs has the spread of those with several; and it makes its interval longer."""
    three, n = np.array([700, 800, 900]), np.full(3, 1000)
    one = (np.array([800]), np.array([1000]))
    cells = Cells([(three, n), (three, n), one], [0, 0, 1])
    assert 0.3 < cells.seed_sd(1) < 2 and cells.seed_sd(0) == pytest.approx(0.55, abs=0.2)
    low, high = cells.difference(2, 0)
    assert low < -0.1 and high > 0.1


def test_what_lies_beyond_the_sizes_is_open():
    def line(low, high):
        return fit_crossing([20, 20, 40, 40], [low, low, high, high], [1000] * 4)

    below, inside, above = line(400, 100), line(960, 800), line(999, 990)
    pair = {"first_low": above, "second_low": inside}
    low, high = emm_ratio(above, inside, **pair)
    assert 1 < low < 2 and high == math.inf
    low, high = emm_ratio(below, inside, first_low=below, second_low=inside)
    assert low == 0 and 0.5 < high < 1
    low, high = emm_ratio(below, above, first_low=below, second_low=above)
    assert low == 0 and high == pytest.approx(0.5, abs=0.01)  # under 20 against over 40
    assert emm_ratio(above, above, first_low=above, second_low=above) == (0, math.inf)


@pytest.fixture
def runs(tmp_path):
    for width, ratios in {8: (600, 200), 16: (960, 800), 32: (990, 900)}.items():
        for size, k in zip((20, 40), ratios):
            for seed in (1, 2, 3):
                folder = tmp_path / "runs" / f"{width}-{size}-{seed}"
                write_run(folder, size, [k + 5 * seed - 10], 1000, seed=seed, network={"model_channels": width})
    return tmp_path / "runs"


def test_the_command_compares_with_the_basic_setting(runs, run_cli, tmp_path):
    out = tmp_path / "width.png"
    text = run_cli(cli.main, ["curve", runs, "--by=num_channels", "--against=16", f"--out={out}"]).output
    assert "Against num_channels = 16:" in text and "\n6 intervals, each for itself (seeds); of many" in text
    with open(tmp_path / "width-effects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["line"], row["size"]) for row in rows] == [("8", "20"), ("8", "40"), ("32", "20"), ("32", "40")]
    assert float(rows[1]["difference"]) == pytest.approx(-0.6)
    assert all(float(row["low"]) < float(row["difference"]) < float(row["high"]) for row in rows)
    ratios = [[float(row[f"emm_ratio_{end}"]) for end in ("least", "most", "low", "high")] for row in rows]
    assert (
        ratios[0][0] == ratios[0][2] == 0
        and 0 < ratios[0][1] < 1
        and re.search(r"^8 +EMM times at most 0\.", text, re.M)
    )
    assert ratios[2][0] == ratios[2][1] and 1 < ratios[2][2] < ratios[2][0] < ratios[2][3]
    record = json.loads(out.with_suffix(".json").read_text())
    assert [entry["size"] for entry in record["effects"]] == [20, 40, 20, 40]
    read = [read_run(path.parent) for path in runs.rglob("training_options.json")]
    assert [e.line.name for e in effects(curve_lines(read, "num_channels")[0], "16")] == ["8", "32"]


def test_runs_of_one_seed_say_so(runs, run_cli, tmp_path):
    for path in list(runs.iterdir()):
        if not path.name.endswith("-1"):
            path.rename(tmp_path / path.name)
    out = tmp_path / "figure" / "width.png"
    text = run_cli(cli.main, ["curve", runs, "--by=num_channels", "--against=16", f"--out={out}"]).output
    assert "images only where one run tells nothing of seeds" in text
    assert "images only" in out.with_name("width-effects.csv").read_text()


@pytest.mark.parametrize(("options", "code", "message"), [
    (["--by=num_channels", "--against=17"], 1, 'No line to compare with "17"; the lines are: 8, 16, 32.'),
    (["--against=16"], 2, "say which with --by"),
    (["--by=seed", "--against=1", "--from-csv=x.csv"], 2, "Give either runs"),
])  # fmt: skip
def test_what_cannot_be_compared(runs, run_cli, tmp_path, options, code, message):
    out = tmp_path / "w.png"
    result = run_cli(cli.main, ["curve", runs, *options, f"--out={out}"], code=code)
    assert message in result.output + result.stderr and not out.exists()


def test_settings_of_the_benchmark_bracket_their_emm():
    for setting in SETTINGS.values():
        assert setting.emm_ratio(0.0) == pytest.approx(setting.emms[1] / setting.emms[0])
        assert ((setting.ratios(0.0) > 0) & (setting.ratios(0.0) < 1)).all()
