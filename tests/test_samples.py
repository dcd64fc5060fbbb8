"""Images that anybody's model has generated: their axes, numbers and files."""

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.datasets import load_digits

from memorization.measure.samples import Fit, Samples, image_layout, read_array, to_images

DIGITS = (load_digits().images * 15.9375).astype(np.uint8)[:, None]  # [1797, 1, 8, 8]
COLOUR = np.random.default_rng(0).integers(0, 256, [7, 3, 8, 8], dtype=np.uint8)


def folder(path, images, suffix=".png", **how):
    for i, image in enumerate(images):
        file = path / f"{i % 2}" / f"{i:03d}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(file, **how)
    return path


def sources(tmp_path, images):
    """The same images in every form that is read; of folders also the order of the names."""
    nhwc = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    np.save(tmp_path / "nchw.npy", images)
    np.save(tmp_path / "nhwc.npy", nhwc)
    np.savez(tmp_path / "adm.npz", nhwc)
    np.savez_compressed(tmp_path / "packed.npz", nhwc, np.arange(len(images)))
    np.savez(tmp_path / "named.npz", images=images, labels=np.zeros(len(images)))
    return [tmp_path / name for name in ("nchw.npy", "nhwc.npy", "adm.npz", "packed.npz", "named.npz")]


@pytest.mark.parametrize("images", [DIGITS[:9], COLOUR], ids=["gray", "colour"])
def test_every_form_holds_the_same_images(images, tmp_path):
    for path in sources(tmp_path, images):
        samples = Samples(path, images.shape[1:])
        assert len(samples) == len(images)
        assert (samples.images(range(len(images))) == images).all(), path
        assert (samples.images([5, 2]) == images[[5, 2]]).all(), path  # not in order
        assert (read_array(path) == images).all()
    order = sorted(range(len(images)), key=lambda i: (i % 2, i))
    for suffix in (".png", ".webp") if len(images[0]) == 3 else (".png",):  # WebP has no gray
        path = folder(tmp_path / suffix[1:], images, suffix, **({"lossless": True} if suffix == ".webp" else {}))
        samples = Samples(path, images.shape[1:])
        assert (samples.images(range(len(images))) == images[order]).all()


def test_batches_are_those_of_generated_images(tmp_path):
    np.save(tmp_path / "x.npy", DIGITS[:10])
    found = list(Samples(tmp_path / "x.npy", (1, 8, 8)).made([0, 3, 4, 9], 3))
    assert [rows for rows, _ in found] == [[0, 3, 4], [9]]
    assert (torch.cat([images for _, images in found]).numpy() == DIGITS[[0, 3, 4, 9]]).all()
    found = list(Samples(tmp_path / "x.npy", (1, 8, 8)).made(range(7), 3, ends=[2, 6]))
    assert [rows for rows, _ in found] == [[0, 1], [2, 3, 4], [5], [6]]
    with pytest.raises(ValueError, match="holds 10 images"):
        list(Samples(tmp_path / "x.npy", (1, 8, 8)).made([10], 3))


def test_what_was_done_to_the_training_images(tmp_path):
    big = np.random.default_rng(1).integers(0, 256, [3, 3, 20, 12], dtype=np.uint8)
    folder(tmp_path / "big", big)
    samples = Samples(tmp_path / "big", (1, 8, 8), Fit("center-crop", grayscale=True))
    crop = PIL.Image.fromarray(big[0].transpose(1, 2, 0)[4:16]).resize((8, 8), PIL.Image.Resampling.LANCZOS)
    assert (samples.images([0])[0, 0] == np.array(crop.convert("L"))).all()
    assert samples.fit.record() == {"resize": "center-crop", "grayscale": True}
    with pytest.raises(ValueError, match=r"12x20 with 3 channels, .* 8x8 with 1 channel; .*--resize.*--to-grayscale"):
        Samples(tmp_path / "big", (1, 8, 8))
    np.save(tmp_path / "big.npy", big)
    with pytest.raises(ValueError, match="12x20"):
        Samples(tmp_path / "big.npy", (1, 8, 8))
    fitted = Samples(tmp_path / "big.npy", (1, 8, 8), Fit("center-crop", grayscale=True))
    assert (fitted.images([0]) == samples.images([0])).all()


def test_floats_become_the_pixels_of_a_png():
    """Published: x * 127.5 + 128, clipped and cut."""
    x = np.linspace(-1, 1, 1001, dtype=np.float32).reshape(1, 1, 1, -1)
    published = (torch.from_numpy(x).double() * 127.5 + 128).clip(0, 255).to(torch.uint8).numpy()
    assert (to_images(x, value_range=(-1, 1), layout="NCHW") == published).all()
    assert (to_images(x / 2 + 0.5, value_range=(0, 1), layout="NCHW") == published).mean() > 0.99
    unit = np.arange(256).reshape(1, 1, 16, 16) / 255
    assert (to_images(unit, value_range=(0, 1)).ravel() == np.arange(256)).all()


@pytest.mark.parametrize(
    "array, how, message",
    [
        (np.zeros([4, 8, 8, 5], np.uint8), {}, "transpose"),
        (np.zeros([4, 3, 8, 3], np.uint8), {}, "layout"),
        (np.zeros([4, 64], np.uint8), {}, "transpose"),
        (np.zeros([4, 1, 8, 8], np.float32), {}, "value_range"),
        (np.full([4, 1, 8, 8], 7.0), {"value_range": (-1, 1)}, "outside the range"),
        (np.full([4, 1, 8, 8], np.nan), {"value_range": (-1, 1)}, "NaN"),
        (np.zeros([4, 1, 8, 8]), {"value_range": (1, 1)}, "none"),
        (np.zeros([4, 1, 8, 8], np.int64), {}, "int64"),
        (np.zeros([4, 1, 8, 8], np.uint8), {"layout": "CHWN"}, "layout"),
    ],
)
def test_arrays_that_are_no_images(array, how, message):
    with pytest.raises(ValueError, match=message):
        to_images(array, **how)


def test_layout_by_the_reference():
    assert image_layout((5, 3, 8, 3), like=(3, 8, 3)) == "NCHW"
    assert image_layout((5, 3, 3, 1), like=(1, 3, 3)) == "NHWC"
    assert image_layout((5, 8, 8)) == "NHW"


def test_files_that_hold_no_images(tmp_path):
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "none.npy", np.zeros([0, 1, 8, 8], np.uint8))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "many.npz", a=DIGITS[:2], b=DIGITS[:2])
    np.savez_compressed(tmp_path / "objects.npz", np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "text.npy").write_text("no array")
    for name in ("empty", "none.npy", "objects.npy", "many.npz", "objects.npz", "text.npz", "text.npy", "nothing.npy"):
        with pytest.raises((ValueError, OSError)) as err:
            Samples(tmp_path / name, (1, 8, 8))
        assert name in str(err.value) and "\n" not in str(err.value), name


def test_mixed_sizes(tmp_path):
    folder(tmp_path / "mixed", DIGITS[:4])
    PIL.Image.new("L", (9, 9)).save(tmp_path / "mixed" / "odd.png")
    samples = Samples(tmp_path / "mixed", (1, 8, 8))
    with pytest.raises(ValueError, match='"odd.png" in .* is 9x9'):
        samples.images(range(5))
