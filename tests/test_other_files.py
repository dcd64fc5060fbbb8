"""Files and folders as other programs leave them: what is read, what is left out, and that it is said and recorded."""

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT, png

import dataset_tool
import emm
import generate
import generate_optim
import mem_ratio
from dataset_utils import dataset_random, dataset_size
from dataset_utils.crops import crop_grid
from dataset_utils.sources import folder_classes, open_source
from dnnlib import images as files_module
from dnnlib.images import ImageFiles, decode_image
from dnnlib.repeats import find_repeats
from memorization.runs import OTHER_MEASUREMENTS, RUN_FOLDERS, find_runs, read_run
from memorization.search.search import Plan, SearchSpec, choose_subset, digest_source
from training.dataset import ImageFolderDataset
from training.decoded import decoded_images, decoded_path


def flat(value, size=8):
    return np.full([size, size], value, dtype=np.uint8)


def write(folder, names):
    """Write {name: gray value or bytes} below a folder."""
    for name, content in names.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else png(flat(content)))
    return Path(folder)


def zipped(path, names):
    """The same as a zip, whose entries have exactly these names."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in names.items():
            info = zipfile.ZipInfo("x")
            info.filename = name  # ZipInfo itself would change some
            archive.writestr(info, content if isinstance(content, bytes) else png(flat(content)))
    return Path(path)


def labels_json(pairs):
    return json.dumps({"labels": pairs}).encode()


def convert(run_cli, source, dest, *options, code=0, main=dataset_tool.main):
    """Convert; return the gray values, labels, the entry `conversion` and what was printed."""
    result = run_cli(main, [f"--source={source}", f"--dest={dest}", *options], code=code)
    if code:
        return result.stderr
    with zipfile.ZipFile(dest) as archive:
        content = json.loads(archive.read("dataset.json"))
        names = [name for name in archive.namelist() if name.endswith(".png")]
        values = [int(np.array(PIL.Image.open(io.BytesIO(archive.read(name)))).flat[0]) for name in names]
    labels = None if content["labels"] is None else [label for _, label in content["labels"]]
    return values, labels, content["conversion"], result.stdout


CATS_AND_DOGS = {"cats/a.png": 10, "cats/b.png": 20, "dogs/a.png": 30, "dogs/b.png": 40}


# ----------------------------------------------------------------------------
# What other programs leave behind.


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_other_programs_leave_behind_is_left_out_at_any_depth(run_cli, tmp_path, kind):
    foreign = [
        ".ipynb_checkpoints/a-checkpoint.png", "dogs/.ipynb_checkpoints/b.png", ".Trash-1000/files/old.png",
        "cats/@eaDir/a.png/SYNOPHOTO_THUMB_S.png", "__MACOSX/cats/a.png", "__MACOSX/cats/._a.png",
        "dogs/__macosx/x.png", "$RECYCLE.BIN/x.png", ".DS_Store",
    ]  # fmt: skip
    names = CATS_AND_DOGS | dict.fromkeys(foreign, 99)
    source = write(tmp_path / "in", names) if kind == "folder" else zipped(tmp_path / "in.zip", names)
    values, labels, made, out = convert(run_cli, source, tmp_path / "out.zip")
    assert (values, labels) == ([10, 20, 30, 40], [0, 0, 1, 1])
    assert made["classes"] == {"cats": 0, "dogs": 1}
    assert made["left_out"] == {files_module.HIDDEN: 8}
    assert out.splitlines()[1:] == ["Labels of the classes: cats 0, dogs 1.", f"Left out: 8 {files_module.HIDDEN}."]
    assert len(ImageFolderDataset(source)) == 4


def test_own_output_is_not_read_again(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "in", {"a.png": 1, "b.png": 2}))
    run_cli(dataset_tool.main, ["--source=.", "--dest=ds8"])
    values, labels, made, _ = convert(run_cli, ".", tmp_path / "again.zip")
    assert (values, labels, made["left_out"]) == ([1, 2], None, {files_module.NESTED: 2})


def test_a_folder_entry_with_an_images_name(run_cli, tmp_path):
    source = zipped(tmp_path / "in.zip", {"set.png/": b"", "set.png/a.png": 1, "set.png/b.png": 2})
    assert convert(run_cli, source, tmp_path / "out.zip")[0] == [1, 2]
    assert ImageFolderDataset(source).images()[:, 0, 0, 0].tolist() == [1, 2]


def test_windows_paths(run_cli, tmp_path):
    windows = {name.replace("/", "\\"): value for name, value in CATS_AND_DOGS.items()}
    slashes = labels_json([[name, i // 2] for i, name in enumerate(CATS_AND_DOGS)])
    backslashes = labels_json([[name, i // 2] for i, name in enumerate(windows)])
    for number, names in enumerate(
        [windows, windows | {"dataset.json": slashes}, CATS_AND_DOGS | {"dataset.json": backslashes}]
    ):
        source = zipped(tmp_path / f"{number}.zip", names)
        values, labels, _, _ = convert(run_cli, source, tmp_path / "out.zip")
        assert (values, labels) == ([10, 20, 30, 40], [0, 0, 1, 1])
    assert ImageFolderDataset(source, use_labels=True).labels().tolist() == [0, 0, 1, 1]
    source = write(tmp_path / "unpacked", windows)  # what unzip may make of such a zip
    assert convert(run_cli, source, tmp_path / "out.zip")[:2] == ([10, 20, 30, 40], [0, 0, 1, 1])


@pytest.mark.parametrize("name", ["..\\..\\x.png", "C:\\x.png", "\\x.png", "\\\\server\\x.png", "a\\..\\..\\x.png"])
def test_windows_names_that_lead_outside_are_refused(run_cli, tmp_path, name):
    source = zipped(tmp_path / "in.zip", {"0.png": 0, name: 1})
    assert "leads outside" in convert(run_cli, source, tmp_path / "out.zip", code=1)
    with pytest.raises(ValueError, match="leads outside"):
        ImageFolderDataset(source)


# ----------------------------------------------------------------------------
# Links.


def test_linked_class_folders_count(run_cli, tmp_path):
    store = write(tmp_path / "store", CATS_AND_DOGS | {"ants/a.png": 5})
    source = write(tmp_path / "in", {"bees/a.png": 7})
    for name in ("cats", "dogs", "ants"):
        (source / name).symlink_to(store / name)
    values, labels, made, _ = convert(run_cli, source, tmp_path / "out.zip")
    assert values == [5, 7, 10, 20, 30, 40] and labels == [0, 1, 2, 2, 3, 3]
    assert made["left_out"] == {}
    assert len(ImageFolderDataset(source)) == 6


def test_one_thing_under_two_names_counts_once(run_cli, tmp_path):
    source = write(tmp_path / "in", CATS_AND_DOGS)
    (source / "cats/loop").symlink_to(source)  # leads back
    (source / "up").symlink_to("..")
    (source / "animals").symlink_to("cats")  # sorts before cats, which keeps its name
    (source / "dogs/again.png").symlink_to("a.png")
    (source / "gone").symlink_to("nowhere")
    values, labels, made, _ = convert(run_cli, source, tmp_path / "out.zip")
    assert (values, labels, made["classes"]) == ([10, 20, 30, 40], [0, 0, 1, 1], {"cats": 0, "dogs": 1})
    assert made["left_out"] == {files_module.LINKED_TWICE: 4, files_module.BROKEN_LINK: 1}


# ----------------------------------------------------------------------------
# Classes.


def test_numbers_in_folder_names_are_numbers(run_cli, tmp_path):
    source = write(tmp_path / "in", {f"{i}/a.png": i for i in range(12)})
    values, labels, made, out = convert(run_cli, source, tmp_path / "out.zip")
    assert values == labels and made["classes"] == {str(i): i for i in range(12)}
    assert "Labels of the classes: 0 0, 1 1, 2 2" in out
    values, labels, made, _ = convert(run_cli, source, tmp_path / "out.zip", "--class-order=published")
    assert made["classes"] == {name: i for i, name in enumerate(sorted(map(str, range(12))))}
    assert labels == list(range(12)) and values == [int(name) for name in made["classes"]]
    assert folder_classes(["n02085620/a.png", "n02085782/a.png", "x.png"]) == {"": 0, "n02085620": 1, "n02085782": 2}


def test_parts_of_a_dataset_are_no_classes(run_cli, tmp_path):
    source = write(tmp_path / "in", {"train/a.png": 1, "test/a.png": 2})
    out = convert(run_cli, source, tmp_path / "out.zip")[3]
    assert "Note:" in out and f'--source="{source}/test"' in out and "test 0, train 1" in out


def test_files_that_are_not_read_are_counted_by_format(run_cli, tmp_path):
    names = {"a.png": 1, **{f"x{i}.{form}": b"?" for i, form in enumerate(["heic", "HEIC", "avif", "jxl", "tga"])}}
    _, _, made, out = convert(run_cli, write(tmp_path / "in", names), tmp_path / "out.zip")
    assert made["left_out_details"] == {files_module.OTHER_FORMAT: {".heic": 2, ".avif": 1, ".jxl": 1, ".tga": 1}}
    assert out.splitlines()[-1] == f"Left out: 5 {files_module.OTHER_FORMAT} (.avif 1, .heic 2, .jxl 1, .tga 1)."


NFC, NFD = (unicodedata.normalize(form, "ä.png") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    "file, named",
    [("a.png", "./a.png"), ("s/a.png", "s\\a.png"), ("s/a.png", "s//a.png"), (NFC, NFD), (NFD, NFC)],
)
def test_other_spellings_of_a_name_in_dataset_json(run_cli, tmp_path, file, named):
    content = {file: 3, "b.png": 4, "dataset.json": labels_json([[named, 7], ["b.png", 1]])}
    for source in (write(tmp_path / "in", content), zipped(tmp_path / "in.zip", content)):
        values, labels, made, _ = convert(run_cli, source, tmp_path / "out.zip")
        assert dict(zip(values, labels)) == {3: 7, 4: 1} and not made["left_out"]
        assert sorted(ImageFolderDataset(source, use_labels=True).labels()) == [1, 7]


@pytest.mark.parametrize("named", ["/data/a.png", "a.jpg", "\x83X.png", "b/a.png"])
def test_a_dataset_json_that_names_no_image_is_an_error(run_cli, tmp_path, named):
    source = write(tmp_path / "in", {"a.png": 3, "dataset.json": labels_json([[named, 7]])})
    message = convert(run_cli, source, tmp_path / "out.zip", code=1)
    assert "names no image" in message and '"a.png"' in message
    with pytest.raises(ValueError, match="names no image"):
        ImageFolderDataset(source, use_labels=True)


def test_labels_of_images_that_are_gone_are_counted(run_cli, tmp_path):
    source = write(tmp_path / "in", {"a.png": 3, "dataset.json": labels_json([["a.png", 7], ["b.png", 8]])})
    _, labels, made, _ = convert(run_cli, source, tmp_path / "out.zip")
    assert labels == [7] and made["left_out"] == {files_module.UNKNOWN_NAME: 1}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_dataset_one_level_down(run_cli, tmp_path, kind):
    content = {"p/a.png": 1, "p/b.png": 2, "p/dataset.json": labels_json([["a.png", 5], ["b.png", 6]])}
    content["__MACOSX/p/._a.png"] = b"?"
    source = write(tmp_path / "in", content) if kind == "folder" else zipped(tmp_path / "in.zip", content)
    assert convert(run_cli, source, tmp_path / "out.zip")[:2] == ([1, 2], [5, 6])
    assert ImageFolderDataset(source, use_labels=True).labels().tolist() == [5, 6]


# ----------------------------------------------------------------------------
# Pixels.


def tiff(array, bits, planar):
    """An uncompressed RGB TIFF of `array`, integers [h, w, 3], written by hand."""
    height, width, _ = array.shape
    pixels = array.astype("<u2" if bits == 16 else "u1")
    strips = [pixels.tobytes()] if planar == 1 else [pixels[:, :, c].tobytes() for c in range(3)]
    tags = {256: width, 257: height, 259: 1, 262: 2, 277: 3, 278: height, 284: planar}
    begin = 8 + 2 + 12 * (len(tags) + 3) + 4
    extra = struct.pack("<3H", *[bits] * 3)
    at, offsets = begin + len(extra) + 8 * len(strips), []
    for strip in strips:
        offsets.append(at)
        at += len(strip)
    entries = {key: (3, 1, struct.pack("<HH", value, 0)) for key, value in tags.items()}
    entries[258] = (3, 3, struct.pack("<I", begin))
    for key, values in ((273, offsets), (279, [len(strip) for strip in strips])):
        packed = struct.pack(f"<{len(values)}I", *values)
        entries[key] = (4, len(values), packed if len(values) == 1 else struct.pack("<I", begin + len(extra)))
        extra += packed if len(values) > 1 else b""
    extra = extra.ljust(6 + 8 * len(strips), b"\0")
    directory = b"".join(struct.pack("<HHI", key, *entry[:2]) + entry[2] for key, entry in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + extra + b"".join(strips)


VALUES = np.random.RandomState(0).randint(0, 65536, [8, 8, 3])
BIG = VALUES.astype(">u2").tobytes()


def jpeg12():
    """A JPEG whose header says 12 bits per channel."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(flat(7)).save(buffer, "jpeg")
    data = bytearray(buffer.getvalue())
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


