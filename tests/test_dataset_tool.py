"""dataset_tool.py: sources, transforms and the written dataset, against published results and real data."""

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import PIL.Image
import pytest
from conftest import ROOT, png

import dataset_tool
from dataset_utils.archive import archive_name, open_archive
from dataset_utils.convert import write_dataset
from dataset_utils.sources import concatenate, open_source
from dataset_utils.transforms import center_crop, center_crop_wide, make_transform, scale
from dnnlib.images import decode_image

FASHION = Path("/usr/share/datasets/fashion-mnist")
REFERENCE = np.load(ROOT / "tests/reference/dataset_tool.npz")


def random_images(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def write_folder(folder, files):
    """Write {relative name: image or bytes}."""
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else png(content))
    return folder


def read_dataset(path):
    """Read a dataset zip or folder without this project: {name: image}, content of dataset.json."""
    if Path(path).is_dir():
        files = {str(p.relative_to(path)): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}
    else:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
            files = {name: archive.read(name) for name in archive.namelist()}
    metadata = json.loads(files.pop("dataset.json"))
    metadata.pop("conversion", None)  # what the published tool does not write; see test_other_files.py
    return {name: np.array(PIL.Image.open(io.BytesIO(files[name]))) for name in sorted(files)}, metadata


def cifar_tar(path, batches, folder="cifar-10-batches-py"):
    """Write {member name: pickle bytes} as cifar-10-python.tar.gz."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in batches.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def python2_pickle(images, labels):
    """The bytes that Python 2 and numpy 1 write for {"data": uint8 [n, 3072], "labels": list}, protocol 2."""
    n, data = len(images), images.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01K" + bytes([n]) + b"M\x00\x0c\x86" + dtype + b"\x89T" + struct.pack("<i", len(data)) + data
    values = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + state + b"tbU\x06labels" + values + b"u."


def batch(n=3, seed=0, **changes):
    images = random_images(n, 3072, seed=seed)
    return {"data": images, "labels": [i % 10 for i in range(n)], **changes}


def idx(array, magic=None):
    header = struct.pack(">i", 0x0800 + array.ndim if magic is None else magic)
    return gzip.compress(header + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes())


def write_mnist(folder, images, labels, prefix="train"):
    Path(folder).mkdir(exist_ok=True)
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(np.asarray(labels, dtype=np.uint8)))
    path = folder / f"{prefix}-images-idx3-ubyte.gz"
    path.write_bytes(idx(images))
    return path


# ----------------------------------------------------------------------------
# Against the published tool.


@pytest.fixture
def reference_folder(tmp_path):
    files = {key.removeprefix("in/"): REFERENCE[key] for key in REFERENCE if key.startswith("in/")}
    return write_folder(tmp_path / "in", files)


@pytest.mark.parametrize(
    "case, options",
    [
        ("resize", ["--resolution=16x16"]),
        ("crop", ["--transform=center-crop", "--resolution=16x16"]),
        ("wide", ["--transform=center-crop-wide", "--resolution=16x12"]),
        ("max2", ["--resolution=16x16", "--max-images=2"]),
    ],
)
@pytest.mark.parametrize("dest", ["out.zip", "out", "new/sub/out.zip"])
@pytest.mark.parametrize("workers", [1, 3])
def test_published_tool(run_cli, tmp_path, reference_folder, case, options, dest, workers):
    dest = tmp_path / dest
    result = run_cli(
        dataset_tool.main,
        [f"--source={reference_folder}", f"--dest={dest}", f"--workers={workers}", *options],
    )
    images, metadata = read_dataset(dest)
    names = REFERENCE[f"{case}/names"].tolist()
    assert list(images) == names
    np.testing.assert_array_equal(np.stack(list(images.values())), REFERENCE[f"{case}/images"])
    assert metadata == {"labels": json.loads(str(REFERENCE[f"{case}/labels"]))}
    summary = result.stdout.strip()
    assert summary.startswith(f"Wrote {len(names)} images, 16x16, 3 channels, labels 0 to ")
    assert ("1 too small and dropped" in summary) == (case == "wide")


def test_same_input_same_bytes(run_cli, tmp_path, digits_zip):
    for name, workers in [("a.zip", 1), ("b.zip", 4)]:
        run_cli(dataset_tool.main, ["--source=digits", f"--dest={tmp_path / name}", f"--workers={workers}"])
        assert (tmp_path / name).read_bytes() == Path(digits_zip).read_bytes()


def test_pngs_are_not_compressed(run_cli, tmp_path):
    source = write_folder(tmp_path / "in", {"0.png": np.zeros([64, 64], dtype=np.uint8)})
    run_cli(dataset_tool.main, [f"--source={source}", f"--dest={tmp_path / 'out'}"])
    assert (tmp_path / "out/00000/img00000000.png").stat().st_size > 64 * 64


# ----------------------------------------------------------------------------
# Sources.


def test_digits(digits_zip):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, metadata = read_dataset(digits_zip)
    assert len(images) == 1797
    expected = [[[round(v * 255 / 16) for v in row] for row in image] for image in digits.images.tolist()]
    np.testing.assert_array_equal(np.stack(list(images.values())), np.array(expected))
    assert metadata["labels"] == [[archive_name(i), int(y)] for i, y in enumerate(digits.target)]


@pytest.mark.skipif(not FASHION.is_dir(), reason=f"Fashion-MNIST is not at {FASHION}")
def test_fashion_mnist(run_cli, tmp_path):
    dest = tmp_path / "fashion.zip"
    run_cli(
        dataset_tool.main,
        [f"--source={FASHION / 't10k-images-idx3-ubyte.gz'}", f"--dest={dest}", "--max-images=300"],
    )
    images, metadata = read_dataset(dest)
    raw = np.frombuffer(gzip.decompress((FASHION / "t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    raw = raw.reshape(-1, 28, 28)[:300]
    stored = np.stack(list(images.values()))
    assert stored.shape == (300, 32, 32)
    np.testing.assert_array_equal(stored[:, 2:-2, 2:-2], raw)
    assert stored.sum(dtype=int) == raw.sum(dtype=int)  # the margin is black
    labels = gzip.decompress((FASHION / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:308]
    assert [label for _, label in metadata["labels"]] == list(labels)


@pytest.mark.parametrize("size", [28, 16])
def test_mnist_padding(tmp_path, size):
    images = random_images(5, size, size)
    path = write_mnist(tmp_path, images, [3, 1, 4, 1, 5], prefix="kmnist")
    source = open_source(path, max_images=4)
    assert (len(source), source.labels) == (4, [3, 1, 4, 1])
    margin = 2 if size == 28 else 0
    np.testing.assert_array_equal(source.read(3), np.pad(images[3], margin))


@pytest.mark.parametrize("protocol", ["python2", 2, 4, 5])
def test_cifar10(tmp_path, protocol):
    batches = {f"data_batch_{i}": batch(n, seed=i) for i, n in [(5, 2), (1, 3), (2, 1)]}  # 3, 4 are missing

    def dump(content):
        if protocol == "python2":
            return python2_pickle(content["data"], content["labels"])
        return pickle.dumps(content, protocol=protocol)

    files = {name: dump(content) for name, content in batches.items()}
    files |= {"test_batch": b"not read", "batches.meta": b"not read"}
    source = open_source(cifar_tar(tmp_path / "cifar-10-python.tar.gz", files))
    assert source.labels == [0, 1, 2, 0, 0, 1]
    expected = np.concatenate([batches[f"data_batch_{i}"]["data"] for i in (1, 2, 5)])
    expected = expected.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(np.stack([image for image, _ in source]), expected)


def test_cifar10_other_spellings(tmp_path):
    """Byte keys, label arrays, labels as numpy scalars, Fortran order, big-endian labels, no images at all."""
    images = np.asfortranarray(random_images(2, 3072))
    contents = [
        {b"data": images, b"labels": np.array([4, 5], dtype=">i2")},
        {"data": images, "labels": [np.int64(6), np.uint8(7)]},
        {"data": images[:0], "labels": []},
    ]
    files = {f"data_batch_{i + 1}": pickle.dumps(content) for i, content in enumerate(contents)}
    source = open_source(cifar_tar(tmp_path / "small.tar.gz", files, folder="."))
    assert source.labels == [4, 5, 6, 7]
    np.testing.assert_array_equal(source.read(3).transpose(2, 0, 1).ravel(), images[1])


class _Call:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "content, words",
    [
        (_Call(os.system, "touch {}/harm"), "system"),
        (_Call(eval, "open('{}/harm', 'w')"), "eval"),
        (_Call(np.load, "{}/harm"), "numpy"),
        (_Call(getattr, np, "load"), "getattr"),
        (_Call(np.dtype, "O"), "numbers"),
        (batch(data=np.array([{}, []], dtype=object)), "numbers"),
        (batch(data=np.zeros([3, 3072], dtype=np.float32)), "uint8"),
        (batch(data=np.zeros([3, 3072], dtype=np.int16)), "uint8"),
        (batch(data=np.zeros([3, 3071], dtype=np.uint8)), "[n, 3072]"),
        (batch(data=np.uint8(3)), "[n, 3072]"),
        (batch(data=_Call(np.ndarray, (3, 3072), "u1")), "no CIFAR-10 batch"),
        (batch(labels=[0, 1]), "3 images but 2 labels"),
        (batch(labels=[0, 1, 10]), "0 to 9"),
        (batch(labels=[0, 1, True]), "0 to 9"),
        (batch(labels="012"), "0 to 9"),
        ({"data": 1}, "labels"),
        ([1, 2], "labels"),
    ],
)
def test_cifar10_refuses(tmp_path, content, words):
    if isinstance(content, _Call):
        function, args = content.call
        content = _Call(function, *(a.format(tmp_path) if isinstance(a, str) else a for a in args))
    try:
        data = pickle.dumps(content)
    except TypeError:  # modules do not pickle by value
        data = b"cbuiltins\ngetattr\n(cnumpy\n__name__\nU\x04loadtR."
    path = cifar_tar(tmp_path / "cifar-10-python.tar.gz", {"data_batch_1": data})
    with pytest.raises(ValueError, match="data_batch_1") as caught:
        open_source(path)
    assert words in str(caught.value)
    assert os.listdir(tmp_path) == [path.name]


def test_cifar10_refuses_to_copy_bytes_again_and_again(tmp_path):
    """A row of bytes that stands once in the pickle, and in many arrays."""
    row = random_images(1, 3072).tobytes()
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    new = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    array = new + b"(K\x01K\x01M\x00\x0c\x86" + dtype + b"\x89h\x00tb"
    data = b"\x80\x02](T" + struct.pack("<i", len(row)) + row + b"q\x00" + array * 100 + b"e."
    with pytest.raises(ValueError, match="too many arrays"):
        open_source(cifar_tar(tmp_path / "x.tar.gz", {"data_batch_1": data}))


def test_cifar10_refuses_damaged_pickles(tmp_path):
    """Every way of cutting or changing a pickle ends in a ValueError or in arrays, never in another error."""
    good = python2_pickle(random_images(1, 3072), [1])
    random = np.random.RandomState(0)
    head = [i for i in range(len(good)) if not 150 < i < len(good) - 30]
    for trial in range(300):
        data = bytearray(good)
        for _ in range(random.randint(1, 4)):
            data[random.choice(head)] = random.randint(256)
        path = cifar_tar(tmp_path / "x.tar.gz", {"data_batch_1": bytes(data[: None if trial % 4 else trial])})
        try:
            source = open_source(path)
        except ValueError:
            continue
        assert source.read(0).shape == (32, 32, 3)


def test_folder_labels(tmp_path):
    """Top-level folders in sorted order are classes; the order is folder by folder."""
    image = random_images(4, 4)
    names = ["b/x.png", "a/deep/er/2.JPG", "a/1.png", "a-c/0.PNG", "top.bmp"]
    files = {name: image for name in names} | {"a/notes.txt": b"no image", "a/.hidden.png": b"no image"}
    folder = write_folder(tmp_path / "in", files)
    source = open_source(folder)
    ordered = ["a/1.png", "a/deep/er/2.JPG", "a-c/0.PNG", "b/x.png", "top.bmp"]
    assert source.names == [f"{folder}/{name}" for name in ordered]
    assert source.labels == [1, 1, 2, 3, 0]
    assert open_source(write_folder(tmp_path / "one", {"a/0.png": image, "a/b/1.png": image})).labels is None


def test_labels_of_folder_and_zip_agree(tmp_path):
    image = random_images(4, 4)
    folder = write_folder(tmp_path / "in", {f"{c}/{i}.png": image for c in "xyz" for i in range(2)})
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, path.relative_to(folder))
    a, b = open_source(folder), open_source(tmp_path / "in.zip")
    assert [name.replace("/in/", "/in.zip/") for name in a.names] == b.names
    assert a.labels == b.labels == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("labels", [[3, 0, 7], [[0.5, 1.0], [0.0, -2.5], [1e-3, 0.1]]])
def test_json_labels(run_cli, tmp_path, make_zip, labels):
    source = make_zip(random_images(3, 8, 8), labels, tmp_path / "in.zip")
    run_cli(dataset_tool.main, [f"--source={source}", f"--dest={tmp_path / 'out'}"])
    assert [label for _, label in read_dataset(tmp_path / "out")[1]["labels"]] == labels


def test_incomplete_labels_are_dropped(run_cli, tmp_path):
    files = {f"{i}.png": random_images(8, 8) for i in range(3)}
    files["dataset.json"] = json.dumps({"labels": [["0.png", 4], ["1.png", 5]]}).encode()
    source = write_folder(tmp_path / "in", files)
    args = [f"--source={source}", f"--dest={tmp_path / 'all.zip'}"]
    assert "no labels (only 2 images have one)" in run_cli(dataset_tool.main, args).stdout
    assert read_dataset(tmp_path / "all.zip")[1] == {"labels": None}
    args = [f"--source={source}", f"--dest={tmp_path / 'two.zip'}", "--max-images=2"]
    assert "labels 0 to 5" in run_cli(dataset_tool.main, args).stdout
    with pytest.raises(ValueError, match="2.png.*has no label"):
        open_source(source).require_labels()


def test_labels_null_stay_null(run_cli, tmp_path, make_zip):
    """A dataset without labels does not get its storage folders 00000, 00001 as classes."""
    source = make_zip(random_images(1001, 2, 2), None, tmp_path / "in.zip")
    run_cli(dataset_tool.main, [f"--source={source}", f"--dest={tmp_path / 'folder'}"])
    run_cli(dataset_tool.main, [f"--source={tmp_path / 'folder'}", f"--dest={tmp_path / 'again.zip'}"])
    images, metadata = read_dataset(tmp_path / "again.zip")
    assert (len(images), metadata) == (1001, {"labels": None})


def test_list_file(run_cli, tmp_path):
    images = random_images(3, 8, 8, 3)
    write_folder(tmp_path, {"data/a.png": images[0], "b.png": images[1], "data/c.png": images[2]})
    (tmp_path / "lists").mkdir()
    list_file = tmp_path / "lists/dog.txt"
    list_file.write_text(f"../data/c.png\n\n{tmp_path / 'b.png'}\r\n../data/a.png\n")
    run_cli(dataset_tool.main, [f"--source={list_file}", f"--dest={tmp_path / 'out.zip'}"])
    stored, metadata = read_dataset(tmp_path / "out.zip")
    np.testing.assert_array_equal(np.stack(list(stored.values())), images[[2, 1, 0]])
    assert metadata == {"labels": None}


def test_lmdb(run_cli, tmp_path):
    images = random_images(12, 8, 8, 3)
    with lmdb.open(str(tmp_path / "cat_lmdb")) as environment, environment.begin(write=True) as transaction:
        for i in np.random.RandomState(0).permutation(12):
            data = png(images[i, :, :, 0] if i == 4 else images[i])
            transaction.put(b"%040d" % i, data)
    images[4] = images[4, :, :, :1]  # gray becomes RGB
    for workers in (1, 4):
        dest = tmp_path / f"{workers}.zip"
        run_cli(
            dataset_tool.main,
            [f"--source={tmp_path}/cat_lmdb/", f"--dest={dest}", "--max-images=10", f"--workers={workers}"],
        )
        np.testing.assert_array_equal(np.stack(list(read_dataset(dest)[0].values())), images[:10])


def test_select_and_concatenate(tmp_path):
    digits = open_source("digits")
    some = digits.select([5, 3, 8])
    assert some.labels == [digits.labels[i] for i in (5, 3, 8)]
    np.testing.assert_array_equal(some.read(2), digits.read(8))
    other = digits.select(np.array([0]), labels=[77])
    both = concatenate([some, other])
    assert both.labels == [*some.labels, 77]
    write_dataset(both, tmp_path / "both.zip", metadata={"groups": [1, 1, 1, 2]})
    images, metadata = read_dataset(tmp_path / "both.zip")
    np.testing.assert_array_equal(list(images.values())[3], digits.read(0))
    assert metadata["groups"] == [1, 1, 1, 2]
    assert [label for _, label in metadata["labels"]] == both.labels


# ----------------------------------------------------------------------------
# Decoder and transforms.


def encode(image, form="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_modes():
    rgb = PIL.Image.fromarray(random_images(8, 8, 3) // 64 * 64)
    for image, expected in [
        (rgb, rgb),
        (rgb.convert("L"), rgb.convert("L")),
        (rgb.convert("1"), rgb.convert("1").convert("L")),
        (rgb.quantize(16), rgb.quantize(16).convert("RGB")),
    ]:
        decoded = decode_image(encode(image), "x.png")
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, np.array(expected))
    cmyk = decode_image(encode(rgb.convert("CMYK"), "tiff"), "x.tiff")
    np.testing.assert_array_equal(cmyk, np.array(rgb.convert("CMYK").convert("RGB")))
    assert decode_image(encode(rgb.convert("CMYK"), "jpeg"), "x.jpg").shape == (8, 8, 3)


def test_transform_shapes():
    gray = random_images(20, 30)
    assert scale(gray, 8, 4).shape == (4, 8)
    assert scale(gray, 30, 20) is gray
    np.testing.assert_array_equal(center_crop(gray, 20), np.repeat(gray[:, 5:25, np.newaxis], 3, axis=2))
    wide = center_crop_wide(gray, 16, 8)
    assert wide.shape == (16, 16, 3)
    assert wide[:4].max() == wide[12:].max() == 0 < wide[4:12].min(axis=(1, 2)).max()
    assert center_crop_wide(gray, 32, 8) is None
    assert center_crop_wide(gray, 16, 16) is None
    assert make_transform()(gray) is gray


# ----------------------------------------------------------------------------
# What a user can get wrong. Every case: one line with the key words, exit code, nothing written.

SMALL = np.zeros([8, 8], dtype=np.uint8)
COLOUR = PIL.Image.fromarray(random_images(8, 8, 3))
IMAGE16 = PIL.Image.fromarray(np.full([8, 8], 3000, dtype=np.uint16))


def png16_rgb():
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(12)) * 2)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png_bomb():
    data = bytearray(png(SMALL))
    data[16:24] = struct.pack(">II", 60000, 60000)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def frames(form):
    return encode(COLOUR, form, save_all=True, append_images=[COLOUR.rotate(90)])


def damaged_png():
    return png(random_images(32, 32))[:-200]


def transparent(mode):
    image = COLOUR.convert(mode)
    image.putalpha(PIL.Image.fromarray(np.where(np.arange(64).reshape(8, 8) == 63, 254, 255).astype(np.uint8)))
    return image


FOLDERS = {
    "no images": ({"readme.md": b"text"}, [], "holds no images"),
    "not square": ({"0.png": np.zeros([8, 4], dtype=np.uint8)}, [], "4x8 --resolution"),
    "no power of two": ({"a/0.png": np.zeros([24, 24, 3], dtype=np.uint8)}, [], "a/0.png 24x24 --resolution"),
    "sizes": ({"0.png": SMALL, "c/1.png": SMALL[:4, :4]}, [], "c/1.png 4x4 gray 8x8 gray --resolution"),
    "channels": ({"0.png": SMALL, "1.png": encode(COLOUR)}, [], "1.png RGB gray"),
    "alpha": ({"0.png": encode(transparent("RGBA"))}, [], "0.png transparency"),
    "gray alpha": ({"0.png": encode(transparent("LA"))}, [], "0.png transparency"),
    "palette alpha": ({"0.png": encode(COLOUR.quantize(4), transparency=1)}, [], "0.png transparency"),
    "16 bit": ({"0.png": encode(IMAGE16)}, [], "0.png 8 bits"),
    "16 bit tiff": ({"0.tif": encode(IMAGE16, "tiff")}, [], "0.tif 8 bits"),
    "16 bit RGB": ({"0.png": png16_rgb()}, [], "0.png 8 bits"),
    "float": ({"0.tiff": encode(COLOUR.convert("F"), "tiff")}, [], "0.tiff 8 bits"),
    "mode": ({"0.tiff": encode(COLOUR.convert("LAB"), "tiff")}, [], "0.tiff LAB"),
    "animated gif": ({"0.gif": frames("gif")}, [], "0.gif 2 frames"),
    "animated png": ({"0.png": frames("png")}, [], "0.png 2 frames"),
    "text as png": ({"0.png": b"not an image"}, [], "0.png not an image"),
    "empty png": ({"0.png": b""}, [], "0.png not an image"),
    "eps as png": ({"0.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"}, [], "not an image"),
    "damaged": ({"0.png": SMALL, "b/1.png": damaged_png()}, [], "b/1.png cannot be decoded"),
    "damaged, threads": ({"0.png": SMALL, "b/1.png": damaged_png()}, ["--workers=4"], "b/1.png decoded"),
    "bomb": ({"0.png": png_bomb()}, [], "0.png too large"),
    "all too small": ({"0.png": SMALL}, ["--transform=center-crop-wide", "--resolution=16x8"], "too small"),
    "json": ({"0.png": SMALL, "dataset.json": b"{labels"}, [], "dataset.json JSON"),
    "json list": ({"0.png": SMALL, "dataset.json": b"[]"}, [], "dataset.json labels"),
    "json nested": ({"0.png": SMALL, "dataset.json": b"[" * 200_000}, [], "dataset.json JSON"),
    "json pairs": ({"0.png": SMALL, "dataset.json": b'{"labels": {"0.png": 1}}'}, [], "dataset.json form"),
    "json twice": ({"0.png": SMALL, "dataset.json": b'{"labels": [["0.png", 1], ["0.png", 2]]}'}, [], "more than one"),
    "negative": ({"0.png": SMALL, "dataset.json": b'{"labels": [["0.png", -1]]}'}, [], "dataset.json -1"),
    "bool": ({"0.png": SMALL, "dataset.json": b'{"labels": [["0.png", true]]}'}, [], "dataset.json True"),
    "NaN": ({"0.png": SMALL, "dataset.json": b'{"labels": [["0.png", [NaN]]]}'}, [], "dataset.json finite"),
}  # fmt: skip


@pytest.mark.parametrize("files, options, words", FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_bad_folder(run_cli, tmp_path, files, options, words, dest):
    source = write_folder(tmp_path / "in", files)
    result = run_cli(dataset_tool.main, [f"--source={source}", f"--dest={tmp_path / dest}", *options], code=1)
    for word in words.split():
        assert word in result.stderr
    assert os.listdir(tmp_path) == ["in"]


def prepare_bad_source(kind, folder):
    """Make a damaged source; return its name."""
    mnist = np.zeros([2, 28, 28], dtype=np.uint8)
    if kind == "plain file.png":
        (folder / kind).write_bytes(png(SMALL))
    elif kind in ("text.zip", "text.tar.gz", "text-images-idx3-ubyte.gz"):
        (folder / kind).write_bytes(b"this is text")
        (folder / "text-labels-idx1-ubyte.gz").write_bytes(b"this is text")
    elif kind == "empty.zip":
        zipfile.ZipFile(folder / kind, "w").close()
    elif kind == "cut.zip":
        with zipfile.ZipFile(folder / "cut.zip", "w") as archive:
            archive.writestr("0.png", png(SMALL))
        (folder / "cut.zip").write_bytes((folder / "cut.zip").read_bytes()[:-30])
    elif kind == "crc.zip":
        with zipfile.ZipFile(folder / kind, "w") as archive:
            archive.writestr("dir/0.png", png(SMALL))
        data = bytearray((folder / kind).read_bytes())
        data[60] ^= 255
        (folder / kind).write_bytes(data)
    elif kind == "twice.zip":
        with zipfile.ZipFile(folder / kind, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("0.png", png(SMALL))
            archive.writestr("0.png", png(SMALL))
    elif kind == "huge.zip":
        with zipfile.ZipFile(folder / kind, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("0.png", png(SMALL))
        data = (folder / kind).read_bytes()
        size = struct.pack("<I", len(png(SMALL)))
        (folder / kind).write_bytes(data.replace(size, struct.pack("<I", 3 << 30)))  # a forged size
    elif kind == "none.tar.gz":
        cifar_tar(folder / kind, {"test_batch": b""})
    elif kind == "cut.tar.gz":
        cifar_tar(folder / kind, {"data_batch_1": pickle.dumps(batch())})
        (folder / kind).write_bytes((folder / kind).read_bytes()[:-2000])
    elif kind == "alone-images-idx3-ubyte.gz":
        (folder / kind).write_bytes(idx(mnist))
    elif kind == "count-images-idx3-ubyte.gz":
        write_mnist(folder, mnist, [1, 2, 3], prefix="count")
    elif kind == "magic-images-idx3-ubyte.gz":
        write_mnist(folder, mnist, [1, 2], prefix="magic").write_bytes(idx(mnist, magic=2049))
    elif kind == "short-images-idx3-ubyte.gz":
        path = write_mnist(folder, mnist, [1, 2], prefix="short")
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    elif kind == "long-images-idx3-ubyte.gz":
        path = write_mnist(folder, mnist, [1, 2], prefix="long")
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"\0"))
    elif kind == "big-images-idx3-ubyte.gz":
        path = write_mnist(folder, mnist, [1, 2], prefix="big")
        path.write_bytes(gzip.compress(struct.pack(">4I", 2051, *[0xFFFFFFFF] * 3)))
    elif kind == "cut-images-idx3-ubyte.gz":
        path = write_mnist(folder, random_images(2, 28, 28), [1, 2], prefix="cut")
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "no_lmdb":
        (folder / kind).mkdir()
    elif kind == "empty_lmdb":
        lmdb.open(str(folder / kind)).close()
    elif kind == "text_lmdb":
        with lmdb.open(str(folder / kind)) as environment, environment.begin(write=True) as transaction:
            transaction.put(b"key7", b"no image")
    elif kind == "missing.txt":
        write_folder(folder, {"0.png": SMALL})
        (folder / kind).write_text("0.png\n\nlost.png\n")
    elif kind == "empty.txt":
        (folder / kind).write_text("\n \n")
    elif kind == "binary.txt":
        (folder / kind).write_bytes(b"\xff\xfe\x00\x01")
    return folder / kind


@pytest.mark.parametrize(
    "kind, words",
    [
        ("nowhere", "nowhere does not exist"),
        ("plain file.png", "of no known kind folder .zip"),
        ("text.zip", "text.zip neither a folder nor a readable zip"),
        ("cut.zip", "cut.zip readable zip"),
        ("empty.zip", "empty.zip holds no images"),
        ("crc.zip", "dir/0.png cannot be read"),
        ("twice.zip", "two files 0.png"),
        ("huge.zip", "0.png too large"),
        ("text.tar.gz", "cannot be read as a .tar.gz"),
        ("cut.tar.gz", "cannot be read as a .tar.gz"),
        ("none.tar.gz", "none of the CIFAR-10 batches"),
        ("text-images-idx3-ubyte.gz", "cannot be read as a gzipped MNIST"),
        ("alone-images-idx3-ubyte.gz", "alone-labels-idx1-ubyte.gz missing"),
        ("count-images-idx3-ubyte.gz", "2 images 3 labels"),
        ("magic-images-idx3-ubyte.gz", "header"),
        ("short-images-idx3-ubyte.gz", "1568 bytes holds 1567"),
        ("long-images-idx3-ubyte.gz", "1568 bytes holds more"),
        ("big-images-idx3-ubyte.gz", "unpacks too large"),
        ("cut-images-idx3-ubyte.gz", "cannot be read"),
        ("no_lmdb", "no_lmdb holds no images"),
        ("empty_lmdb", "holds no images"),
        ("text_lmdb", "key7 not an image"),
        ("missing.txt", "Line 3 lost.png"),
        ("empty.txt", "holds no images"),
        ("binary.txt", "no text file"),
    ],
)
def test_bad_source(run_cli, tmp_path, kind, words):
    source = prepare_bad_source(kind, tmp_path)
    before = sorted(os.listdir(tmp_path))
    result = run_cli(dataset_tool.main, [f"--source={source}", f"--dest={tmp_path / 'out.zip'}"], code=1)
    for word in words.split():
        assert word in result.stderr
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "options, code, words",
    [
        (["--max-images=0"], 2, "--max-images"),
        (["--max-images=-3"], 2, "--max-images"),
        (["--max-images=many"], 2, "--max-images"),
        (["--workers=0"], 2, "--workers"),
        (["--resolution=32"], 2, "--resolution 32x32"),
        (["--resolution=axb"], 2, "--resolution"),
        (["--resolution=-8x-8"], 2, "--resolution"),
        (["--resolution=0x0"], 1, "0x0"),
        (["--resolution=24x24"], 1, "24x24 power of two"),
        (["--resolution=16x8"], 1, "16x8 not square"),
        (["--resolution=65536x65536"], 1, "65536x65536"),
        (["--transform=center-crop"], 1, "center-crop resolution"),
        (["--transform=center-crop-wide"], 1, "center-crop-wide resolution"),
        (["--transform=center-crop-wide", "--resolution=8x16"], 1, "higher than wide"),
        (["--transform=tilt"], 2, "--transform tilt"),
        (["--colour"], 2, "--colour"),
        (["--source="], 1, "does not exist"),
        (["--dest="], 1, "empty"),
    ],
)
def test_bad_options(run_cli, tmp_path, digits_zip, options, code, words):
    args = [f"--source={digits_zip}", f"--dest={tmp_path / 'out.zip'}", *options]
    result = run_cli(dataset_tool.main, args, code=code)
    for word in words.split():
        assert word in result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("args", [[], ["--source=digits"], ["--dest=x.zip"]])
def test_required_options(run_cli, args):
    assert "Missing option" in run_cli(dataset_tool.main, args, code=2).stderr


def test_bad_dest(run_cli, tmp_path, digits_zip):
    write_folder(tmp_path, {"full/x.png": SMALL, "dir.zip/x.png": SMALL, "file": b"text"})
    for dest, words in [
        ("full", "not empty"),
        ("file", "file"),
        ("dir.zip", "folder"),
        ("file/out.zip", "not a folder"),
        ("file/sub/out.zip", "file"),
    ]:
        result = run_cli(dataset_tool.main, [f"--source={digits_zip}", f"--dest={tmp_path / dest}"], code=1)
        assert words in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["dir.zip", "file", "full"]
    assert os.listdir(tmp_path / "full") == ["x.png"]


def test_dest_is_source(run_cli, tmp_path, make_zip):
    source = make_zip([SMALL], [0], tmp_path / "x.zip")
    before = Path(source).read_bytes()
    result = run_cli(dataset_tool.main, [f"--source={source}", f"--dest={source}"], code=1)
    assert "source itself" in result.stderr
    assert Path(source).read_bytes() == before


def test_error_keeps_the_old_zip(run_cli, tmp_path, make_zip):
    old = make_zip([SMALL], [0], tmp_path / "out.zip")
    before = Path(old).read_bytes()
    source = write_folder(tmp_path / "in", {"0.png": SMALL, "1.png": damaged_png()})
    run_cli(dataset_tool.main, [f"--source={source}", f"--dest={old}"], code=1)
    assert Path(old).read_bytes() == before
    (source / "1.png").write_bytes(png(SMALL))
    run_cli(dataset_tool.main, [f"--source={source}", f"--dest={old}"])
    assert len(read_dataset(old)[0]) == 2
    (tmp_path / "empty").mkdir()  # an empty folder is taken over
    run_cli(dataset_tool.main, [f"--source={source}", f"--dest={tmp_path / 'empty'}"])
    assert len(read_dataset(tmp_path / "empty")[0]) == 2


def test_archive_refuses_mixed_labels(tmp_path):
    with pytest.raises(ValueError, match="labels are all whole numbers"), open_archive(tmp_path / "x") as out:
        out.add(SMALL, 1)
        out.add(SMALL, [1.0])
    with pytest.raises(ValueError, match="float32"), open_archive(tmp_path / "x.zip") as out:
        out.add(SMALL.astype(np.float32))
    assert os.listdir(tmp_path) == []


def test_interruption_leaves_nothing(tmp_path):
    for dest in ("x", "x.zip"):
        with pytest.raises(KeyboardInterrupt), open_archive(tmp_path / dest) as out:
            out.add(SMALL)
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_starts_without_torch():
    code = "import sys, dataset_tool; sys.exit(any(m in sys.modules for m in ('torch', 'sklearn', 'scipy')))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
