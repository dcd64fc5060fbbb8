"""Command-line options that the sampling tools share."""

from collections.abc import Callable

import click

from dnnlib.cli import IntList
from training.samplers import ABLATIONS

_POSITIVE = click.FloatRange(min=0, min_open=True)


def _all(*options: Callable) -> Callable:
    def decorate(main: Callable) -> Callable:
        for option in reversed(options):
            main = option(main)
        return main

    return decorate


def _ablation(flag: str, name: str, help: str) -> Callable:
    choices = ABLATIONS[name]
    return click.option(flag, name, help=help, metavar="|".join(choices), type=click.Choice(choices))


device_option = click.option(
    "--device", help="auto takes CUDA where present", metavar="auto|cpu|cuda[:N]", default="auto", show_default=True
)


def seeds_option(default: str) -> Callable:
    return click.option(
        "--seeds",
        help="Random seeds (e.g. 1,2,5-10)",
        metavar="LIST",
        type=IntList(),
        default=default,
        show_default=True,
    )


subdirs_option = click.option("--subdirs", help="Create a subdirectory for every 1000 seeds", is_flag=True)
class_option = click.option(
    "--class", "class_idx", help="Class label  [default: random]", metavar="INT", type=click.IntRange(min=0)
)
batch_option = click.option(
    "--batch", help="Batch size per process", metavar="INT", type=click.IntRange(min=1), default=64, show_default=True
)

# --steps ... --scaling; they arrive as keyword arguments of the samplers, None where not given.
sampler_options = _all(
    click.option(
        "--steps", "num_steps", help="Number of sampling steps", metavar="INT", type=click.IntRange(min=1), default=18,
        show_default=True,
    ),
    click.option("--sigma_min", help="Lowest noise level  [default: varies]", metavar="FLOAT", type=_POSITIVE),
    click.option("--sigma_max", help="Highest noise level  [default: varies]", metavar="FLOAT", type=_POSITIVE),
    click.option("--rho", help="Time step exponent", metavar="FLOAT", type=_POSITIVE, default=7, show_default=True),
    click.option(
        "--S_churn", "S_churn", help="Stochasticity strength", metavar="FLOAT", type=click.FloatRange(min=0), default=0,
        show_default=True,
    ),
    click.option(
        "--S_min", "S_min", help="Stochasticity from this noise level", metavar="FLOAT", type=click.FloatRange(min=0),
        default=0, show_default=True,
    ),
    click.option(
        "--S_max", "S_max", help="Stochasticity up to this noise level", metavar="FLOAT", type=click.FloatRange(min=0),
        default="inf", show_default=True,
    ),
    click.option(
        "--S_noise", "S_noise", help="Inflation of the injected noise", metavar="FLOAT", type=float, default=1,
        show_default=True,
    ),
    _ablation("--solver", "solver", "Ablate ODE solver"),
    _ablation("--disc", "discretization", "Ablate time steps {t_i}"),
    _ablation("--schedule", "schedule", "Ablate noise schedule sigma(t)"),
    _ablation("--scaling", "scaling", "Ablate signal scaling s(t)"),
)  # fmt: skip
