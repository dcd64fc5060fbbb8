"""What a result was made with: the versions of Python, of the packages that decide numbers, and of this project."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("diffusion-memorization", "torch", "numpy", "scipy")


@functools.cache
def versions() -> dict[str, str]:
    """Name -> version, for people to read: Python, `PACKAGES`, the git commit where it is known, the platform.

    The commit ends in "-dirty" where tracked files differ from it.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if commit := _commit(Path(__file__).resolve().parent.parent):
        found["git commit"] = commit
    return found | {"platform": platform.platform()}


def _commit(root: Path) -> str | None:
    """Commit of the clone at `root`; None where `root` is none itself (an installed copy), or git is missing."""
    if not (root / ".git").exists():
        return None
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