@pytest.mark.parametrize(
    "name, data",
    {
        "P6.ppm": b"P6 8 8 65535\n" + BIG,
        "P6-12.ppm": b"P6\n# made by hand\n8 8\n4095\n" + (VALUES % 4096).astype(">u2").tobytes(),
        "P5.pgm": b"P5 8 8 65535\n" + BIG[:128],
        "P5-10.pgm": b"P5 8 8 1023\n" + (VALUES[:, :, 0] % 1024).astype(">u2").tobytes(),
        "P3.ppm": b"P3 8 8 65535\n" + " ".join(map(str, VALUES.ravel())).encode(),
        "P2.pgm": b"P2 8 8 4095\n" + " ".join(map(str, VALUES[:, :, 0].ravel() % 4096)).encode(),
        "chunky.tif": tiff(VALUES, 16, planar=1),
        "planar.tif": tiff(VALUES, 16, planar=2),
        "12.jpg": jpeg12(),
    }.items(),
)
def test_more_than_8_bits_are_refused(name, data):
    with pytest.raises(ValueError, match="more than 8 bits"):
        decode_image(data, name)


def test_8_bits_are_read_in_all_of_these_formats():
    small = VALUES >> 8
    for data in [
        b"P6 # 8 bits\n8 8 255\n" + small.astype("u1").tobytes(),
        b"P3 8 8 255\n" + " ".join(map(str, small.ravel())).encode(),
        tiff(small, 8, planar=1),
        tiff(small, 8, planar=2),
    ]:
        np.testing.assert_array_equal(decode_image(data, "x"), small)


