"""The command `diffmem`: the scripts of the repository as subcommands, with the same options.

    diffmem train --outdir=training-runs --data=digits.zip ...      is      python train.py --outdir=...

Several processes: `torchrun ... -m diffmem.cli train ...`.
"""

from importlib.metadata import PackageNotFoundError, version

import click

from diffmem import _checkout  # noqa: F401  first: it makes the packages of a checkout importable

COMMANDS = {
    "dataset": "Make a dataset zip of images",
    "train": "Train a diffusion model",
    "generate": "Generate images with a network snapshot",
    "optimum": "Generate images with the closed-form optimum of a dataset",
    "measure": "Measure the memorization ratio of a run, of images, or of an optimum",
    "emm": "Curves over |D|, EMM, search, report",
    "outliers": "Which training images are memorized first, which last",
}


class _Scripts(click.Group):
    """Loads a script when its subcommand is called: torch takes seconds."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name == "dataset":
            from dataset_tool import main
        elif name == "train":
            from train import main
        elif name == "generate":
            from generate import main
        elif name == "optimum":
            from generate_optim import main
        elif name == "measure":
            from mem_ratio import main
        elif name == "emm":
            from emm import main
        elif name == "outliers":
            from outlier_study import main
        else:
            return None
        return main

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _version() -> str:
    try:
        return version("diffusion-memorization")
    except PackageNotFoundError:
        return "unknown"


@click.group(cls=_Scripts, context_settings=dict(max_content_width=120))
@click.version_option(_version(), prog_name="diffmem")
def main() -> None:
    """Measure memorization in diffusion models. Each command has its own --help."""


if __name__ == "__main__":
    main()
