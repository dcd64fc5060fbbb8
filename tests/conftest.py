"""What the tests share: datasets made on the spot, and command lines run in this process."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent

# Networks this small gain nothing from threads and lose much when the suite runs in parallel.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


def png(image):
    """Encode uint8 [H, W] or [H, W, C] as PNG, by PIL alone."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.asarray(image)).save(buffer, format="png")
    return buffer.getvalue()


def pytest_collection_modifyitems(items):
    """Those that start processes come first, so that several workers end at the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def make_zip():
    """make_zip(images, labels, path): write a dataset zip without this project's writer; return the path.

    images: uint8 [N, H, W] or [N, H, W, 3], or a list of such images, or of bytes to be stored as they are;
    labels: one per image, None for null, "missing" for no dataset.json, bytes for its content.
    """

    def make(images, labels, path):
        with zipfile.ZipFile(path, "w") as archive:
            names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
            for name, image in zip(names, images):
                archive.writestr(name, image if isinstance(image, bytes) else png(image))
            if isinstance(labels, bytes):
                archive.writestr("dataset.json", labels)
            elif not isinstance(labels, str):
                if labels is not None:
                    labels = np.asarray(labels).tolist() if isinstance(labels, np.ndarray) else list(labels)
                    labels = [[name, label] for name, label in zip(names, labels)]
                archive.writestr("dataset.json", json.dumps({"labels": labels}))
        return str(path)

    return make


@pytest.fixture(scope="session")
def digits_zip(tmp_path_factory):
    """All 1797 digits, 8x8 gray with labels, written by dataset_tool.py."""
    import dataset_tool

    path = tmp_path_factory.mktemp("digits") / "digits.zip"
    result = CliRunner().invoke(dataset_tool.main, ["--source=digits", f"--dest={path}"])
    assert result.exit_code == 0, result.output
    return str(path)


@pytest.fixture(scope="session")
def digits(digits_zip):
    """The same as uint8 [1797, 1, 8, 8]."""
    from training.dataset import ImageFolderDataset

    return ImageFolderDataset(digits_zip).images()


@pytest.fixture
def run_cli():
    """run_cli(main, args, code=0): run a click command here; check its exit code; return the result.

    After a failure exactly one line begins with "Error:", it is the last one, and there is no traceback.
    """

    def run(main, args, code=0):
        result = CliRunner().invoke(main, [str(arg) for arg in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        if code:
            lines = result.stderr.strip().splitlines()
            assert lines[-1].startswith("Error: "), result.stderr
            assert sum(line.startswith("Error: ") for line in lines) == 1
            assert len(lines) == 1 or lines[0].startswith("Usage: ")
            assert "Traceback" not in result.output
        return result

    return run
