"""How often intervals hold the truth where runs are sampled from the same latents: simulated studies.

Two lines of EMM 25 and 35 (where seeds do not differ) with three seeds of each size, as in bench_effects.py, and images
that are memorized by several runs more often than by chance. Printed are, for nominal 95 % intervals, the share that
holds the truth in % and the median length in brackets, once with all images taken as independent and once as emm.py
curve has it, by the correlation that it finds: EMM of the first line (length in log |D|), the mean ratio of each size
and the difference of the lines there (points).
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # wherever it is started

import click
import numpy as np
from scipy.special import expit, logit

from benchmarks.bench_effects import LEVEL, SETTINGS
from memorization.stats.alike import Alike
from memorization.stats.bootstrap import percentiles, ratio_replicates
from memorization.stats.crossing import fit_crossing
from memorization.stats.effects import Cells
from memorization.stats.simulation import draw_alike, mean_crossing

GRIDS = {"20, 40": "20, 40; EMM 25 and 35", "8 to 128": "8 to 128; EMM 25 and 35"}
SEEDS = 3


def coverage(
    grid: str, within: float, between: float, tau: float, images: int, studies: int
) -> tuple[float, list[str]]:
    """The mean correlation of runs of one size, and the texts of the cells: taken as independent, allowed for."""
    setting, rng = SETTINGS[GRIDS[grid]], np.random.default_rng(0)
    slope = (setting.logits()[0, 1] - setting.logits()[0, 0]) / np.log(setting.sizes[1] / setting.sizes[0])
    truth = mean_crossing(lambda x: logit(LEVEL) + slope * (x - np.log(setting.emms[0])), tau, LEVEL)
    true, count = setting.ratios(tau), len(setting.sizes)
    size = np.repeat(setting.sizes, SEEDS)
    samples = np.full(SEEDS, images)
    lines = np.repeat([0, 1], count)
    same = [np.zeros(SEEDS, dtype=int)] * (2 * count)
    held: dict[tuple[str, bool], list[bool]] = {}
    lengths: dict[tuple[str, bool], list[float]] = {}
    found = []

    def note(what: str, allowed: bool, low: float, high: float, value: float) -> None:
        held.setdefault((what, allowed), []).append(low <= value <= high)
        lengths.setdefault((what, allowed), []).append(high - low)

    for study in range(studies):
        shifts = tau * rng.normal(size=(2, count, SEEDS))
        p = expit(setting.logits()[..., None] + shifts).reshape(2, -1)
        flags = draw_alike(p, images, within, between, rng)
        counts = flags.sum(axis=2).reshape(2, count, SEEDS)
        runs = [*flags[0], *flags[1]]
        seeds = [np.arange(images)] * len(runs)
        cell = np.repeat(np.arange(2 * count), SEEDS)
        of_size = [
            [(i, j) for i in range(len(runs)) for j in range(i) if cell[i] == cell[j] and cell[i] // count == line]
            for line in (0, 1)
        ]
        across = [
            (i, j) for i in range(count * SEEDS) for j in range(count * SEEDS, len(runs)) if cell[i] == cell[j] - count
        ]
        measured = Alike(seeds, runs)
        alike = [measured.correlation(pairs) or 0.0 for pairs in of_size]
        both = measured.correlation(across) or 0.0
        found.append(alike[0])
        whole = measured.correlation(itertools.combinations(range(count * SEEDS), 2)) or 0.0
        groups = [(k, samples) for line in counts for k in line]
        for allowed in (False, True):
            fit = fit_crossing(size, counts[0].ravel(), np.full(len(size), images), LEVEL, alike=whole * allowed)
            note("EMM", allowed, *(float(end[0]) for end in fit.interval(0.95)), truth)
            shared = (alike[0], same[:count]) if allowed else None
            drawn = ratio_replicates(groups[:count], 1000, study, shared=shared)
            for i in range(count):
                note("R_mem", allowed, *percentiles(100 * drawn[:, i], 0.95), 100 * true[0, i])
            cells = Cells(groups, lines, None, same, allowed * np.array([[alike[0], both], [both, alike[1]]]))
            for i in range(count):
                low, high = cells.difference(count + i, i, seed=study)
                note("difference", allowed, 100 * low, 100 * high, 100 * (true[1] - true[0])[i])
    texts = []
    for what in ("EMM", "R_mem", "difference"):
        for allowed in (False, True):
            length, places = np.median(lengths[what, allowed]), 3 if what == "EMM" else 1
            texts.append(f"{100 * np.mean(held[what, allowed]):.1f} ({length:.{places}f})")
    return float(np.mean(found)), texts


@click.command()
@click.option("--studies", help="Simulated studies of each", metavar="INT", type=click.IntRange(min=1), default=200)
@click.option("--images", help="Images of each run", type=int, default=500, show_default=True)
def main(studies: int, images: int) -> None:
    """Print coverage in % and median length of nominal 95 % intervals, with images as independent and as alike."""
    columns = [f"{what}, {how}" for what in ("EMM", "R_mem", "difference") for how in ("as independent", "as alike")]
    click.echo(f"| sizes | tau | correlation | {' | '.join(columns)} |")
    click.echo("| --- " * (3 + len(columns)) + "|")
    for grid in GRIDS:
        for tau in (0, 0.1, 0.3):
            for within, between in ((0, 0), (0.3, 0.1), (0.6, 0.2), (0.9, 0.2)):
                alike, texts = coverage(grid, within, between, tau, images, studies)
                click.echo(f"| {grid} | {tau:g} | {alike:.2f} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