def encode(image, form="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opaque_alpha_is_dropped_and_said(run_cli, tmp_path, mode):
    colour = PIL.Image.fromarray((VALUES >> 8).astype(np.uint8)).convert("L" if mode == "LA" else "RGB")
    notes = []
    np.testing.assert_array_equal(decode_image(encode(colour.convert(mode)), "x", notes), np.array(colour))
    assert notes == [files_module.OPAQUE]
    unused = (0, 1, 2) if mode == "RGBA" else next(v for v in range(256) if v not in np.array(colour))
    np.testing.assert_array_equal(decode_image(encode(colour, transparency=unused), "x"), np.array(colour))
    _, _, made, out = convert(
        run_cli, write(tmp_path / "in", {"a.png": encode(colour.convert(mode))}), tmp_path / "out.zip"
    )
    assert made["changed"] == {files_module.OPAQUE: 1} and f"1 {files_module.OPAQUE}" in out


@pytest.mark.parametrize("form", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_applied(form, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image = PIL.Image.fromarray(np.repeat(np.arange(128, dtype=np.uint8).reshape(8, 16, 1), 3, axis=2))
    options = dict(lossless=True) if form == "webp" else {}
    expected = decode_image(encode(image, form, **options), "x")
    notes = []
    turned = decode_image(encode(image, form, exif=exif, **options), "x", notes)
    quarters = {1: 0, 3: 2, 6: 3, 8: 1}[orientation]  # counterclockwise; EXIF 2.3, 4.6.4, tag 274
    np.testing.assert_array_equal(turned, np.rot90(expected, quarters))
    assert notes == ([files_module.TURNED] if quarters else [])


def test_advice_on_gray_among_rgb_helps(run_cli, tmp_path):
    noise = np.random.RandomState(0).randint(0, 256, [3, 32, 32, 3], dtype=np.uint8)
    source = write(tmp_path / "in", {f"{i}.png": png(image) for i, image in enumerate(noise)} | {"3.png": 5})
    message = convert(run_cli, source, tmp_path / "out.zip", code=1)
    options = [word.rstrip(",.;") for word in message.split() if word.startswith("--")]
    assert len(options) == 2 and len(convert(run_cli, source, tmp_path / "out.zip", *options)[0]) == 4
    with pytest.raises(ValueError, match="dataset_tool.py --transform=center-crop"):
        ImageFolderDataset(source).images()


# ----------------------------------------------------------------------------
# Repeats.


def test_repeats_are_counted_by_content():
    a, b, c = flat(1), flat(2), flat(1)[:, :4]
    repeats = find_repeats([a, b, a.copy(), c, a])
    assert repeats.first == [0, 1, 0, 3, 0]
    assert repeats.distinct.tolist() == [0, 1, 3] and repeats.repeated.tolist() == [True, False, True, False, True]
    assert repeats.counts() == {"images": 5, "distinct": 3, "repeated": 3}
    assert find_repeats([a, b]).describe() == "" and "3 of the 5 images" in repeats.describe()


def measure(run_cli, data, log, *options):
    args = [f"--network={data}", f"--log={log}", "--seeds=0-15", "--steps=8", "--device=cpu", *options]
    out = run_cli(mem_ratio.main, args).stdout
    return json.loads(Path(log).with_suffix(".jsonl").read_text().splitlines()[-1]), out


def test_repeats_and_unique_in_a_measurement(run_cli, tmp_path, make_zip):
    """The optimum replays training images: R_mem is 100 % of the distinct ones, and of repeats 0 %."""
    noise = np.random.RandomState(0).randint(0, 256, [8, 8, 8], dtype=np.uint8)
    once = make_zip(noise, None, tmp_path / "once.zip")
    twice = make_zip(np.concatenate([noise, noise]), [i // 4 for i in range(8)] * 2, tmp_path / "twice.zip")
    record, out = measure(run_cli, once, tmp_path / "once/mem_traj.log")
    assert record["ratio"] == 1 and "repeats" not in record and "more than once" not in out
    record, out = measure(run_cli, twice, tmp_path / "twice/mem_traj.log")
    counts = {"images": 16, "distinct": 8, "repeated": 16, "num_nearest": 16, "share_nearest": 1.0}
    assert record["ratio"] == 0 and record["repeats"] == {**counts, "unique": False}
    assert "16 of the 16 training images occur more than once" in out and "16 of 16 images (100.0 %)" in out
    record, out = measure(run_cli, twice, tmp_path / "twice/mem_traj.log", "--unique", "--gap=4")
    assert record["ratio"] == 1 and record["repeats"] == {**counts, "unique": True} and record["reference_size"] == 8
    assert "not the published number" in out and set(record["classes"]) == {"0", "1"}
    assert len((tmp_path / "twice/mem_traj.jsonl").read_text().splitlines()) == 2  # both are kept


def test_repeats_are_recorded_by_the_tool(run_cli, tmp_path):
    source = write(tmp_path / "in", {"a.png": 1, "b.png": 2, "c.png": 1})
    _, _, made, out = convert(run_cli, source, tmp_path / "out.zip")
    assert made["repeats"] == {"images": 3, "distinct": 2, "repeated": 2}
    assert "2 of the 3 images occur more than once (2 are different)" in out


# ----------------------------------------------------------------------------
# Where a file comes from.


def test_reuse_only_of_what_was_made_from_the_same(run_cli, tmp_path, make_zip):
    first = np.random.RandomState(0).randint(0, 256, [20, 8, 8], dtype=np.uint8)
    source, dest = tmp_path / "in.zip", tmp_path / "out.zip"

    def made(*options, main=dataset_size.main):
        """Whether the dataset was written."""
        args = [f"--source={source}", f"--dest={dest}", "--reuse", *options]
        return "Wrote" in run_cli(main, args).stdout

    make_zip(first, [i % 2 for i in range(20)], source)
    assert made("--max-images=4") and not made("--max-images=4")
    written = dest.read_bytes()
    assert not made("--max-images=4", "--workers=3") and dest.read_bytes() == written
    assert made("--max-images=6") and made("--max-images=6", "--resolution=4x4") and made("--max-images=4")
    assert dest.read_bytes() == written
    assert made("--max-images=4", "--num-classes=2", main=dataset_random.main) and made("--max-images=4")
    make_zip(first, [1 - i % 2 for i in range(20)], source)  # other labels
    assert made("--max-images=4")
    make_zip(255 - first, [1 - i % 2 for i in range(20)], source)  # other images
    assert made("--max-images=4") and not made("--max-images=4")
    dest.write_bytes(b"damaged")
    assert made("--max-images=4")


def test_decoded_copies_of_names_that_are_patterns(tmp_path, make_zip):
    noise = np.random.RandomState(0).randint(0, 256, [4, 8, 8], dtype=np.uint8)
    plain, pattern = tmp_path / "set1.zip", tmp_path / "set[12].zip"
    for path in (plain, pattern):
        make_zip(noise, None, path)
        decoded_images(path)
    copies = {path: decoded_path(path) for path in (plain, pattern)}
    assert all(copy.exists() for copy in copies.values())
    stamp = pattern.stat()
    make_zip(255 - noise, None, pattern)
    os.utime(pattern, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # of the same size and time, but other content
    np.testing.assert_array_equal(decoded_images(pattern)[:, 0], 255 - noise)
    assert copies[plain].exists() and not copies[pattern].exists()


def test_decoded_copy_of_a_read_only_folder(tmp_path, make_zip, monkeypatch):
    noise = np.random.RandomState(0).randint(0, 256, [4, 8, 8], dtype=np.uint8)
    (tmp_path / "data").mkdir()
    path = Path(make_zip(noise, None, tmp_path / "data/d.zip"))
    monkeypatch.setenv("DIFFMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for a folder of someone else
    np.testing.assert_array_equal(decoded_images(path)[:, 0], noise)
    assert os.listdir(tmp_path / "data") == ["d.zip"] and decoded_path(path).is_relative_to(tmp_path / "cache")


# ----------------------------------------------------------------------------
# Names and terminals.


def test_digits_beside_a_folder_of_that_name(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(open_source("digits")) == len(open_source("sklearn:digits")) == 1797
    write("digits", {"a.png": 1})
    message = convert(run_cli, "digits", "out.zip", code=1)
    assert "./digits" in message and "sklearn:digits" in message
    assert convert(run_cli, "./digits", "out.zip")[0] == convert(run_cli, "digits/", "out.zip")[0] == [1]
    assert len(open_source("sklearn:digits")) == 1797
    write("cats_lmdb", {"a.png": 2})
    assert convert(run_cli, "cats_lmdb", "out.zip")[0] == [2]


def test_tilde_is_the_home_folder(run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(write(tmp_path / "home", {"in/a.png": 1})))
    run_cli(dataset_tool.main, ["--source=~/in", "--dest=~/out.zip"])
    assert len(ImageFiles(tmp_path / "home/out.zip").names) == 1


@pytest.mark.parametrize("program", ["mem_ratio.py", "emm.py"])
def test_a_notebooks_backend_and_a_terminal_that_is_not_utf8(program):
    environment = {
        **os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "latin-1",
    }  # fmt: skip
    subprocess.run([sys.executable, program, "--help"], cwd=ROOT, env=environment, check=True, capture_output=True)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_names_that_a_terminal_cannot_show(tmp_path, encoding):
    source = write(tmp_path / "写真", {"ねこ/a.png": 1, "いぬ/a.png": 2})
    args = [sys.executable, "dataset_tool.py", f"--source={source}", f"--dest={tmp_path / 'out.zip'}"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    done = subprocess.run(args, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert b"?? 0, ?? 1" in done.stdout
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        made = json.loads(archive.read("dataset.json"))["conversion"]
    assert made["classes"] == {"いぬ": 0, "ねこ": 1}


# ----------------------------------------------------------------------------
# More kinds of sources.


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar100(run_cli, tmp_path, coarse, packed):
    pixels = np.random.RandomState(0).randint(0, 256, [3, 3072], dtype=np.uint8)
    content = {"data": pixels, "fine_labels": [99, 0, 7], "coarse_labels": [19, 4, 0], "filenames": ["a", "b", "c"]}
    source = write(tmp_path / "cifar-100-python", {"train": pickle.dumps(content, 2), "meta": b"", "test": b"?"})
    if packed:
        with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as tar:
            tar.add(source, source.name)
        source = tmp_path / "cifar-100-python.tar.gz"
    options = ["--coarse"] if coarse else []
    values, labels, _, _ = convert(run_cli, source, tmp_path / "out.zip", *options)
    assert labels == content["coarse_labels" if coarse else "fine_labels"] and values == pixels[:, 0].tolist()


def test_unpacked_cifar10(run_cli, tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, [4, 3072], dtype=np.uint8)
    batches = {f"data_batch_{i + 1}": dict(data=pixels[2 * i : 2 * i + 2], labels=[i, 9]) for i in range(2)}
    source = write(tmp_path / "in", {name: pickle.dumps(batch) for name, batch in batches.items()})
    assert convert(run_cli, source, tmp_path / "out.zip")[:2] == (pixels[:, 0].tolist(), [0, 9, 1, 9])
    assert "no coarse labels" in convert(run_cli, source, tmp_path / "o.zip", "--coarse", code=1)


@pytest.mark.parametrize("name", ["train-{}-idx{}-ubyte", "train-{}.idx{}-ubyte", "train-{}-idx{}-ubyte.gz"])
def test_unpacked_mnist(run_cli, tmp_path, name):
    images, labels = np.stack([flat(value, 16) for value in (5, 6)]), np.array([3, 1], dtype=np.uint8)
    files = {}
    for what, array in (("images", images), ("labels", labels)):
        data = struct.pack(f">{1 + array.ndim}i", 0x0800 + array.ndim, *array.shape) + array.tobytes()
        files[name.format(what, array.ndim)] = gzip.compress(data) if name.endswith(".gz") else data
    source = write(tmp_path / "in", files)
    for path in (source, source / name.format("images", 3)):
        assert convert(run_cli, path, tmp_path / "out.zip")[:2] == ([5, 6], [3, 1])


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 8, 8, 1), (5, 1, 8, 8), (5, 8, 8, 3), (5, 3, 8, 8)])
@pytest.mark.parametrize("labels", [None, [4, 0, 1, 1, 2], [[1.0, 0.5]] * 5])
def test_npz(run_cli, tmp_path, shape, labels):
    images = np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)
    arrays = dict(images=images) | ({} if labels is None else dict(labels=np.array(labels)))
    np.savez(tmp_path / "in.npz", **arrays)
    with open_source(tmp_path / "in.npz", max_images=4) as source:
        channels_last = images.transpose(0, 2, 3, 1) if shape[1] in (1, 3) else images
        for i in range(4):
            np.testing.assert_array_equal(source.read(i), channels_last[i].squeeze())
    values, found, made, _ = convert(run_cli, tmp_path / "in.npz", tmp_path / "out.zip", "--max-images=4")
    assert found == (None if labels is None else labels[:4]) and made["left_out"] == {"beyond --max-images": 1}


@pytest.mark.parametrize(
    "arrays, words",
    [
        (dict(pictures=flat(0)), 'no array "images"'),
        (dict(images=np.zeros([2, 8, 8])), "uint8"),
        (dict(images=np.array([{}, {}])), "cannot be read"),
        (dict(images=np.zeros([2, 8, 8], np.uint8), labels=[1]), "2 images"),
        (dict(images=np.zeros([2, 8, 8], np.uint8), labels=[1, -1]), "label -1"),
    ],
)
def test_bad_npz(run_cli, tmp_path, arrays, words):
    np.savez(tmp_path / "in.npz", **arrays)
    assert words in convert(run_cli, tmp_path / "in.npz", tmp_path / "out.zip", code=1)
    assert not (tmp_path / "out.zip").exists()


def test_classes_from_file_names(run_cli, tmp_path):
    source = write(
        tmp_path / "in", {"dog_1.png": 1, "cat_2.png": 2, "x/dog_3_b.png": 3, "class10_a.png": 4, "class9_a.png": 5}
    )
    values, labels, made, _ = convert(run_cli, source, tmp_path / "out.zip", "--classes=prefixes")
    assert made["classes"] == {"cat": 0, "class9": 1, "class10": 2, "dog": 3}
    assert dict(zip(values, labels)) == {1: 3, 2: 0, 3: 3, 4: 2, 5: 1}
    write(source, {"plain.png": 6})
    assert "no underscore" in convert(run_cli, source, tmp_path / "out.zip", "--classes=prefixes", code=1)


@pytest.mark.parametrize("program", ["generate.py", "mem_ratio.py"])
def test_mps_says_what_is_missing(run_cli, tmp_path, make_zip, program):
    data = make_zip([flat(1), flat(2)], None, tmp_path / "d.zip")
    args = [f"--network={data}", "--device=mps"]
    if program == "generate.py":
        message = run_cli(generate.main, [*args, f"--outdir={tmp_path / 'out'}"], code=1).stderr
    else:
        message = run_cli(mem_ratio.main, [*args, f"--log={tmp_path / 'out/x.log'}"], code=1).stderr
    assert "float64" in message and "--device=cpu" in message and os.listdir(tmp_path) == ["d.zip"]


def test_a_search_does_not_go_on_with_another_source(tmp_path, make_zip):
    source, plan = tmp_path / "in.zip", tmp_path / "search/plan.json"
    noise = np.random.RandomState(0).randint(0, 256, [6, 8, 8], dtype=np.uint8)

    def settings():
        subset, largest = choose_subset(str(source))
        digest = digest_source(str(source))
        return SearchSpec(plan.parent, str(source), subset, largest, source_sha256=digest).settings()

    make_zip(noise, None, source)
    Plan(plan, settings()).save()
    Plan(plan, settings())
    make_zip(255 - noise, None, source)
    with pytest.raises(ValueError, match="another source_sha256"):
        Plan(plan, settings())
    content = json.loads(plan.read_text())
    del content["settings"]["source_sha256"]  # a plan of before
    plan.write_text(json.dumps(content))
    Plan(plan, settings())


# ----------------------------------------------------------------------------
# Tars, parquet, crops.


def tarred(path, names, links=(), form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in names.items():
            data = content if isinstance(content, bytes) else png(flat(content))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return Path(path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_images(run_cli, tmp_path, form):
    names = CATS_AND_DOGS | {"dogs/" + "x" * 90 + ".png": 50, "cats/._a.png": b"?", "cats/note.txt": b"?"}
    source = tarred(tmp_path / "in.tar", names, [("dogs/c.png", "a.png")], form)
    values, labels, made, out = convert(run_cli, source, tmp_path / "out.zip", "--workers=3")
    assert (values, labels) == ([10, 20, 30, 40, 50], [0, 0, 1, 1, 1]) and made["classes"] == {"cats": 0, "dogs": 1}
    assert made["left_out"] == {files_module.TAR_LINK: 1, files_module.HIDDEN: 1, files_module.OTHER_FORMAT: 1}
    assert "links in a tar" in out.splitlines()[-1]
    labelled = tarred(tmp_path / "l.tar", {"a.png": 1, "b.png": 2, "dataset.json": labels_json([["a.png", 5]])})
    assert ImageFiles(labelled).labels() == {"a.png": 5}
    dataset = pickle.loads(pickle.dumps(ImageFolderDataset(source)))
    assert dataset.images()[:, 0, 0, 0].tolist() == [10, 20, 30, 40, 50]


def test_tars_that_are_refused(run_cli, tmp_path):
    good = tarred(tmp_path / "good.tar", CATS_AND_DOGS).read_bytes()
    gz, cut, outside, twice, huge = (tmp_path / f"{i}.tar" for i in range(5))
    gz.write_bytes(gzip.compress(good))
    cut.write_bytes(good[: 512 + 20])
    tarred(outside, {"../a.png": 1})
    tarred(twice, {"a.png": 1})
    twice.write_bytes(twice.read_bytes()[:1024].ljust(1024, b"\0") * 2 + bytes(1024))
    info = tarfile.TarInfo("a.png")
    info.type, info.size = tarfile.XHDTYPE, 1 << 32  # a header of 4 GiB
    huge.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    messages = {
        gz: "tar that is not compressed", cut: "unexpected end of data", twice: "two files",
        outside: "leads outside of it; make the tar anew", huge: "a part of it is too large",
    }  # fmt: skip
    for source, message in messages.items():
        error = convert(run_cli, source, tmp_path / "out.zip", code=1)
        assert message in error and len(error.splitlines()) == 1, source
    assert not (tmp_path / "out.zip").exists()


def parquet(path, values, labels=None, *, column="image", split="label", names=None, as_struct=True, groups=2):
    """A file as Hugging Face's library writes it: image files, labels, and the features in the schema's metadata."""
    arrow = pytest.importorskip("pyarrow")
    files = [png(flat(value)) for value in values]
    content = {column: [{"bytes": data, "path": None} for data in files] if as_struct else files}
    features = {column: {"_type": "Image"}} if as_struct else {}
    if labels is not None:
        content[split] = labels
        features[split] = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    table = arrow.table(content).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    arrow.parquet.write_table(table, path, row_group_size=groups)


def test_a_dataset_folder_of_hugging_face(run_cli, tmp_path):
    pytest.importorskip("pyarrow.parquet")
    source, how = tmp_path / "in", dict(names=["cat", "dog"])
    parquet(source / "data/train-00000-of-00002.parquet", [1, 2, 3, 4, 5], [0, 1, 1, 0, 1], **how)
    parquet(source / "data/train-00001-of-00002.parquet", [6, 7, 8], [1, 1, 0], **how)
    parquet(source / "data/test-00000-of-00001.parquet", [9, 10], [1, 1], **how)
    parquet(source / ".cache/train-00000-of-00001.parquet", [99], [1], **how)
    (source / "README.md").write_text("---\n")
    for workers in (1, 4):
        values, labels, made, out = convert(run_cli, source, tmp_path / "out.zip", f"--workers={workers}")
        assert (values, labels) == ([1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 1, 0, 1, 1, 1, 0])
    assert made["classes"] == {"cat": 0, "dog": 1} and made["left_out"] == {"in other splits": 2}
    assert "Labels of the classes: cat 0, dog 1." in out and out.splitlines()[-1] == "Left out: 2 in other splits."
    one = source / "data/test-00000-of-00001.parquet"
    assert convert(run_cli, one, tmp_path / "out.zip")[:2] == ([9, 10], [1, 1])
    values, _, made, _ = convert(run_cli, source, tmp_path / "out.zip", "--max-images=3")
    assert values == [1, 2, 3] and made["left_out"]["beyond --max-images"] == 5
    with open_source(source) as images:  # in any order
        assert [int(images.read(i)[0, 0]) for i in (7, 0, 4, 3, 7)] == [8, 1, 5, 4, 8]


def test_columns_of_parquet_files(run_cli, tmp_path):
    pytest.importorskip("pyarrow.parquet")
    plain = tmp_path / "plain/default/train/0000.parquet"
    parquet(plain, [1, 2], [3, -1], column="img", split="fine_label", as_struct=False)
    assert [image[0, 0] for image, _ in open_source(plain.parents[2])] == [1, 2]
    assert open_source(plain).labels == [3, None]
    parquet(tmp_path / "c.parquet", [1], [7], split="coarse_label")
    assert open_source(tmp_path / "c.parquet", coarse=True).labels == [7]
    source = open_source(tmp_path / "c.parquet")
    assert source.labels is None and '"coarse_label"' in source.about.warnings[0]
    errors = {}
    parquet(tmp_path / "two/a.parquet", [1])
    parquet(tmp_path / "two/b.parquet", [1])
    errors["two"] = "holds the splits a, b"
    parquet(tmp_path / "none.parquet", [1], column="pixels", as_struct=False)
    errors["none.parquet"] = 'no column of images ("image"), only: pixels'
    parquet(tmp_path / "text.parquet", [1], ["cat"])
    errors["text.parquet"] = "'cat'"
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    errors["bad.parquet"] = "cannot be read as a parquet file"
    for name, message in errors.items():
        error = convert(run_cli, tmp_path / name, tmp_path / "out.zip", code=1)
        assert message in error and len(error.splitlines()) == 1, name


def test_parquet_without_pyarrow(run_cli, tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    error = convert(run_cli, tmp_path / "a.parquet", tmp_path / "out.zip", code=1)
    assert "pip install pyarrow" in error and len(error.splitlines()) == 1


def test_crops_lie_side_by_side():
    assert crop_grid(100, 100, 1) == [(0, 0, 100)]
    assert crop_grid(100, 201, 2) == [(0, 0, 100), (0, 100, 100)]
    assert crop_grid(60, 101, 1) == [(0, 20, 60)]
    assert crop_grid(101, 100, 4) == [(0, 0, 50), (0, 50, 50), (50, 0, 50), (50, 50, 50)]
    assert crop_grid(1, 2, 3) == []
    random = np.random.RandomState(0)
    for height, width, count in random.randint(1, 60, [200, 3]):
        places = crop_grid(height, width, count)
        sides = [s for s in range(1, 61) if (height // s) * (width // s) >= count]
        assert (len(places), {side for *_, side in places}) == ((count, {max(sides)}) if sides else (0, set()))
        covered = np.zeros([height, width], dtype=int)
        for top, left, side in places:
            assert top >= 0 and left >= 0 and top + side <= height and left + side <= width
            covered[top : top + side, left : left + side] += 1
        assert covered.max() <= 1


def test_several_crops_of_large_photos(run_cli, tmp_path):
    photo = np.zeros([32, 48], dtype=np.uint8)
    for k in range(6):
        photo[16 * (k // 3) :, 16 * (k % 3) :][:16, :16] = 10 + k
    source = write(tmp_path / "in", {"a/photo.png": png(photo), "b/small.png": 90})
    out = tmp_path / "out.zip"
    values, labels, made, printed = convert(run_cli, source, out, "--crops=6", "--resolution=8x8", "--workers=2")
    assert (values, labels) == ([10, 11, 12, 13, 14, 15], [0] * 6)
    assert made["left_out"] == {"too small and dropped": 6} and made["crops"] == 6
    assert printed.splitlines()[-1] == "Left out: 6 too small and dropped."
    args = [f"--source={source}", f"--dest={out}", "--resolution=8x8", "--reuse"]
    assert "Nothing is written" in run_cli(dataset_tool.main, [*args, "--crops=6"]).stdout
    assert "Nothing is written" not in run_cli(dataset_tool.main, [*args, "--crops=4"]).stdout
    assert "--resolution" in convert(run_cli, source, out, "--crops=2", code=2)


# ----------------------------------------------------------------------------
# Run folders.


def measured_run(folder, size):
    folder.mkdir(parents=True)
    options = {"dataset_kwargs": {"max_size": size}, "total_nimg": 1000 * size}
    (folder / "training_options.json").write_text(json.dumps(options))
    record = {"kimg": 1, "snapshot": "s", "num_memorized": 1, "num_samples": 2, "reference_size": size}
    (folder / "mem_traj.jsonl").write_text(json.dumps(record) + "\n")


def test_linked_run_folders_are_found(tmp_path):
    for size in (8, 16, 32):
        measured_run(tmp_path / f"store/r{size}", size)
    runs = tmp_path / "runs"
    measured_run(runs / "r64", 64)
    (runs / "group").symlink_to(tmp_path / "store")
    (runs / "a16").symlink_to(tmp_path / "store/r16")  # once
    (runs / "again").symlink_to("r64")
    (runs / "loop").symlink_to(runs)
    (runs / "up").symlink_to("..")
    (runs / "root").symlink_to("/")
    (runs / "gone").symlink_to("nowhere")
    found, left_out = find_runs([runs])
    assert [run.relative_to(runs).as_posix() for run in found] == ["a16", "group/r32", "group/r8", "r64"]
    assert not left_out and sorted(read_run(run).size for run in found) == [8, 16, 32, 64]
    assert len(find_runs([runs, tmp_path / "store", runs / "a16"])[0]) == 4


# ----------------------------------------------------------------------------
# Every program ends with what it left out.


def test_curves_say_what_they_leave_out(run_cli, tmp_path):
    for size, ratio in ((8, 9), (16, 6), (32, 1)):
        measured_run(tmp_path / f"runs/{size}", size)
        path = tmp_path / f"runs/{size}/mem_traj.jsonl"
        record = json.loads(path.read_text()) | {"num_memorized": ratio, "num_samples": 10}
        path.write_text("".join(json.dumps(record | {"seeds": seeds}) + "\n" for seeds in ("0-9", "10-19")))
    (tmp_path / "runs/new").mkdir()
    (tmp_path / "runs/new/training_options.json").write_text("{}")
    sentence = "Left out: 1 run folder, 3 measurements of snapshots that were measured more than once."
    counts = {RUN_FOLDERS: 1, OTHER_MEASUREMENTS: 3}
    for command in ("curve", "trajectory"):
        out = run_cli(emm.main, [command, f"{tmp_path}/runs", f"--out={tmp_path}/{command}.png"]).stdout
        assert out.splitlines()[-1] == sentence
        record = json.loads((tmp_path / f"{command}.json").read_text())
        assert record["left_out_counts"] == counts and list(record["left_out"]) == [f"{tmp_path}/runs/new"]
    out = run_cli(emm.main, ["report", f"{tmp_path}/runs", f"--out={tmp_path}/r.html"]).stdout
    assert out.splitlines()[-1] == sentence and sentence in (tmp_path / "r.html").read_text()
    out = run_cli(emm.main, ["curve", f"{tmp_path}/runs/8", f"{tmp_path}/runs/16", f"--out={tmp_path}/c.png"]).stdout
    assert out.splitlines()[-1] == "Left out: 2 measurements of snapshots that were measured more than once."


def test_the_optimum_says_what_is_left_out_of_its_images(run_cli, tmp_path):
    images = {f"{i}.png": 40 * i for i in range(5)} | {"again.png": 40}
    clean, foreign = (
        write(tmp_path / "clean", images),
        write(tmp_path / "more", images | {"x.heic": b"?", "._0.png": 1}),
    )
    for source, said in ((clean, "nothing"), (foreign, f"1 {files_module.HIDDEN}, 1 {files_module.OTHER_FORMAT}")):
        args = [f"--network={source}", "--seeds=0-3", "--steps=2", "--device=cpu"]
        out = run_cli(generate_optim.main, [*args, f"--outdir={tmp_path}/out", f"--trace={tmp_path}/t.csv"]).stdout
        assert out.splitlines()[-1] == f"Left out: {said}."
        log = tmp_path / f"log-{source.name}/mem_traj.log"
        out = run_cli(mem_ratio.main, [*args, f"--log={log}"]).stdout
        assert out.splitlines()[-1] == f"Left out: {said}."
        record = json.loads(log.with_suffix(".jsonl").read_text())
        assert (" 1 " in f" {said}") == ("left_out" in record)
    assert record["left_out"] == {files_module.HIDDEN: 1, files_module.OTHER_FORMAT: 1}
    out = run_cli(mem_ratio.main, [*args, f"--log={tmp_path}/u/mem_traj.log", "--unique"]).stdout
    assert "1 training images that repeat another one" in out.splitlines()[-1]
    record = json.loads((tmp_path / "u/mem_traj.jsonl").read_text())
    assert record["left_out"]["training images that repeat another one"] == 1
    out = run_cli(mem_ratio.main, [*args[:1], *args[2:], "--seeds=0-499", f"--log={log}", "--adaptive=0.1"]).stdout
    record = json.loads(log.with_suffix(".jsonl").read_text().splitlines()[-1])
    spared = 500 - record["num_samples"]
    assert 0 < spared == record["left_out"]["images of which the verdict had no need"]
    assert f"{spared} images of which the verdict had no need" in out.splitlines()[-1]
