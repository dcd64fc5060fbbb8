"""How the project is installed: a wheel holds one package, `diffmem`, and a checkout stays as it is.

In a checkout the packages `training`, `memorization`, ... lie side by side, and the scripts beside them. Installed
under these names they would collide with other people's code. So a wheel holds them as `diffmem.training`, ..., and
the scripts as `diffmem.commands.train`, ...; the imports among them are rewritten on the way. An editable install
(`pip install -e .`) only puts the checkout on the path.
"""

import re
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

PACKAGES = ["dataset_utils", "dnnlib", "memorization", "torch_utils", "toy", "training"]
SCRIPTS = ["dataset_tool", "emm", "generate", "generate_optim", "mem_ratio", "outlier_study", "train"]
NEW_NAMES = {name: f"diffmem.{name}" for name in PACKAGES} | {name: f"diffmem.commands.{name}" for name in SCRIPTS}
IMPORT = re.compile(rf"^(\s*)(from|import) ({'|'.join(sorted(NEW_NAMES, key=len, reverse=True))})\b", re.MULTILINE)


def inside(source: str, path: Path) -> str:
    """The source text of a module with imports of the names that it has in the wheel."""

    def rename(match: re.Match) -> str:
        if match[2] == "from":
            return f"{match[1]}from {NEW_NAMES[match[3]]}"
        if match[3] in SCRIPTS:
            return f"{match[1]}from diffmem.commands import {match[3]}"
        # `import a.b` binds the name a, which the code then uses
        raise ValueError(f"{path}: write `from {match[3]} import ...`, which can be rewritten for the wheel.")

    return IMPORT.sub(rename, source)


class BuildInside(build_py):
    """Copy the packages and the scripts to their places below `diffmem`."""

    def run(self) -> None:
        root = Path(self.build_lib, "diffmem")
        shutil.rmtree(root, ignore_errors=True)  # of an earlier build
        super().run()
        commands = root / "commands"
        commands.mkdir(parents=True, exist_ok=True)
        (commands / "__init__.py").write_text('"""The command-line programs; see `diffmem.cli`."""\n', encoding="utf-8")
        for name in SCRIPTS:
            shutil.copy(f"{name}.py", commands / f"{name}.py")
        for path in root.rglob("*.py"):
            path.write_text(inside(path.read_text(encoding="utf-8"), path), encoding="utf-8")


if "editable_wheel" in sys.argv:
    packages = find_packages(include=[f"{name}*" for name in [*PACKAGES, "diffmem"]])
    setup(packages=packages, py_modules=SCRIPTS)
else:
    packages = ["diffmem"] + [f"diffmem.{name}" for name in find_packages(include=[f"{name}*" for name in PACKAGES])]
    places = {name: name.removeprefix("diffmem.").replace(".", "/") for name in packages}
    setup(packages=packages, package_dir=places, cmdclass={"build_py": BuildInside})
