"""Command-line options that the sampling tools share."""

from collections.abc import Callable

import click

from dnnlib.cli import Float, IntList
from training.precision import PRECISIONS
from training.samplers import ABLATIONS

_POSITIVE = Float(min=0, min_open=True)


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
        help="One image per seed, for example 0-63 or 1,2,5-10",
        metavar="LIST",
        type=IntList(max=(1 << 32) - 1),  # beyond, they begin anew: the generators take 32 bits
        default=default,
        show_default=True,
    )


subdirs_option = click.option("--subdirs", help="Put every 1000 seeds into a folder of their own", is_flag=True)
class_option = click.option(
    "--class",
    "class_idx",
    help="Class of all images  [default: one per seed]",
    metavar="INT",
    type=click.IntRange(min=0),
)
all_classes_option = click.option(
    "--all-classes", help="Draw also classes of which training saw no image, as published", is_flag=True
)
batch_option = click.option(
    "--batch",
    help="Images at a time per process",
    metavar="INT",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
)

# --precision, --compile; they arrive as `precision` (None where not given) and `compile`.
precision_options = _all(
    click.option(
        "--precision",
        help="In which the network computes (tf32, fp16: CUDA only)  [default: fp32, or as --fp16=1 was trained]",
        metavar="|".join(PRECISIONS), type=click.Choice(PRECISIONS),
    ),
    click.option("--compile", help="Compile the network (torch.compile): minutes at first, then faster", is_flag=True),
)  # fmt: skip

# --steps ... --scaling; they arrive as keyword arguments of the samplers, None where not given.
sampler_options = _all(
    click.option(
        "--steps", "num_steps", help="Steps of the sampler", metavar="INT", type=click.IntRange(min=1), default=18,
        show_default=True,
    ),
    click.option(
        "--sigma_min", help="Noise level of the last step before 0  [default: by --disc]", metavar="FLOAT",
        type=_POSITIVE,
    ),
    click.option(
        "--sigma_max", help="Noise level of the first step  [default: by --disc]", metavar="FLOAT", type=_POSITIVE
    ),
    click.option(
        "--rho", help="The larger, the more steps at low noise", metavar="FLOAT", type=_POSITIVE, default=7,
        show_default=True,
    ),
    click.option(
        "--S_churn", "S_churn", help="Noise injected on the way, 0 = none", metavar="FLOAT", type=Float(min=0),
        default=0, show_default=True,
    ),
    click.option(
        "--S_min", "S_min", help="Inject noise from this noise level", metavar="FLOAT", type=Float(min=0),
        default=0, show_default=True,
    ),
    click.option(
        "--S_max", "S_max", help="Inject noise up to this noise level", metavar="FLOAT",
        type=Float(min=0, infinite=True), default="inf", show_default=True,
    ),
    click.option(
        "--S_noise", "S_noise", help="Factor on the injected noise", metavar="FLOAT", type=Float(min=0), default=1,
        show_default=True,
    ),
    _ablation("--solver", "solver", "ODE solver  [default: heun]"),
    _ablation("--disc", "discretization", "Noise levels of the steps  [default: edm]"),
    _ablation("--schedule", "schedule", "Noise level as a function of time  [default: linear]"),
    _ablation("--scaling", "scaling", "Scale of the signal as a function of time  [default: none]"),
)  # fmt: skip
