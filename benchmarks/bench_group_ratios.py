"""How often the intervals of copies by group hold the truth: simulated studies.

Of a group of m training images the network of a seed copies each with the same probability per generated image, which
differs between seeds by a log-normal factor of mean 1; the optimum copies each with another one. Printed are the shares
of studies in which nominal 95 % intervals hold the expected value over all seeds, in %, with the median ratio of their
ends: of the share of the group (`share_over_seeds`), and of the networks' copies and copied images relative to the
optimum's (`to_optimum`). Own latents: networks and optimum are independent. The same latents: a network copies an image
of the group only where the optimum does, as far as two such models can agree.
"""

from types import SimpleNamespace

import click
import numpy as np

from memorization.curve.group_curves import GroupPoint, share_over_seeds, to_optimum

IMAGES = 500  # that are generated, of each run
# Images of the group, of all groups, copies of the group per generated image: of the networks, of the optimum.
# The groups of docs/outliers.md on Fashion-MNIST.
GROUPS = {
    "outliers of 30": (2, 30, 0.068, 0.080),
    "inliers of 30": (18, 30, 0.176, 0.59),
    "outliers of 120": (8, 120, 0.021, 0.074),
    "inliers of 120": (72, 120, 0.030, 0.50),
}


def draw(
    group: str, seeds: int, spread: float, same_latents: bool, studies: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Copies of each image of the group: of the networks [studies, seeds, m], of the optimum [studies, m]."""
    m, _, p, q = GROUPS[group]
    optimum = rng.multinomial(IMAGES, [q / m] * m + [1 - q], size=studies)[:, :m]
    rates = np.minimum(p * np.exp(spread * rng.normal(size=(studies, seeds)) - spread**2 / 2), q if same_latents else 1)
    if same_latents:
        return rng.binomial(optimum[:, None, :], (rates / q)[..., None]), optimum
    copies = rng.binomial(IMAGES, rates)
    return rng.multinomial(copies, [1 / m] * m), optimum


def coverage(group: str, seeds: int, spread: float, same_latents: bool, studies: int, seed: int = 0) -> list[str]:
    """Of each kind of interval: the share that holds the truth, and the median ratio of its ends."""
    m, total, *_ = GROUPS[group]
    rng = np.random.default_rng(seed)
    many, best = draw(group, 100, spread, same_latents, 2000, rng)
    rate, copied = many.sum(2).mean() / IMAGES, (many > 0).mean()
    truths = (rate * total / m, rate * IMAGES / best.sum(1).mean(), copied / (best > 0).mean())

    def point(copies: np.ndarray) -> GroupPoint:
        memorized = int(copies.sum())
        return GroupPoint(1, 1, memorized, memorized, int((copies > 0).sum()), m, IMAGES, total)

    ends: list[list[tuple[float, float]]] = [[], [], []]
    for copies, optimum in zip(*draw(group, seeds, spread, same_latents, studies, rng), strict=True):
        points = [point(c) for c in copies]
        runs = [SimpleNamespace(curves={group: [p]}, optimum={group: point(optimum)}) for p in points]
        found = to_optimum(runs, group)
        for kind, estimate in enumerate((share_over_seeds(points), found["copies"], found["copied"])):
            ends[kind].append((estimate.low, estimate.high))
    texts = []
    for intervals, truth in zip(map(np.array, ends), truths, strict=True):
        held = ((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])).mean()
        with np.errstate(divide="ignore", invalid="ignore"):
            texts.append(f"{100 * held:.1f} ({np.median(intervals[:, 1] / intervals[:, 0]):.2f})")
    return texts


@click.command()
@click.option("--studies", help="Simulated studies of each", metavar="INT", type=click.IntRange(min=1), default=500)
def main(studies: int) -> None:
    """Print coverage in % of nominal 95 % intervals, and their median length."""
    click.echo("| group | runs | spread of seeds | latents | share | copies / optimum | copied / optimum |")
    click.echo("| --- | --- | --- | --- | --- | --- | --- |")
    for group in GROUPS:
        for seeds in (1, 3, 5):
            for spread in (0, 0.3, 0.8) if seeds > 1 else (0,):
                for same in (False, True):
                    cells = " | ".join(coverage(group, seeds, spread, same, studies))
                    click.echo(f"| {group} | {seeds} | {spread:g} | {'the same' if same else 'own'} | {cells} |")


if __name__ == "__main__":
    main()
