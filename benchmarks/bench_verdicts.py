"""How often the two-moons verdict is wrong, and how often it finds a real shift: simulated studies, the truth known.

Counts in the shape of a preset (group sizes, chance levels, epochs and schedule, repeats) are drawn from

    near ~ Poisson(mean of the group),    memorized ~ Binomial(near, chance + level F(ln e; half epoch, slope))

and judged by `memorization.stats.timing`. Under the null all groups have the same half epoch and slope; their numbers,
chance levels and final levels differ. In each repeat the half epoch varies for all groups together, and the level of
each group for itself. Outliers without held-out ones (`count`) have chance 100 %: only how many are generated rises.
"""

import click
import numpy as np

from dnnlib.cli import report_errors
from memorization.stats.intervals import wilson_interval
from memorization.stats.timing import logistic, sign_flips, timing_test
from toy.study import PRESETS, Settings

CHANCE = dict(inlier=0.31, duplicate=0.33, outlier=0.30)
LEVEL = dict(inlier=1.0, duplicate=1.1, outlier=0.7)  # times the level
GENERATED = dict(inlier=1.0, duplicate=1.0, outlier=0.4)  # points near a training point of the group
TIMES = (0.02, 0.1, 0.4)  # half epochs, of all epochs, and at least epoch 1
LEVELS = (0.1, 0.5)
SLOPE = 2.0
COMMON, OWN = 0.1, 0.1  # standard deviations of ln(half epoch) and of ln(level) over repeats

Counts = tuple[np.ndarray, np.ndarray]


def sizes(settings: Settings) -> dict[str, int]:
    """Training points of each group."""
    duplicates = 2 * settings.duplicates
    return dict(inlier=settings.points - settings.duplicates, duplicate=duplicates, outlier=settings.outliers)


def simulated_study(
    rng: np.random.Generator, settings: Settings, half: dict[str, float], level: float
) -> dict[str, Counts]:
    """Memorized and all points near each group, [R, E] each; "count" has outliers without held-out ones."""
    epochs, shape = np.array(settings.schedule(), float), (settings.repeats, 1)
    common, number = np.exp(COMMON * rng.standard_normal(shape)), sizes(settings)
    study = {}
    for name, chance in CHANCE.items():
        rise = logistic(epochs, half[name] * common, SLOPE)  # [R, E]
        own = np.exp(OWN * rng.standard_normal(shape))
        near = rng.poisson(number[name] * GENERATED[name], rise.shape)
        study[name] = rng.binomial(near, np.minimum(chance + LEVEL[name] * level * own * rise, 1)), near
        if name == "outlier":
            seen = rng.poisson(number[name] * GENERATED[name] * own * rise)
            study["count"] = seen, seen
    return study


def verdicts(study: dict[str, Counts], settings: Settings, flips: np.ndarray) -> dict[str, str]:
    """The answers for duplicates, for outliers by share, and by count."""
    epochs, inlier = np.array(settings.schedule()), study["inlier"]
    answers = {name: timing_test(epochs, study[name], inlier, flips).answer for name in ("duplicate", "outlier")}
    answers["count"] = timing_test(epochs, (study["count"][0], None), (inlier[0], None), flips).answer
    return answers


def simulate(
    preset: str, shift: float, middle: float, level: float, studies: int, seed: int = 0
) -> dict[str, list[str]]:
    """Answers of `studies` studies: inliers have their half at epoch `middle`, outliers later and duplicates earlier.

    Both by the factor `shift`; 1 is the null.
    """
    settings, rng = PRESETS[preset], np.random.default_rng(seed)
    flips = sign_flips(settings.repeats)
    half = dict(inlier=middle, duplicate=middle / shift, outlier=middle * shift)
    found: dict[str, list[str]] = dict(duplicate=[], outlier=[], count=[])
    for _ in range(studies):
        for name, answer in verdicts(simulated_study(rng, settings, half, level), settings, flips).items():
            found[name].append(answer)
    return found


@click.command(context_settings=dict(max_content_width=120))
@click.option("--preset", help="One, or several times", type=click.Choice(list(PRESETS)), multiple=True)
@click.option("--studies", help="Studies for each row", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--shift", help="Real factor between half epochs", type=float, default=2.0, show_default=True)
@report_errors
def main(preset: tuple[str, ...], studies: int, shift: float) -> None:
    """False positives (equal timing) and power (a real shift), in % of simulated studies."""
    click.echo(f"{studies} studies each; false: later or earlier, at equal timing; power: right, at a factor {shift:g}")
    groups = "  ".join(f"{group:^15}" for group in ("outliers, share", "outliers, count", "duplicates"))
    click.echo(f"{'preset':<11}{'half at':>9}{'level':>7}   {groups}")
    click.echo(f"{'':<11}{'':>9}{'':>7}   " + "  ".join(f"{'false':>6} {'power':>6}  " for _ in range(3)))
    wrong = total = 0
    for name in preset or PRESETS:
        for half in sorted({max(at * PRESETS[name].epochs, 1.0) for at in TIMES}):
            for level in LEVELS:
                null, real = (simulate(name, s, half, level, studies) for s in (1.0, shift))
                cells = []
                for group, right in (("outlier", "later"), ("count", "later"), ("duplicate", "earlier")):
                    false = sum(a in ("later", "earlier") for a in null[group])
                    wrong, total = wrong + false, total + studies
                    cells.append(f"{100 * false / studies:6.1f} {100 * real[group].count(right) / studies:6.1f}  ")
                click.echo(f"{name:<11}{half:>9.4g}{level:>7.2f}   " + "  ".join(cells))
    low, high = wilson_interval(wrong, total)
    click.echo(f"false positives, all rows: {100 * wrong / total:.2f} % [{100 * low:.2f}, {100 * high:.2f}]")


if __name__ == "__main__":
    main()
