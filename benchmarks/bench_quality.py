"""How often the intervals of memorization/measure/quality.py hold, where the truth is known: normal distributions."""

import click
import numpy as np
import torch

from memorization.measure.quality import MEASURES, Vectors, compare

CASES = [  # dimensions, images, reference images, |mu|, standard deviation; the reference is N(0, I)
    (16, 300, 300, 0.0, 1.0),
    (16, 300, 300, 1.0, 1.1),
    (16, 300, 300, 0.0, 0.8),
    (64, 500, 250, 1.0, 0.9),
]


def simulate(case: tuple[int, int, int, float, float], draws: int, seed: int, names: list[str]) -> None:
    """Print, for each measure, the mean, the true and the estimated spread, and how often the interval has the mean."""
    d, n, m, shift, s = case
    rng, found = np.random.default_rng(seed), {name: [] for name in names}
    for _ in range(draws):
        x, y = s * rng.normal(size=(n, d)) + shift / np.sqrt(d), rng.normal(size=(m, d))
        for name, estimate in compare(Vectors(x), Vectors(y), names).items():
            found[name].append(estimate)
    click.echo(f"d = {d}, n = {n}, m = {m}, |mu| = {shift:g}, s = {s:g}")
    for name, estimates in found.items():
        value, low, high = (np.array([e[i] for e in estimates]) for i in range(3))
        mean = value.mean()
        line = (
            f"    {name:10s} mean {mean:8.4f}  sd {value.std():.4f}  by the interval {(high - low).mean() / 3.92:.4f}"
        )
        line += f"  holds the mean {100 * ((low <= mean) & (mean <= high)).mean():5.1f} %"
        if name == "frechet":
            unbiased = mean - np.mean([e.bias for e in estimates])
            line += f"  less bias {unbiased:.4f}, of the distributions {d * (s - 1) ** 2 + shift**2:.4f}"
        click.echo(line)


@click.command()
@click.option("--draws", help="Simulated comparisons of each case", type=click.IntRange(min=2), default=200)
@click.option("--seed", type=int, default=0)
@click.option("--measure", "names", type=click.Choice(list(MEASURES)), multiple=True, default=list(MEASURES))
def main(draws: int, seed: int, names: tuple[str, ...]) -> None:
    """Simulate comparisons of images ~ N(mu, s^2 I) with reference images ~ N(0, I)."""
    torch.set_num_threads(1)
    for case in CASES:
        simulate(case, draws, seed, list(names))


if __name__ == "__main__":
    main()
