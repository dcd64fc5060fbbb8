"""Do the intervals of tau_mem, tau_gen and of the slope hold what they say? Simulated studies whose truth is known.

R_mem is logistic in log t, quality a distance that falls like 1 / t to its best and rises again when memorization sets
in; seeds shift both by N(0, sd^2) in log t. All snapshots of a run share their latents ("alike") or do not.
"""

import math

import click
import numpy as np

from memorization.stats.timescales import fall, fit_slope, rise, size_times

SIZES, LEVEL, TOLERANCE, GEN = (64, 256, 1024), 0.1, 0.1, 40.0


def quality(t: np.ndarray, tau_mem: float, shift: float) -> np.ndarray:
    return 2 + 100 / (1 + (t / shift / 8) ** 2) + 20 / (1 + (10 * tau_mem / t) ** 2)


def true_gen(size: int) -> float:
    """The time of the curve itself, without noise, seeds or snapshots."""
    t = np.geomspace(1, 1e6, 200_000)
    q = quality(t, 5.0 * size, GEN / 8)
    best = int(q.argmin())
    return float(t[np.flatnonzero(q[: best + 1] <= (1 + TOLERANCE) * q[best])[0]])


def study(
    rng: np.random.Generator, runs: int, images: int, sd: float, snapshots: int, alike: bool
) -> tuple[dict, dict]:
    """Times of tau_mem and tau_gen, per size a list of runs."""
    t = np.geomspace(10, 1e5, snapshots)
    mem, gen = {}, {}
    for size in SIZES:
        mem[size], gen[size] = [], []
        for _ in range(runs):
            shift = math.exp(sd * rng.standard_normal())
            tau = 5.0 * size * shift
            ratio = 1 / (1 + (1 / LEVEL - 1) * (tau / t) ** 2)
            count = (rng.random(images)[:, None] < ratio).sum(axis=0) if alike else rng.binomial(images, ratio)
            mem[size].append(rise(t, count, [images] * snapshots, LEVEL))
            true = quality(t / shift, 5.0 * size, GEN / 8)
            half = 0.05 * true * (1000 / images) ** 0.5
            noise = rng.standard_normal() if alike else rng.standard_normal(snapshots)
            value = true + noise * half / 1.96
            gen[size].append(
                fall(t, value, value - half, value + half, TOLERANCE, replicates=200 if runs == 1 else 1)
            )  # else seeds
    return mem, gen


def coverage(runs: int, images: int, sd: float, snapshots: int, alike: bool, studies: int, seed: int = 0) -> dict:
    """Shares of studies whose interval holds the truth: of tau_mem, tau_gen and the slopes (1 and 0)."""
    rng = np.random.default_rng(seed)
    true_times = {size: true_gen(size) for size in SIZES}
    held: dict[str, list[bool]] = {"tau_mem": [], "tau_gen": [], "slope_mem": [], "slope_gen": []}
    length = []
    for _ in range(studies):
        mem, gen = study(rng, runs, images, sd, snapshots, alike)
        for name, found, true, slope in (
            ("mem", mem, {size: 5.0 * size for size in SIZES}, 1.0),
            ("gen", gen, true_times, None),
        ):
            sizes = size_times(found)
            held[f"tau_{name}"] += [s.low.ends[0] <= true[s.size] <= s.high.ends[1] for s in sizes]
            fitted = fit_slope(sizes)
            if fitted is not None:
                x, y = np.log(list(true)), np.log(list(true.values()))
                slope = float(np.polyfit(x, y, 1)[0])
                held[f"slope_{name}"].append(fitted.low <= slope <= fitted.high)
                length += [fitted.high - fitted.low] if name == "mem" else []
    return {name: float(np.mean(each)) for name, each in held.items()} | {"length": float(np.median(length))}


@click.command()
@click.option("--studies", type=click.IntRange(min=1), default=300, show_default=True, help="Of each setting")
def main(studies: int) -> None:
    """Print the table of docs/statistics.md."""
    print("| runs per size | images | seeds, sd of log tau | snapshots | alike | tau_mem | tau_gen | slope of tau_mem "
          "(length) | slope of tau_gen |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for runs, images, sd, snapshots, alike in [
        (1, 1000, 0, 20, False), (1, 1000, 0, 20, True), (1, 1000, 0, 40, True), (2, 1000, 0.2, 20, True),
        (3, 1000, 0.2, 20, True), (3, 10000, 0.2, 20, True), (3, 1000, 0.2, 10, True), (5, 1000, 0.4, 20, True),
    ]:  # fmt: skip
        c = coverage(runs, images, sd, snapshots, alike, studies)
        print(
            f"| {runs} | {images} | {sd:g} | {snapshots} | {'yes' if alike else 'no'} | {100 * c['tau_mem']:.1f} | "
            f"{100 * c['tau_gen']:.1f} | {100 * c['slope_mem']:.1f} ({c['length']:.3f}) | {100 * c['slope_gen']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
