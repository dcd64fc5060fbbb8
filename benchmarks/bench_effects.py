"""How often the intervals of effects (emm.py curve --against) hold the truth: simulated studies whose curves are known.

A study has several lines over |D| with runs of several seeds, whose ratios differ by N(0, tau^2) on the logit scale
around logistic curves in log |D|. Line 1 is compared with line 0: R_mem at each size (the mean over all seeds) and EMM.
Printed are the shares of intervals that hold the true difference, the true ratio of EMM, in %, and in brackets the
median length in points and of the log (0.1 is about 10 %); "inf" where most are open at an end.
"""

from dataclasses import dataclass

import click
import numpy as np
from scipy.special import expit, logit

from memorization.stats.crossing import fit_crossing
from memorization.stats.effects import Cells, emm_ratio
from memorization.stats.simulation import mean_crossing

LEVEL, SLOPE = 0.9, 2.66  # of logit R_mem over log |D|, as digits have it


@dataclass(frozen=True)
class Setting:
    """Sizes, and the EMM that each line has where seeds do not differ."""

    sizes: tuple[int, ...]
    emms: tuple[float, ...]
    spreads: tuple[float, ...] = ()  # tau of each line, as a part of the study's; all alike: empty

    def logits(self) -> np.ndarray:
        """float [lines, sizes]"""
        return logit(LEVEL) - SLOPE * (np.log(self.sizes) - np.log(self.emms)[:, None])

    def taus(self, tau: float) -> np.ndarray:
        """float [lines]"""
        return tau * np.array(self.spreads or [1.0] * len(self.emms))

    def ratios(self, tau: float) -> np.ndarray:
        """Mean ratio over all seeds, float [lines, sizes], by Gauss-Hermite quadrature."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        return expit(self.logits()[..., None] + self.taus(tau)[:, None, None] * nodes) @ (weights / weights.sum())

    def emm_ratio(self, tau: float) -> float:
        """True EMM of line 1 over that of line 0."""
        logs = [
            mean_crossing(lambda x, e=emm: logit(LEVEL) - SLOPE * (x - np.log(e)), own, LEVEL, 0.01, 1e6)
            for emm, own in zip(self.emms[:2], self.taus(tau))
        ]
        return float(np.exp(logs[1] - logs[0]))


SETTINGS = {
    "20, 40; no effect": Setting((20, 40), (25, 25)),
    "20, 40; EMM 25 and 35": Setting((20, 40), (25, 35)),
    "20, 40; EMM 25 and 12": Setting((20, 40), (25, 12)),
    "20, 40; four lines": Setting((20, 40), (25, 35, 20, 28)),
    "20, 40; four lines, seeds of line 0 differ more": Setting((20, 40), (25, 35, 20, 28), (1, 0.2, 0.2, 0.2)),
    "20, 40; four lines, seeds of line 1 differ more": Setting((20, 40), (25, 35, 20, 28), (0.2, 1, 0.2, 0.2)),
    "8 to 128; EMM 25 and 35": Setting((8, 16, 32, 64, 128), (25, 35)),
}


def coverage(
    name: str, seeds: int, tau: float, images: int, *, studies: int, seed: int = 0, seed_sd: float | None = None
) -> tuple[float, float, float, float]:
    """Of differences of R_mem: share that hold the truth, and median length; of ratios of EMM the same, of the log."""
    setting, rng = SETTINGS[name], np.random.default_rng(seed)
    true = setting.ratios(tau)
    differences, ratio, runs = true[1] - true[0], setting.emm_ratio(tau), np.repeat(setting.sizes, seeds)
    held, lengths, emm_held, emm_lengths = [], [], [], []
    for study in range(studies):
        p = expit(
            setting.logits()[..., None] + setting.taus(tau)[:, None, None] * rng.normal(size=(*true.shape, seeds))
        )
        counts = rng.binomial(images, p)
        samples = np.full(seeds, images)
        lines = np.repeat(np.arange(len(true)), len(setting.sizes))
        cells = Cells([(k, samples) for line in counts for k in line], lines, seed_sd)
        for i, truth in enumerate(differences):
            low, high = cells.difference(len(setting.sizes) + i, i, seed=study)
            held.append(low <= truth <= high)
            lengths.append(high - low)
        fits = [
            fit_crossing(runs, line.ravel(), np.full(len(runs), images), LEVEL, seed_sd=seed_sd) for line in counts[:2]
        ]
        low, high = emm_ratio(fits[1], fits[0], first_low=fits[1], second_low=fits[0])
        emm_held.append(low <= ratio <= high)
        emm_lengths.append(np.log(high / low) if low > 0 else np.inf)
    return float(np.mean(held)), float(np.median(lengths)), float(np.mean(emm_held)), float(np.median(emm_lengths))


@click.command()
@click.option("--studies", help="Simulated studies of each", metavar="INT", type=click.IntRange(min=1), default=400)
@click.option("--images", help="Images of each run", type=int, default=500, show_default=True)
def main(studies: int, images: int) -> None:
    """Print coverage in % and median length of nominal 95 % intervals, for seeds and spreads between them."""
    taus = (0, 0.1, 0.3, 0.5)
    click.echo("| lines | seeds | of | " + " | ".join(f"tau {tau:g}" for tau in taus) + " |")
    click.echo("| --- " * (3 + len(taus)) + "|")
    for name in SETTINGS:
        for seeds in (2, 3, 5):
            cells = [coverage(name, seeds, tau, images, studies=studies) for tau in taus]
            points = " | ".join(f"{100 * c[0]:.1f} ({100 * c[1]:.1f})" for c in cells)
            logs = " | ".join(f"{100 * c[2]:.1f} ({c[3]:.2f})" for c in cells)
            click.echo(f"| {name} | {seeds} | R_mem | {points} |\n| {name} | {seeds} | EMM | {logs} |")


if __name__ == "__main__":
    main()
