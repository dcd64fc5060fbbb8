"""The project's own files agree with each other."""

import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

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


def test_all_packages_are_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["packages"]) == {p.parent.name for p in ROOT.glob("*/__init__.py")}


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
