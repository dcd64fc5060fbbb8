"""The project's own files agree with each other."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

import click
import pytest
from conftest import ROOT

PACKAGES = ("dataset_utils", "dnnlib", "memorization", "torch_utils", "toy", "training")
CONDA_NAMES = {"torch": "pytorch", "lmdb": "python-lmdb"}


def requirements():
    """name -> lower bound, of pyproject.toml's dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return dict(text.split(">=") for text in project["dependencies"]), project


def test_environment_yml_equals_pyproject():
    wanted, project = requirements()
    listed = re.findall(r"^  - ([\w-]+)(?:(>=[\d.]+))?$", (ROOT / "environment.yml").read_text(), flags=re.MULTILINE)
    listed = {name: bound.removeprefix(">=") for name, bound in listed}
    assert listed.pop("python") == project["requires-python"].removeprefix(">=")
    listed.pop("pip"), listed.pop("conda-forge")
    assert listed == {CONDA_NAMES.get(name, name): bound for name, bound in wanted.items()}


def test_constraints_pin_every_dependency():
    wanted, project = requirements()
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    names = list(wanted) + [text.split(">=")[0] for text in project["optional-dependencies"]["test"]]
    assert set(names) == set(pins)

    def version(text):
        return [int(part) for part in text.split(".")]

    assert all(version(pins[name]) >= version(bound) for name, bound in wanted.items())


EXAMPLE = """
import numpy as np, sys
import diffmem

assert "training" not in sys.modules and "site-packages" in diffmem.__file__, diffmem.__file__
train = np.random.default_rng(0).integers(0, 256, [40, 1, 8, 8], dtype=np.uint8)
images = diffmem.sample(diffmem.Optimum(train), range(5))
result = diffmem.measure(images, train)
assert result.ratio == 1, result
assert not {"training", "toy", "dnnlib"} & set(sys.modules)
"""


@pytest.mark.slow
def test_wheel_holds_one_name(tmp_path):
    """Built, installed in a fresh environment and used from another folder: only `diffmem` is there."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "build", "docs", "tests", "__pycache__", "demo-out")
    shutil.copytree(ROOT, source, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source], check=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"diffmem", "diffusion_memorization"}
    modules = {path.relative_to(ROOT) for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")}
    assert {f"diffmem/{path.as_posix()}" for path in modules} <= set(names)

    venv.create(tmp_path / "venv", with_pip=False)
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    python = tmp_path / "venv" / "bin" / "python"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([python, "-c", EXAMPLE], check=True, cwd=tmp_path, env=env)
    for command in ("measure", "train"):
        help = [python, "-m", "diffmem.cli", command, "--help"]
        out = subprocess.run(help, check=True, cwd=tmp_path, env=env, capture_output=True, text=True).stdout
        assert out.startswith(f"Usage: python -m diffmem.cli {command}")


def test_the_command_has_every_script():
    from diffmem.cli import main

    context = click.Context(main)
    scripts = {main.get_command(context, name).callback.__module__ for name in main.list_commands(context)}
    assert scripts == {path.stem for path in ROOT.glob("*.py")} - {"setup"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["train", "generate", "generate_optim", "mem_ratio", "dataset_tool", "emm", "outlier_study"]
)
def test_help_from_any_folder(script, tmp_path):
    """After pip install -e, a script runs by its path."""
    command = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert out.startswith("Usage: ") and "Options:" in out


def test_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    linked = re.findall(r"\]\(([\w./-]+)\)", text)
    assert linked and not [path for path in linked if not (ROOT / path).exists()]
    run = re.findall(r"(?:python|torchrun[^\n]*?|bash) ([\w/]+\.(?:py|sh))", text)
    assert run and not [path for path in run if not (ROOT / path).exists()]


@pytest.mark.slow
def test_readme_options_exist():
    """Every option in a README command is one that its script has."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    helps: dict[tuple[str, ...], str] = {}
    for command in re.findall(r"^(?:python|torchrun) .*$", text, flags=re.MULTILINE):
        match = re.search(r"\b([\w/]+)\.py\b(.*)", command)
        script, rest = match[1], match[2].split(" -- ")[0]  # what follows is for another script
        commands = ("curve", "trajectory", "collapse", "report", "search", "moons")
        words = (script, *(w for w in rest.split()[:1] if w in commands))
        if words not in helps:
            help = [sys.executable, str(ROOT / f"{script}.py"), *words[1:], "--help"]
            helps[words] = subprocess.run(help, capture_output=True, text=True, check=True).stdout
        known = helps[words]
        for option in re.findall(r"(?<=\s)(--[\w-]+)", rest):
            assert option in known, f"{script}.py has no {option}: {command}"
