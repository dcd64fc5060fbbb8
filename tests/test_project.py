"""The project's own files agree with each other."""

import importlib.util
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

import diffmem

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
    suffixes = (".py", ".csv", ".css", ".j2", ".js")
    files = (path for folder in PACKAGES for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    modules = {path.relative_to(ROOT) for path in files}
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


PAGES = [ROOT / "README.md", ROOT / "scripts/README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_what_exists(page):
    """The files that are linked, the scripts that are run, and every option in a command."""
    text = page.read_text().replace("\\\n", " ")
    links = [link.partition("#") for link in re.findall(r"\]\(([\w./#-]+)\)", text)]
    assert not [path for path, _, _ in links if not (page.parent / path).exists()]
    for path, _, anchor in links:
        if anchor:
            heads = re.findall(r"^#+ (.*)$", (page.parent / path if path else page).read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]
    commands = re.findall(r"^ *(?:python|torchrun) .*$", text, flags=re.MULTILINE)
    for command in commands:
        match = re.search(r"\b([\w/]+)\.py\b(.*)", command)
        if match is None:
            assert "-m " in command
            continue
        main, rest = entry_point(match[1]), match[2].split(" -- ")[0]  # what follows is for another script
        if isinstance(main, click.Group):
            main = main.commands[rest.split()[0]]
        known = {option for parameter in main.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for option in re.findall(r"(?<=\s)(--[\w-]+)", rest):
            assert option in known, f"{match[1]}.py has no {option}: {command}"
    for script in re.findall(r"^(?:\w+=\S+ |\w+=\"[^\"]*\" )*(?:bash )?(scripts/[\w/]+\.sh)", text, flags=re.MULTILINE):
        assert (ROOT / script).exists()


def entry_point(script):
    """The click command of a script, by its path without the suffix."""
    spec = importlib.util.spec_from_file_location(script.replace("/", "_"), ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_every_page_is_in_the_index():
    listed = re.findall(r"^\| \[([\w-]+\.md)\]", (ROOT / "docs/README.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")


def test_the_public_names_are_documented():
    text = (ROOT / "docs/python.md").read_text()
    assert not [name for name in diffmem.__all__ if f"`{name}" not in text]


@pytest.mark.filterwarnings("ignore:Every image is a training image")
@pytest.mark.parametrize(
    ("page", "dataset", "images"),
    [("README.md", "datasets/digits-32.zip", "out"), ("docs/python.md", "train", "samples")],
)
def test_the_first_example_in_python_runs(page, dataset, images, run_cli, tmp_path, monkeypatch, capsys):
    """With 32 digits as training images, and 10 copies of them as samples."""
    import dataset_tool
    import generate_optim

    monkeypatch.chdir(tmp_path)
    run_cli(dataset_tool.main, ["--source=digits", f"--dest={dataset}", "--max-images=32"])
    run_cli(generate_optim.main, [f"--network={dataset}", f"--outdir={images}", "--seeds=0-9", "--device=cpu"])
    example = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)[0]
    capsys.readouterr()
    exec(compile(example, page, "exec"), {})
    assert capsys.readouterr().out.startswith("R_mem 100.0 % ")
    assert os.path.getsize("grid.png") > 1000


def test_benchmarks_find_each_other_wherever_they_are_started():
    for path in (ROOT / "benchmarks").glob("*.py"):
        text = path.read_text()
        if "from benchmarks." in text:
            assert text.index("sys.path.insert(0, ") < text.index("from benchmarks."), path.name
