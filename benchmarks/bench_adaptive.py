"""Error rate and saving of the sequential test behind `mem_ratio.py --adaptive`, by simulation."""

import click
import numpy as np
from scipy.special import ndtri

from dnnlib.cli import Float, report_errors
from memorization.stats.sequential import PRIOR_SAMPLES, decision_bounds, rounds

OFFSETS = (-0.4, -0.2, -0.1, -0.05, -0.03, -0.02, -0.01, 0, 0.01, 0.02, 0.03, 0.05, 0.08, 0.1)
_BLOCK = 250  # replications at a time


@click.command(context_settings=dict(max_content_width=120))
@click.option("--bar", help="Bar", metavar="FLOAT", type=Float(min=0.01, max=0.99), default=0.9, show_default=True)
@click.option(
    "--confidence", help="Confidence of a verdict", metavar="FLOAT", type=Float(min=0.5, max=0.999), default=0.95,
    show_default=True,
)  # fmt: skip
@click.option(
    "--cap", help="Samples at most", metavar="INT", type=click.IntRange(min=2), default=10_000, show_default=True
)
@click.option(
    "--replications", help="Simulated measurements per p", metavar="INT", type=click.IntRange(min=1), default=20_000,
    show_default=True,
)  # fmt: skip
@click.option(
    "--prior-samples", help="Concentration of the mixture at the bar", metavar="FLOAT", type=Float(min=0.1, max=1e4),
    default=PRIOR_SAMPLES, show_default=True,
)  # fmt: skip
@report_errors
def main(bar: float, confidence: float, cap: int, replications: int, prior_samples: float) -> None:
    """Print, for each true probability p: how often the test says "above" and "below" within the cap when it is
    looked at after every sample, and when it is looked at after the rounds of mem_ratio.py (64, 80, 100, 125, ...
    images); how many samples it takes; and how often stopping at the first round whose Wilson interval excludes the
    bar is wrong.
    """
    n = np.arange(1, cap + 1)
    above, below = decision_bounds(n, bar, confidence, prior_samples)
    looks = np.cumsum(rounds(cap))
    wilson_above, wilson_below = wilson_bounds(looks, bar, confidence)
    click.echo(f"bar {bar}, confidence {confidence}, cap {cap}, {replications} replications\n")
    click.echo(
        "| p | above % | below % | open % | samples | rounds: above % | below % | samples | saving | Wilson: false % |"
    )
    click.echo("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rng = np.random.default_rng(0)
    for p in [round(bar + offset, 6) for offset in OFFSETS if 0 <= bar + offset <= 1]:
        found = []
        for start in range(0, replications, _BLOCK):
            s = np.cumsum(rng.random((min(_BLOCK, replications - start), cap)) < p, axis=1, dtype=np.int32)
            found.append([
                decide(s, n, above, below),
                decide(s[:, looks - 1], looks, above[looks - 1], below[looks - 1]),
                decide(s[:, looks - 1], looks, wilson_above, wilson_below),
            ])  # fmt: skip
        each, by_round, naive = (np.concatenate(parts, axis=1) for parts in zip(*found))
        false = {-1: naive[0] < 0, 0: naive[0] != 0, 1: naive[0] > 0}[int(np.sign(bar - p))]
        cells = [
            f"{p:g}", *percent(each), f"{each[1].mean():.0f}", *percent(by_round)[:2], f"{by_round[1].mean():.0f}",
            f"{100 - 100 * by_round[1].mean() / cap:.1f} %", f"{100 * false.mean():.2f}",
        ]  # fmt: skip
        click.echo("| " + " | ".join(cells) + " |")


def decide(s: np.ndarray, n: np.ndarray, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """First verdicts of paths `s` [paths, looks], as rows: 1 above, -1 below, 0 open; and samples spent."""
    verdict = (s >= above).astype(np.int8) - (s <= below)
    first = (verdict != 0).argmax(axis=1)
    verdict = verdict[np.arange(len(s)), first]
    return np.stack([verdict, np.where(verdict != 0, n[first], n[-1])])


def wilson_bounds(n: np.ndarray, bar: float, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Successes from which, and up to which, the Wilson interval excludes the bar: |s - n bar| > z sd of s."""
    half = ndtri((1 + confidence) / 2) * np.sqrt(n * bar * (1 - bar))
    return np.floor(n * bar + half) + 1, np.ceil(n * bar - half) - 1


def percent(found: np.ndarray) -> list[str]:
    return [f"{100 * (found[0] == verdict).mean():.2f}" for verdict in (1, -1, 0)]


if __name__ == "__main__":
    main()
