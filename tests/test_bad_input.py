"""Bad input to every command: one line that says what is wrong and what to do, and nothing is left behind.

A case is a name, the files that it needs beside `data.zip`, `net.safetensors` and the measured run `run`, a command
line, and words that the message must hold. `CASES` is checked by one test, for all cases alike.
"""

import hashlib
import importlib
import json
import os
import pickle
import resource
import shlex
import signal
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from bad_files import (
    COLOUR,
    GRAY,
    PNG,
    Call,
    bomb_zip,
    change_snapshot,
    chunk,
    cifar,
    dataset_zip,
    encode,
    encrypted_zip,
    flipped,
    frames,
    hostile_pickle,
    idx,
    make_zip,
    npy_header,
    npz,
    raw_png,
    tar_gz,
    zeros_gz,
)
from click.testing import CliRunner
from conftest import png

FOLDER, PIPE = object(), object()  # what a file can be instead
MEMORY = 512 << 20  # bytes that a command may ask for, beyond what is taken already
COMMANDS = {
    name: f"dataset_utils.{name}"
    for name in ("dataset_size", "dataset_dimension", "dataset_diversity", "dataset_random", "dataset_unique",
                 "dataset_inject", "intra_diversity", "sample_imagenet")
} | {"snapshot": "training.snapshots.snapshot"}  # fmt: skip


def transparent(mode):
    image = COLOUR.convert(mode)
    image.putalpha(254)
    return image


class Link:
    """A symbolic link."""

    def __init__(self, target):
        self.target = target


def command(name):
    return importlib.import_module(COMMANDS.get(name, name)).main


# ----------------------------------------------------------------------------
# Images and folders of images.

TOOL = "dataset_tool --source={} --dest=out.zip"
FOLDER_TO_ZIP = TOOL.format("in")


def one(name, content, words, line=FOLDER_TO_ZIP):
    """A case with one bad image beside a good one."""
    return {"in/0.png": PNG, f"in/{name}": content}, line, words


IMAGES = {
    "image: text": one("1.png", b"not an image", "in/1.png not an image of a known format"),
    "image: empty": one("1.png", b"", "in/1.png not an image"),
    "image: cut in the header": one("1.png", PNG[:20], "in/1.png"),
    "image: cut in the pixels": one("1.png", png(np.random.RandomState(0).randint(0, 256, [32, 32],
        dtype=np.uint8))[:600], "in/1.png cannot be decoded"),
    "image: cut jpeg": one("1.jpg", encode(COLOUR.resize((64, 64)), "jpeg")[:500], "in/1.jpg cannot be decoded"),
    "image: cut gif": one("1.gif", encode(COLOUR, "gif")[:-40], "in/1.gif"),
    "image: cut webp": one("1.webp", encode(COLOUR, "webp")[:30], "in/1.webp"),
    "image: no pixels": one("1.png", raw_png(rows=b""), "in/1.png cannot be decoded"),
    "image: wrong checksum": one("1.png", flipped(PNG, 20), "in/1.png"),
    "image: pixels that are no zlib": one("1.png", raw_png(rows=b"\0" * 50), "in/1.png cannot be decoded"),
    "image: zero wide": one("1.png", raw_png(width=0), "in/1.png"),
    "image: zero high": one("1.png", raw_png(height=0), "in/1.png"),
    "image: zero by zero": one("1.png", raw_png(width=0, height=0), "in/1.png"),
    "image: 4 gigapixels announced": one("1.png", raw_png(60000, 60000, rows=b""), "in/1.png too large"),
    "image: 100 megapixels announced": one("1.png", raw_png(10000, 10000, rows=b""), "in/1.png too large"),
    "image: 2^31 - 1 wide": one("1.png", raw_png((1 << 31) - 1, 1, rows=b""), "in/1.png"),
    "image: text chunk that is a bomb": one("1.png", raw_png(extra=chunk(b"zTXt",
        b"a\0\0" + zlib.compress(bytes(1 << 26)))), "in/1.png cannot be decoded"),
    "image: 16 bits gray": one("1.png", encode(PIL.Image.fromarray(np.full([8, 8], 3000, dtype=np.uint16))),
        "in/1.png 8 bits"),
    "image: 16 bits RGB": one("1.png", raw_png(2, 2, 16, 2, rows=bytes(26)), "in/1.png 8 bits"),
    "image: 16 bits tiff": one("1.tif", encode(PIL.Image.fromarray(np.full([8, 8], 3000, dtype=np.uint16)), "tiff"),
        "in/1.tif 8 bits"),
    "image: floats": one("1.tiff", encode(COLOUR.convert("F"), "tiff"), "in/1.tiff 8 bits"),
    "image: LAB": one("1.tiff", encode(COLOUR.convert("LAB"), "tiff"), "in/1.tiff LAB gray or RGB"),
    "image: RGBA": one("1.png", encode(transparent("RGBA")), "in/1.png transparency save it"),
    "image: gray with alpha": one("1.png", encode(transparent("LA")), "in/1.png transparency"),
    "image: palette with alpha": one("1.png", encode(COLOUR.quantize(4), transparency=1), "in/1.png transparency"),
    "image: transparent colour": one("1.png", encode(COLOUR, transparency=COLOUR.getpixel((3, 4))),
        "in/1.png transparency"),
    "image: transparent gray": one("1.png", encode(PIL.Image.fromarray(GRAY), transparency=3), "in/1.png transparency"),
    "image: animated gif": one("1.gif", frames("gif"), "in/1.gif 2 frames single images"),
    "image: animated png": one("1.png", frames("png"), "in/1.png 2 frames"),
    "image: animated webp": one("1.webp", frames("webp"), "in/1.webp 2 frames"),
    "image: several pages": one("1.tiff", frames("tiff"), "in/1.tiff 2 frames"),
    "image: postscript called png": one("1.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        "in/1.png not an image"),
    "image: zip called png": one("1.png", make_zip(("0.png", PNG)), "in/1.png not an image"),
    "image: svg called png": one("1.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "in/1.png not an image"),
    "image: two sizes": one("1.png", png(GRAY[:4, :4]), "in/1.png 4x4 8x8 --resolution"),
    "image: gray and RGB": one("1.png", encode(COLOUR), "in/1.png RGB gray"),
    "image: not square": ({"in/0.png": png(GRAY[:4])}, FOLDER_TO_ZIP, "in/0.png 8x4 --resolution"),
    "image: no power of two": ({"in/0.png": png(GRAY[:7, :7])}, FOLDER_TO_ZIP, "in/0.png 7x7 --resolution"),
    "image: in a thread": one("1.png", b"text", "in/1.png not an image", FOLDER_TO_ZIP + " --workers=3"),
    "image: all too small": ({"in/0.png": PNG}, FOLDER_TO_ZIP + " --transform=center-crop-wide --resolution=16x8",
        "too small"),
    "image: bad, to a folder": one("1.png", b"text", "in/1.png not an image", "dataset_tool --source=in --dest=out"),
    "image: bad, in training": one("1.png", b"text", "in/1.png not an image", "train --data=in --outdir=out"),
    "image: bad, for the optimum": one("1.png", b"text", "in/1.png not an image",
        "generate_optim --network=in --outdir=out"),
    "image: sizes, in training": one("1.png", png(GRAY[:4, :4]), "1.png [1, 4, 4]", "train --data=in --outdir=out"),
    "image: sizes, for the optimum": one("1.png", png(GRAY[:4, :4]), "1.png [1, 4, 4]",
        "generate_optim --network=in --outdir=out"),
    "image: bad, for comparison": one("1.png", b"text", "in/1.png not an image", "mem_ratio --expdir=run --knn-ref=in"),
    "folder: empty": ({"in": FOLDER}, FOLDER_TO_ZIP, "in holds no images"),
    "folder: other files only": ({"in/readme.md": b"text"}, FOLDER_TO_ZIP, "in holds no images .png"),
    "folder: of an image's name": ({"in/0.png": FOLDER}, FOLDER_TO_ZIP, "in holds no images"),
    "folder: dangling link": one("1.png", Link("nowhere.png"), "in/1.png no regular file"),
    "folder: link to itself": one("1.png", Link("1.png"), "in/1.png links"),
    "folder: link to a device": one("1.png", Link("/dev/zero"), "in/1.png no regular file"),
    "folder: link to a pipe": one("1.png", PIPE, "in/1.png no regular file"),
    "folder: huge sparse file": one("1.png", (1 << 40), "in/1.png too large"),
    "folder: itself a dangling link": ({"in": Link("nowhere")}, FOLDER_TO_ZIP, "in does not exist"),
    "folder: itself a loop": ({"in": Link("in")}, FOLDER_TO_ZIP, "in does not exist"),
    "folder: data.json is a pipe": ({"in/0.png": PNG, "in/dataset.json": PIPE}, FOLDER_TO_ZIP,
        "dataset.json no regular file"),
    "folder: dataset.json is a dangling link": ({"in/0.png": PNG, "in/dataset.json": Link("x")}, FOLDER_TO_ZIP,
        "dataset.json no regular file"),
}  # fmt: skip


# ----------------------------------------------------------------------------
# Zips.


ZIP_TO_ZIP = TOOL.format("in.zip")


def zipped(content, words, line=ZIP_TO_ZIP):
    return {"in.zip": content}, line, words


ZIPS = {
    "zip: text": zipped(b"this is text", "in.zip neither a folder nor a readable zip"),
    "zip: empty file": zipped(b"", "in.zip readable zip"),
    "zip: no entries": zipped(make_zip(), "in.zip holds no images"),
    "zip: cut": zipped(dataset_zip()[:-30], "in.zip readable zip"),
    "zip: beginning lost": zipped(dataset_zip()[100:], "cannot be read"),
    "zip: wrong CRC": zipped(flipped(make_zip(("a/0.png", PNG)), 60), "a/0.png in.zip cannot be read CRC"),
    "zip: wrong CRC of dataset.json": zipped(dataset_zip().replace(b'{"labels"', b'{"Labels"'),
        "dataset.json in.zip CRC"),
    "zip: encrypted": zipped(encrypted_zip(dataset_zip()), "in.zip encrypted without a password"),
    "zip: 10,000 empty entries": zipped(lambda: make_zip(*((f"{i}.png", b"") for i in range(10_000))),
        "0.png not an image"),
    "zip: 10,000 other entries": zipped(lambda: make_zip(*((f"{i}.txt", b"") for i in range(10_000))),
        "in.zip holds no images"),
    "zip: two members of a name": zipped(make_zip(("0.png", PNG), ("0.png", PNG)), "in.zip two files 0.png anew"),
    "zip: two dataset.json": zipped(dataset_zip(more=[("dataset.json", b"{}")]), "in.zip two files dataset.json"),
    "zip: text as images": zipped(make_zip(("0.png", b"text")), "in.zip/0.png not an image"),
    "zip: zip in a zip": zipped(make_zip(("in.zip", dataset_zip())), "in.zip holds no images"),
    "zip: zip as an image": zipped(make_zip(("0.png", dataset_zip())), "0.png not an image"),
    "zip: bzip2": zipped(make_zip(("0.png", PNG), method=zipfile.ZIP_BZIP2), "0.png in.zip method deflate"),
    "zip: lzma": zipped(make_zip(("0.png", PNG), method=zipfile.ZIP_LZMA), "0.png in.zip method deflate"),
    "zip: unknown method": zipped(make_zip(("0.png", PNG)).replace(struct.pack("<HHH", 20, 0, 0), struct.pack("<HHH",
        20, 0, 77)), "0.png in.zip"),
    "zip: bomb of 2 GiB": zipped(lambda: bomb_zip(), "0.png in.zip unpacks to 2147483648 bytes too large"),
    "zip: bomb of 2 GiB that says 1000 bytes": zipped(lambda: bomb_zip(announced=1000), "0.png in.zip"),
    "zip: bomb of 2 GiB in dataset.json": zipped(lambda: bomb_zip("dataset.json"), "in.zip holds no images"),
    "zip: 1000 bytes that say 3 GiB": zipped(make_zip(("0.png", PNG)).replace(struct.pack("<II", len(PNG), len(PNG)),
        struct.pack("<II", len(PNG), 3 << 30)), "0.png in.zip too large"),
    "zip: bomb for training": zipped(lambda: bomb_zip(), "0.png in.zip too large", "train --data=in.zip --outdir=out"),
    "zip: name outside": zipped(make_zip(("../../0.png", PNG)), "in.zip ../../0.png outside"),
    "zip: name outside, hidden": zipped(make_zip(("a/../../0.png", PNG)), "in.zip a/../../0.png outside"),
    "zip: absolute name": zipped(make_zip(("/tmp/0.png", PNG)), "in.zip /tmp/0.png outside"),
    "zip: name outside, in training": zipped(make_zip(("../0.png", PNG)), "../0.png outside",
        "train --data=in.zip --outdir=out"),
    "zip: name outside, beside others": zipped(dataset_zip(more=[("../evil.sh", b"x")]), "../evil.sh outside"),
    "zip: cut, in training": zipped(dataset_zip()[:-30], "in.zip readable zip", "train --data=in.zip --outdir=out"),
    "zip: cut, for the optimum": zipped(dataset_zip()[:-30], "in.zip readable zip",
        "generate_optim --network=in.zip --outdir=out"),
    "zip: cut, for comparison": zipped(dataset_zip()[:-30], "in.zip readable zip",
        "mem_ratio --expdir=run --knn-ref=in.zip"),
    "zip: cut, in a subset": zipped(dataset_zip()[:-30], "in.zip readable zip",
        "dataset_size --source=in.zip --dest=out.zip"),
    "zip: cut, in a search": zipped(dataset_zip()[:-30], "in.zip readable zip",
        "emm search --source=in.zip --outdir=out --low=2 --high=4"),
    "zip: is a folder": ({"in.zip": FOLDER}, TOOL.format("in.zip"), "in.zip holds no images"),
    "zip: is a pipe": ({"in.zip": PIPE}, TOOL.format("in.zip"), "in.zip no regular file"),
    "zip: is a pipe, in training": ({"in.zip": PIPE}, "train --data=in.zip --outdir=out", "in.zip no regular file"),
    "zip: is a device": ({"in.zip": Link("/dev/zero")}, TOOL.format("in.zip"), "in.zip no regular file"),
    "zip: is missing": ({}, TOOL.format("lost.zip"), "lost.zip does not exist"),
    "zip: is missing, in training": ({}, "train --data=lost.zip --outdir=out", "lost.zip does not exist"),
    "zip: unreadable name": ({}, "train --data=" + 300 * "x" + ".zip --outdir=out", "xxx.zip"),
}  # fmt: skip


# ----------------------------------------------------------------------------
# dataset.json.


def labelled(content, words, line="dataset_size --source=in.zip --dest=out.zip"):
    """Labels for the images 0 to 3, or the bytes of dataset.json."""
    return {"in.zip": dataset_zip(labels=content)}, line, words


def grouped(groups, words):
    names = [f"00000/img{i:08d}.png" for i in range(4)]
    content = {"labels": None, "groups": groups if not callable(groups) else groups(names)}
    data = dataset_zip(labels=json.dumps(content).encode())
    return {"in.zip": data}, TOOL.format("in.zip"), f"groups dataset.json {words}"


COND = "train --data=in.zip --outdir=out --cond=1"
LABELS = {
    "json: text": labelled(b"labels", "dataset.json in.zip JSON"),
    "json: cut": labelled(b'{"labels": [["a', "dataset.json in.zip JSON"),
    "json: empty": labelled(b"", "dataset.json in.zip JSON"),
    "json: not UTF-8": labelled(b'{"labels": "\xff\xfe\xfa"}', "dataset.json in.zip JSON"),
    "json: a list": labelled(b"[]", "dataset.json in.zip labels"),
    "json: a number": labelled(b"3", "dataset.json in.zip labels"),
    "json: without labels": labelled(b"{}", "dataset.json in.zip form labels"),
    "json: labels are a number": labelled(b'{"labels": 3}', "dataset.json in.zip form"),
    "json: labels are a mapping": labelled(b'{"labels": {"0.png": 1}}', "dataset.json in.zip form"),
    "json: no pairs": labelled(b'{"labels": [1, 2, 3, 4]}', "dataset.json in.zip form"),
    "json: triples": labelled(b'{"labels": [["a", 1, 2]]}', "dataset.json in.zip form"),
    "json: numbers for names": labelled(b'{"labels": [[1, 2]]}', "dataset.json in.zip form"),
    "json: nested 100,000 deep": labelled(b"[" * 100_000, "dataset.json in.zip JSON"),
    "json: labels nested deeply": labelled(b'{"labels": [["a", ' + b"[" * 50_000 + b"]" * 50_000 + b"]]}",
        "dataset.json in.zip JSON"),
    "json: an image twice": labelled(b'{"labels": [["00000/img00000000.png", 1], ["00000/img00000000.png", 2]]}',
        "dataset.json in.zip more than one"),
    "json: 100,000 digits": labelled(b'{"labels": [["a", ' + b"1" * 100_000 + b"]]}", "dataset.json in.zip JSON"),
    "labels: too few": labelled([0, 1, 1], "img00000003.png no label dataset.json"),
    "labels: too few, in training": labelled([0, 1, 1], "dataset.json in.zip no label img00000003.png", COND),
    "labels: unknown names": labelled(b'{"labels": [["a.png", 0], ["b.png", 1]]}', "img00000000.png no label"),
    "labels: unknown names, in training": labelled(b'{"labels": [["a.png", 0]]}',
        "dataset.json no label img00000000.png", COND),
    "labels: null": labelled(b'{"labels": null}', "no label", COND),
    "labels: negative": labelled([0, -1, 0, 1], "dataset.json in.zip -1 whole numbers"),
    "labels: negative, in training": labelled([0, -1, 0, 1], "dataset.json in.zip -1 whole numbers", COND),
    "labels: floats": labelled([0, 1.5, 0, 1], "dataset.json in.zip 1.5 whole numbers"),
    "labels: whole floats": labelled([0, 1.0, 0, 1], "dataset.json in.zip 1.0 whole numbers", COND),
    "labels: NaN": labelled([0, float("nan"), 0, 1], "dataset.json in.zip nan whole numbers"),
    "labels: infinite": labelled([0, float("inf"), 0, 1], "dataset.json in.zip inf whole numbers", COND),
    "labels: text": labelled([0, "dog", 0, 1], "dataset.json in.zip dog whole numbers"),
    "labels: booleans": labelled([0, True, 0, 1], "dataset.json in.zip True whole numbers"),
    "labels: null among them": labelled([0, None, 0, 1], "img00000001.png no label"),
    "labels: null among them, in training": labelled([0, None, 0, 1], "dataset.json in.zip None", COND),
    "labels: a mapping": labelled([0, {"a": 1}, 0, 1], "dataset.json in.zip whole numbers"),
    "labels: mixed": labelled([0, [1.0], 0, 1], "dataset.json in.zip whole numbers", COND),
    "labels: huge": labelled([0, 10**30, 0, 1], "dataset.json in.zip 16777215"),
    "labels: 2^31 - 1": labelled([0, (1 << 31) - 1, 0, 1], "in.zip 2147483647 from 0 to 16777215", COND),
    "labels: classes without images, for the optimum": labelled([0, 5, 0, 1], "no image of class 2 --class",
        "generate_optim --network=in.zip --outdir=out --class=2"),
    "labels: vectors of two lengths": labelled([[1.0], [1.0, 2.0], [1.0], [1.0]], "dataset.json in.zip length", COND),
    "labels: empty vectors": labelled([[], [], [], []], "dataset.json in.zip non-empty", COND),
    "labels: NaN in a vector": labelled([[0.0], [float("nan")], [0.0], [0.0]], "dataset.json in.zip finite", COND),
    "labels: beyond float32": labelled([[0.0], [1e300], [0.0], [0.0]], "dataset.json in.zip finite", COND),
    "labels: nested vectors": labelled([[[0.0]], [[0.0]], [[0.0]], [[0.0]]], "dataset.json in.zip lists of numbers",
        COND),
    "labels: vectors where classes are needed": labelled([[0.0], [1.0], [0.0], [1.0]], "vectors class"),
    "labels: vectors, for the optimum": labelled([[0.0], [1.0], [0.0], [1.0]], "in.zip integer class labels",
        "generate_optim --network=in.zip --outdir=out --class=2"),
    "labels: uneven": labelled([0, 0, 0, 1], "3 images class 1",
        "dataset_size --source=in.zip --dest=out.zip --max-images=6"),
    "labels: too few classes": labelled([0, 0, 1, 1], "3 classes only 2",
        "dataset_diversity --source=in.zip --dest=out.zip --num-classes=3"),
    "groups: a number": grouped(3, "form"),
    "groups: no pairs": grouped(["a", "b"], "form"),
    "groups: numbers for groups": grouped(lambda names: [[n, 1] for n in names], "form"),
    "groups: an image left out": grouped(lambda names: [[n, "a"] for n in names[:3]], "img00000003.png add"),
    "groups: an image twice": grouped(lambda names: [[n, "a"] for n in [*names, names[0]]], "more than one"),
}  # fmt: skip


# ----------------------------------------------------------------------------
# CIFAR-10, MNIST, lists, LSUN, arrays.


def tarred(content, words):
    return {"in.tar.gz": content}, TOOL.format("in.tar.gz"), f"in.tar.gz {words}"


def mnist(images=None, labels=None, words=""):
    pictures = np.zeros([2, 28, 28], dtype=np.uint8)
    files = {"t10k-images-idx3-ubyte.gz": idx(pictures) if images is None else images}
    if labels is not False:
        files["t10k-labels-idx1-ubyte.gz"] = idx(np.array([1, 2], dtype=np.uint8)) if labels is None else labels
    return files, TOOL.format("t10k-images-idx3-ubyte.gz"), words


def arrays(content, words, more=""):
    return {"in.npz": content}, f"generate_optim --network=in.npz --outdir=out {more}", f"in.npz {words}"


BATCH = "cifar-10-batches-py/data_batch_1"
TWO = np.zeros([2, 28, 28], dtype=np.uint8)
FOUR = np.zeros([4, 1, 8, 8], dtype=np.uint8)
SOURCES = {
    "cifar: text": tarred(b"this is text", "cannot be read as a .tar.gz"),
    "cifar: empty": tarred(b"", "cannot be read as a .tar.gz"),
    "cifar: cut": tarred(cifar()[:-100], "cannot be read as a .tar.gz"),
    "cifar: wrong checksum": tarred(flipped(cifar(), -6), "cannot be read as a .tar.gz"),
    "cifar: zip called tar.gz": tarred(dataset_zip(), "cannot be read as a .tar.gz"),
    "cifar: without batches": tarred(tar_gz(("a/test_batch", b"")), "none of the CIFAR-10 batches"),
    "cifar: batch twice": tarred(tar_gz((BATCH, b"x"), (f"b/{BATCH}", b"x")), "twice"),
    "cifar: bomb": tarred(lambda: tar_bomb(), "data_batch_1 too large"),
    "cifar: bomb in a header": tarred(lambda: pax_bomb(), "too large"),
    "cifar: batch is a link": tarred(tar_gz((BATCH, tarfile.SYMTYPE, "/etc/passwd")), "none of the CIFAR-10 batches"),
    "cifar: batch is a hard link": tarred(tar_gz((BATCH, tarfile.LNKTYPE, "/etc/passwd")),
        "none of the CIFAR-10 batches"),
    "cifar: batch is a device": tarred(tar_gz((BATCH, tarfile.CHRTYPE, "")), "none of the CIFAR-10 batches"),
    "cifar: batch is a folder": tarred(tar_gz((BATCH, tarfile.DIRTYPE, "")), "none of the CIFAR-10 batches"),
    "cifar: empty batch": tarred(tar_gz((BATCH, b"")), "data_batch_1 no CIFAR-10 batch"),
    "cifar: mkdir": tarred(tar_gz((BATCH, hostile_pickle())), "data_batch_1 mkdir refused"),
    "cifar: system": tarred(tar_gz((BATCH, pickle.dumps(Call(os.system, "touch ran")))), "data_batch_1 system refused"),
    "cifar: eval": tarred(tar_gz((BATCH, pickle.dumps(Call(eval, "open('ran', 'w')")))), "data_batch_1 eval refused"),
    "cifar: mkdir in the labels": tarred(cifar(labels=Call(os.mkdir, "ran")), "data_batch_1 mkdir refused"),
    "cifar: mkdir at an absolute name": tarred(tar_gz(("/" + BATCH, hostile_pickle())), "data_batch_1 mkdir refused"),
    "cifar: mkdir at a name outside": tarred(tar_gz(("../../data_batch_1", hostile_pickle())),
        "data_batch_1 mkdir refused"),
    "cifar: memo of 16 GiB": tarred(tar_gz((BATCH, b"\x80\x02]r\xff\xff\xff\x3f.")), "data_batch_1 no CIFAR-10 batch"),
    "cifar: objects": tarred(cifar(data=np.array([{}], dtype=object)), "data_batch_1 numbers"),
    "cifar: floats": tarred(cifar(data=np.zeros([3, 3072])), "data_batch_1 uint8"),
    "cifar: wrong shape": tarred(cifar(data=np.zeros([3, 9], dtype=np.uint8)), "data_batch_1 [n, 3072]"),
    "cifar: labels too few": tarred(cifar(labels=[0]), "data_batch_1 3 images but 1 labels"),
    "cifar: label 10": tarred(cifar(labels=[0, 1, 10]), "data_batch_1 0 to 9"),
    "cifar: is a folder": ({"in.tar.gz": FOLDER}, TOOL.format("in.tar.gz"), "in.tar.gz holds no images"),
    "cifar: is a pipe": ({"in.tar.gz": PIPE}, TOOL.format("in.tar.gz"), "in.tar.gz no regular file"),
    "mnist: text": mnist(b"text", words="t10k-images-idx3-ubyte.gz gzipped MNIST"),
    "mnist: labels missing": mnist(labels=False, words="t10k-labels-idx1-ubyte.gz missing beside"),
    "mnist: labels are a folder": mnist(labels=FOLDER, words="t10k-labels-idx1-ubyte.gz missing"),
    "mnist: labels are text": mnist(labels=b"text", words="t10k-labels-idx1-ubyte.gz gzipped MNIST"),
    "mnist: too many labels": mnist(labels=idx(np.zeros(3, np.uint8)), words="2 images 3 labels"),
    "mnist: wrong magic": mnist(idx(TWO, magic=2049), words="t10k-images header"),
    "mnist: images as labels": mnist(labels=idx(TWO), words="t10k-labels header"),
    "mnist: header cut": mnist(zeros_gz(0, b"\0\0\x08"), words="t10k-images gzipped MNIST"),
    "mnist: cut": mnist(idx(np.random.RandomState(0).randint(0, 256, [2, 28, 28], np.uint8))[:-300],
        words="t10k-images gzipped MNIST"),
    "mnist: says more than it holds": mnist(idx(TWO, shape=[3, 28, 28]), words="t10k-images 2352 bytes holds 1568"),
    "mnist: says less than it holds": mnist(idx(TWO, shape=[1, 28, 28]), words="t10k-images 784 bytes holds more"),
    "mnist: says 10^28 bytes": mnist(idx(TWO, shape=[0xFFFFFFFF] * 3), words="t10k-images unpacks too large"),
    "mnist: bomb of 2 GiB": mnist(lambda: zeros_gz(2048, struct.pack(">4I", 2051, 1 << 16, 1 << 8, 1 << 7)),
        words="t10k-images unpacks too large"),
    "mnist: no images": mnist(idx(TWO[:0]), idx(np.zeros(0, np.uint8)), "t10k-images holds no images"),
    "mnist: images without pixels": mnist(idx(TWO[:, :0]), words="t10k-images 28x0"),
    "list: missing file": ({"l.txt": b"data.zip\n\nlost.png\n"}, TOOL.format("l.txt"), "Line 3 l.txt lost.png"),
    "list: a folder": ({"l.txt": b"run\n"}, TOOL.format("l.txt"), "Line 1 l.txt run"),
    "list: a device": ({"l.txt": b"/dev/zero\n"}, TOOL.format("l.txt"), "Line 1 l.txt /dev/zero"),
    "list: a zip": ({"l.txt": b"data.zip\n"}, TOOL.format("l.txt"), "data.zip not an image"),
    "list: NUL": ({"l.txt": b"a\0b.png\n"}, TOOL.format("l.txt"), "Line 1 l.txt"),
    "list: a line of 100,000 letters": ({"l.txt": b"x" * 100_000}, TOOL.format("l.txt"), "Line 1 l.txt"),
    "list: empty": ({"l.txt": b"\n \n"}, TOOL.format("l.txt"), "l.txt holds no images"),
    "list: binary": ({"l.txt": b"\xff\xfe\0\1"}, TOOL.format("l.txt"), "l.txt no text file"),
    "list: is a folder": ({"l.txt": FOLDER}, TOOL.format("l.txt"), "l.txt holds no images"),
    "list: dangling link": ({"a.png": Link("x"), "l.txt": b"a.png"}, TOOL.format("l.txt"), "Line 1 l.txt a.png"),
    "lmdb: empty folder": ({"x_lmdb": FOLDER}, TOOL.format("x_lmdb"), "x_lmdb holds no images"),
    "lmdb: text": ({"x_lmdb/data.mdb": b"text" * 5000}, TOOL.format("x_lmdb"), "x_lmdb lmdb"),
    "lmdb: cut": ({"x_lmdb/data.mdb": lambda: lmdb_file()[:12288]}, TOOL.format("x_lmdb"), "x_lmdb cut short"),
    "source: unknown kind": ({"in.rar": b"Rar!"}, TOOL.format("in.rar"), "in.rar no known kind .zip"),
    "source: empty name": ({}, TOOL.format(""), "does not exist"),
    "npz: text": arrays(b"text", "cannot be read as .npz"),
    "npz: empty": arrays(b"", "cannot be read as .npz"),
    "npz: cut": arrays(npz(images=FOUR)[:-30], "cannot be read as .npz"),
    "npz: zip of images": arrays(dataset_zip(), 'no array images np.savez'),
    "npz: objects": arrays(npz(images=np.array([{}])), "cannot be read as .npz"),
    "npz: mkdir": arrays(make_zip(("images.npy",
        npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + hostile_pickle())),
        "cannot be read as .npz"),
    "npz: a pickle": arrays(hostile_pickle(), "cannot be read as .npz"),
    "npz: header of 1 TB": arrays(make_zip(("images.npy",
        npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 1, 1, 1)}"))),
        "cannot be read as .npz"),
    "npz: header is code": arrays(make_zip(("images.npy", npy_header("__import__('os').mkdir('ran')"))),
        "cannot be read as .npz"),
    "npz: bomb of 2 GiB": arrays(lambda: bomb_zip("images.npy"), "unpacks too large"),
    "npz: another name": arrays(npz(pictures=FOUR), "no array images"),
    "npz: floats": arrays(npz(images=FOUR.astype(np.float32)), "uint8 [N, C, H, W]"),
    "npz: two dimensions": arrays(npz(images=FOUR[0, 0]), "uint8 [N, C, H, W]"),
    "npz: not square": arrays(npz(images=FOUR[..., :4]), "[N, C, H, W]"),
    "npz: no images": arrays(npz(images=FOUR[:0]), "[N, C, H, W]"),
    "npz: labels too few": arrays(npz(images=FOUR, labels=np.arange(3)), "labels [3] 4 images", "--cond=1"),
    "npz: text labels": arrays(npz(images=FOUR, labels=np.array(["a"] * 4)), "labels not numbers", "--cond=1"),
    "npz: float labels": arrays(npz(images=FOUR, labels=np.arange(4) + 0.5), "labels", "--cond=1"),
    "npz: NaN labels": arrays(npz(images=FOUR, labels=np.full(4, np.nan)), "labels", "--cond=1"),
    "npz: negative labels": arrays(npz(images=FOUR, labels=np.arange(4) - 1), "integer class labels --cond=1",
        "--cond=1"),
    "npz: two-dimensional labels": arrays(npz(images=FOUR, labels=np.zeros([4, 2], int)), "labels", "--cond=1"),
    "npz: without labels": arrays(npz(images=FOUR), "--cond=1", "--cond=1"),
    "npz: is a folder": ({"in.npz": FOLDER}, "generate_optim --network=in.npz --outdir=out", "in.npz"),
    "npz: is a pipe": ({"in.npz": PIPE}, "generate_optim --network=in.npz --outdir=out", "in.npz no regular file"),
    "npz: floats, for comparison": ({"in.npz": npz(images=FOUR.astype(float))},
        "mem_ratio --expdir=run --knn-ref=in.npz", "in.npz uint8"),
    "npz: objects as labels, for comparison": ({"in.npz": npz(images=FOUR, labels=np.array([{}] * 4))},
        "mem_ratio --expdir=run --knn-ref=in.npz", "in.npz cannot be read"),
}  # fmt: skip


def tar_bomb():
    """2 GiB of zeros as a batch."""
    info = tarfile.TarInfo(BATCH)
    info.size = 2 << 30
    return zeros_gz(2048, info.tobuf(tarfile.USTAR_FORMAT))


def pax_bomb():
    """2 GiB of zeros as the extended header of a member."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.size, info.type = 2 << 30, tarfile.XHDTYPE
    return zeros_gz(2048, info.tobuf(tarfile.USTAR_FORMAT))


def lmdb_file():
    import lmdb

    with lmdb.open("made", map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        for i in range(40):
            transaction.put(b"%d" % i, bytes(1000) + PNG)
    data = Path("made/data.mdb").read_bytes()
    for path in Path("made").iterdir():
        path.unlink()
    Path("made").rmdir()
    return data


# ----------------------------------------------------------------------------
# Snapshots and training states. Where a file is a function of `good`, that holds the good files.

GENERATE = "generate --network={} --outdir=out --seeds=0-1 --steps=1"
WEIGHT = "model.map_layer0.weight"


X = GENERATE.format("x.safetensors")


def snapshot(content, words, line=X):
    return {"x.safetensors": content}, line, f"x.safetensors {words}"


def changed(words, **how):
    return snapshot(lambda good: change_snapshot(good["net.safetensors"], **how), words)


def network(words, **arguments):
    return changed(words, header=lambda content: content["network"].update(arguments))


def with_header(words, **entries):
    return changed(words, header=lambda content: content.update(entries))


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_nan(good):
    return change_snapshot(good["net.safetensors"], tensors={WEIGHT: torch.full([32, 8], torch.nan)})


def nested(depth):
    return "[" * depth + "]" * depth


SNAPSHOTS = {
    "snapshot: missing": ({}, GENERATE.format("lost.safetensors"), "lost.safetensors does not exist"),
    "snapshot: empty": snapshot(b"", "cut short"),
    "snapshot: text": snapshot(b"this is text, of some length", "cut short or not a safetensors"),
    "snapshot: cut": snapshot(lambda good: good["net.safetensors"][:-100], "cut short"),
    "snapshot: cut in the header": snapshot(lambda good: good["net.safetensors"][:500], "cut short"),
    "snapshot: longer": snapshot(lambda good: good["net.safetensors"] + b"x", "not a safetensors"),
    "snapshot: header of 2^60 bytes": snapshot(struct.pack("<Q", 1 << 60) + b"{}", "not a safetensors"),
    "snapshot: header is no JSON": snapshot(safetensors_bytes(b"{weights"), "not a safetensors"),
    "snapshot: tensors overlap": snapshot(safetensors_bytes({n: {"dtype": "F32", "shape": [1], "data_offsets": [0,
        4]} for n in "ab"}, bytes(4)), "not a safetensors"),
    "snapshot: tensor beyond the end": snapshot(safetensors_bytes({"a": {"dtype": "F32", "shape": [9],
        "data_offsets": [0, 36]}}, bytes(4)), "not a safetensors"),
    "snapshot: negative offsets": snapshot(safetensors_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4,
        0]}}, bytes(4)), "not a safetensors"),
    "snapshot: shape and size disagree": snapshot(safetensors_bytes({"a": {"dtype": "F32", "shape": [2],
        "data_offsets": [0, 4]}}, bytes(4)), "not a safetensors"),
    "snapshot: unknown type": snapshot(safetensors_bytes({"a": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 4]}},
        bytes(4)), "not a safetensors"),
    "snapshot: of another project": snapshot(safetensors.torch.save({"a": torch.zeros(1)}), "no snapshot header"),
    "snapshot: header is a list": changed("no snapshot header", header=lambda _: "[]"),
    "snapshot: header is cut": changed("no snapshot header", header=lambda _: '{"format": 1'),
    "snapshot: header nested deeply": changed("no snapshot header", header=lambda _: nested(100_000)),
    "snapshot: header without network": changed("no snapshot header", header=lambda _: '{"format": 1}'),
    "snapshot: version 99": with_header("format 99 reads format 1", format=99),
    "snapshot: version is text": with_header("format", format="new"),
    "snapshot: network is a number": with_header("no snapshot header", network=3),
    "snapshot: dataset is a number": with_header("no snapshot header", dataset=3),
    "snapshot: unknown class": network("class os.system", class_name="os.system"),
    "snapshot: unknown model": network("cannot be built model_type", model_type="os"),
    "snapshot: unknown argument": network("cannot be built depth", depth=3),
    "snapshot: 10^9 channels": network("cannot be built model_channels", model_channels=10**9),
    "snapshot: 65,536 channels": network(f"{WEIGHT} shape", model_channels=65536),
    "snapshot: 10^9 blocks": network("cannot be built num_blocks", num_blocks=10**9),
    "snapshot: text for a number": network("cannot be built img_resolution", img_resolution="8"),
    "snapshot: NaN for a number": network("cannot be built dropout", dropout=float("nan")),
    "snapshot: negative label_dim": network("cannot be built label_dim", label_dim=-1),
    "snapshot: tensor missing": changed(f"lacks {WEIGHT}", drop=[WEIGHT]),
    "snapshot: tensor unexpected": changed("unexpected model.more", tensors={"model.more": torch.zeros(1)}),
    "snapshot: wrong shape": changed(f"{WEIGHT} shape [2, 2]", tensors={WEIGHT: torch.zeros(2, 2)}),
    "snapshot: integers": changed(f"{WEIGHT} type torch.int64", tensors={WEIGHT: torch.zeros(32, 8,
        dtype=torch.int64)}),
    "snapshot: NaN among the weights": changed(f"{WEIGHT} not finite earlier snapshot", tensors={WEIGHT: torch.full([32,
        8], torch.nan)}),
    "snapshot: infinite weights": changed(f"{WEIGHT} not finite earlier snapshot", tensors={WEIGHT: torch.full([32, 8],
        torch.inf)}),
    "snapshot: a folder": snapshot(FOLDER, "is a folder network-snapshot"),
    "snapshot: a pipe": snapshot(PIPE, "no regular file"),
    "snapshot: a device": snapshot(Link("/dev/zero"), "no regular file"),
    "snapshot: a dangling link": snapshot(Link("x"), "does not exist"),
    "snapshot: a link to itself": snapshot(Link("x.safetensors"), "does not exist"),
    "snapshot: a zip": snapshot(dataset_zip(), "not a safetensors"),
    "snapshot: a pickle in disguise": snapshot(hostile_pickle(), "not a safetensors"),
    "snapshot: a hostile pickle": ({"x.pkl": hostile_pickle()}, GENERATE.format("x.pkl"),
        "x.pkl mkdir nothing of it was loaded"),
    "snapshot: a pickle without extension": ({"x": hostile_pickle()}, GENERATE.format("x"),
        "x mkdir nothing of it was loaded"),
    "snapshot: a cut pickle": ({"x.pkl": hostile_pickle()[:-3]}, GENERATE.format("x.pkl"), "x.pkl"),
    "snapshot: cut, shown": snapshot(lambda good: good["net.safetensors"][:-9], "cut short", "snapshot x.safetensors"),
    "snapshot: cut, converted": snapshot(lambda good: good["net.safetensors"][:-9], "cut short",
        "snapshot x.safetensors --dest=y.safetensors"),
    "snapshot: cut, for a transfer": snapshot(lambda good: good["net.safetensors"][:-9], "cut short",
        "train --data=data.zip --outdir=out --transfer=x.safetensors"),
    "snapshot: other network, for a transfer": ({}, "train --data=data.zip --outdir=out --transfer=net.safetensors",
        "net.safetensors lacks"),
    "snapshot: all cut, measured": ({"run/network-snapshot-000001.safetensors": b"cut"},
        "mem_ratio --expdir=run --knn-ref=data.zip", "network-snapshot-000001 cut short"),
    "snapshot: NaN, measured": ({"run/network-snapshot-000001.safetensors": lambda good: with_nan(good)},
        "mem_ratio --expdir=run --knn-ref=data.zip", "network-snapshot-000001 not finite"),
    "snapshot: folder of the name, measured": ({"run/network-snapshot-000001.safetensors": FOLDER},
        "mem_ratio --expdir=run --knn-ref=data.zip", "network-snapshot-000001 folder"),
    "snapshot: a dataset": ({}, GENERATE.format("data.zip"), "data.zip not a safetensors"),
    "snapshot: as a dataset": ({}, "generate_optim --network=net.safetensors --outdir=out",
        "net.safetensors neither a folder nor a readable zip"),
}  # fmt: skip


def state(content, words, name="training-state-000001.pt"):
    return {name: content}, f"{TRAIN} --resume={name}", f"{name} {words}"


def saved(data):
    import io

    buffer = io.BytesIO()
    torch.save(data, buffer)
    return buffer.getvalue()


TRAIN = (
    "train --data=data.zip --outdir=out --cres=1,1 --num-channels=8 --num-blocks=1 --attn-resolutions=4 "
    "--batch=4 --duration=0.01 --tick=1 --device=cpu"
)
STATES = {
    "state: missing": ({}, f"{TRAIN} --resume=training-state-000001.pt", "training-state-000001.pt does not exist"),
    "state: another name": state(b"", "not named training-state", "state.pt"),
    "state: empty": state(b"", "cut short"),
    "state: text": state(b"text", "cut short or not a training state"),
    "state: cut": state(lambda good: saved({"a": torch.zeros(1000)})[:-300], "cut short"),
    "state: hostile pickle": state(hostile_pickle(), "not a training state"),
    "state: hostile pickle in torch's archive": state(lambda good: saved(Call(os.mkdir, "ran")),
        "not a training state"),
    "state: tensor only": state(lambda good: saved(torch.zeros(1)), "not a training state"),
    "state: empty mapping": state(lambda good: saved({}), "not a training state"),
    "state: version 99": state(lambda good: saved({"format": 99, "shared": {}, "ranks": [{}]}), "training state"),
    "state: without contents": state(lambda good: saved({"format": 1, "shared": {}, "ranks": [{}]}), "state"),
    "state: numbers for contents": state(lambda good: saved({"format": 1, "shared": 3, "ranks": 3}), "training state"),
    "state: of two processes": state(lambda good: saved({"format": 1, "shared": {}, "ranks": [{}, {}]}), ""),
    "state: a folder": state(FOLDER, ""),
    "state: a pipe": state(PIPE, ""),
    "state: a snapshot": state(lambda good: good["net.safetensors"], "not a training state"),
}  # fmt: skip


# ----------------------------------------------------------------------------
# Run folders.

CURVE = "emm curve run --out=c.png"


def options(change, words, line=CURVE):
    """training_options.json: bytes, or what is other than in the good one."""

    def content(good):
        return (
            change
            if isinstance(change, bytes)
            else json.dumps(json.loads(good["run/training_options.json"]) | change).encode()
        )

    return {"run/training_options.json": content}, line, f"training_options.json {words}"


def records(lines, words, line=CURVE):
    """mem_traj.jsonl: bytes, or what is other than in the good record."""

    def content(good):
        return (
            lines if isinstance(lines, bytes) else json.dumps(json.loads(good["run/mem_traj.jsonl"]) | lines).encode()
        )

    return {"run/mem_traj.jsonl": content}, line, f"mem_traj.jsonl {words}"


def trace(rows, words, header="size,seed,step,sigma,effective_number,nearest_index,weight\n"):
    content = rows if isinstance(rows, bytes) else (header + rows).encode()
    return {"t.csv": content}, "emm collapse t.csv --out=c.png", f"t.csv {words}"


def plan(content, words, line="emm search --source=data.zip --outdir=out --low=2 --high=4"):
    text = (
        content
        if isinstance(content, bytes)
        else json.dumps(
            {"format": 2, "settings": {}, "decisions": [], "started": {}, "result": None} | content
        ).encode()
    )
    return {"out/plan.json": text}, line, words


MEASURE = "mem_ratio --expdir=run --knn-ref=data.zip --seeds=0-1 --steps=1 --device=cpu"
RUNS = {
    "options: text": options(b"text", "max_size train.py"),
    "options: cut": options(b'{"dataset_kwargs": {', "max_size"),
    "options: empty": options(b"", "max_size"),
    "options: a list": options(b"[]", "max_size"),
    "options: not UTF-8": options(b"\xff\xfe\xfd", "max_size"),
    "options: nested deeply": options(b"[" * 100_000, "max_size"),
    "options: without |D|": options({"dataset_kwargs": {}}, "max_size"),
    "options: |D| is 0": options({"dataset_kwargs": {"max_size": 0}}, "max_size"),
    "options: |D| is negative": options({"dataset_kwargs": {"max_size": -4}}, "max_size"),
    "options: |D| is NaN": options({"dataset_kwargs": {"max_size": float("nan")}}, "max_size"),
    "options: |D| is infinite": options({"dataset_kwargs": {"max_size": float("inf")}}, "max_size"),
    "options: |D| is text": options({"dataset_kwargs": {"max_size": "4"}}, "max_size"),
    "options: |D| is true": options({"dataset_kwargs": {"max_size": True}}, "max_size"),
    "options: dataset is a list": options({"dataset_kwargs": []}, "max_size"),
    "options: duration is text": options({"total_nimg": "long"}, "total_nimg"),
    "options: duration is NaN": options({"total_nimg": float("nan")}, "total_nimg"),
    "options: network is a list": options({"network_kwargs": []}, "network_kwargs"),
    "options: a folder": ({"run/training_options.json": FOLDER}, CURVE, "No measured run"),
    "options: a dangling link": ({"run/training_options.json": Link("x")}, CURVE, "training_options.json"),
    "options: for a trajectory": options(b"text", "max_size", "emm trajectory run --out=c.png"),
    "options: to follow": options(b"text", "damaged", f"{MEASURE} --watch"),
    "options: a list, to follow": options(b"[]", "damaged", f"{MEASURE} --watch"),
    "options: nested deeply, to follow": options(b"[" * 100_000, "damaged", f"{MEASURE} --watch"),
    "run state: text": ({"run/run-state.json": b"text"}, f"{MEASURE} --watch", "run-state.json delete"),
    "run state: nested deeply": ({"run/run-state.json": b"[" * 100_000}, f"{MEASURE} --watch", "run-state.json delete"),
    "run state: a list": ({"run/run-state.json": b"[]"}, f"{MEASURE} --watch", "run-state.json delete"),
    "run state: a folder": ({"run/run-state.json": FOLDER}, f"{MEASURE} --watch", "run-state.json no regular file"),
    "records: empty": records(b"", "no measurement mem_ratio.py"),
    "records: only half a line": records(b'{"kimg": 1, "num', "no measurement"),
    "records: half a line before another": records(b'{"kimg": 1\n{"kimg": 2}\n', "Line 1 repair or delete"),
    "records: binary": records(b"\xff\xfe\n\xff\n", "Line 1 repair or delete"),
    "records: lists": records(b"[]\n[]\n", "Line 1 repair or delete"),
    "records: nested deeply": records(b"[" * 100_000 + b"\n{}\n", "Line 1 repair or delete"),
    "records: without counts": records(b'{"kimg": 1}\n', "lacks num_memorized"),
    "records: text for a count": records({"num_memorized": "3"}, "Line 1 num_memorized"),
    "records: more memorized than images": records({"num_memorized": 9}, "Line 1 num_memorized"),
    "records: no images": records({"num_samples": 0, "num_memorized": 0}, "Line 1 num_samples"),
    "records: negative counts": records({"num_memorized": -1}, "Line 1 num_memorized"),
    "records: NaN for a count": records({"num_samples": float("nan")}, "Line 1 num_samples"),
    "records: text for kimg": records({"kimg": "1"}, "Line 1 kimg"),
    "records: NaN for kimg": records({"kimg": float("nan")}, "Line 1 kimg"),
    "records: a number for the sampler": records({"sampler": 3}, "Line 1 sampler"),
    "records: a list for thresholds": records({"thresholds": []}, "Line 1 thresholds", f"{MEASURE} --threshold=0.5"),
    "records: a number for the gap": records({"gap": 3}, "Line 1 gap", f"{MEASURE} --gap=2"),
    "records: damaged, in a measurement": records(b"{\n{}\n", "Line 1 repair or delete", MEASURE),
    "records: a folder": ({"run/mem_traj.jsonl": FOLDER}, MEASURE, "mem_traj.jsonl folder"),
    "records: a folder, in a curve": ({"run/mem_traj.jsonl": FOLDER}, CURVE, "No measured run"),
    "records: missing": ({"run/mem_traj.jsonl": None}, CURVE, "No measured run"),
    "log: a folder": ({"run/mem_traj.log": FOLDER}, MEASURE, "--log mem_traj.log folder"),
    "distances: a file for the folder": ({"run/knn-dist": b"text"}, MEASURE, "knn-dist file"),
    "trace: text": trace(b"text", "not a trace"),
    "trace: empty": trace(b"", "not a trace"),
    "trace: header only": trace("", "not a trace"),
    "trace: half a row": trace("4,0,0,8.0,4.0,0,0.25\n4,0,1,4.0", "not a trace"),
    "trace: words": trace("a,b,c,d,e,f,g\n", "not a trace"),
    "trace: binary": trace(b"\xff\xfe\0\1", "not a trace"),
    "trace: NUL": trace("4,0,0,8.0,4.0,0,0.2\0005\n", "not a trace"),
    "trace: a field of 200,000 letters": trace("4,0,0,8.0,4.0,0," + "1" * 200_000 + "\n", "not a trace"),
    "trace: NaN for the size": trace("nan,0,0,8.0,4.0,0,0.25\n", "not a trace"),
    "trace: infinite seed": trace("4,inf,0,8.0,4.0,0,0.25\n", "not a trace"),
    "trace: negative sigma": trace("4,0,0,-8.0,4.0,0,0.25\n", "not a trace"),
    "trace: effective number 0": trace("4,0,0,8.0,0,0,0.25\n", "not a trace"),
    "trace: a row twice": trace("4,0,0,8.0,4.0,0,0.25\n" * 2, "repeats seed 0"),
    "trace: missing": ({}, "emm collapse t.csv --out=c.png", "t.csv No such file"),
    "trace: a folder": ({"t.csv": FOLDER}, "emm collapse t.csv --out=c.png", "t.csv directory"),
    "plan: text": plan(b"text", "plan.json no plan"),
    "plan: nested deeply": plan(b"[" * 100_000, "plan.json no plan"),
    "plan: a list": plan(b"[]", "plan.json no plan"),
    "plan: version 99": plan({"format": 99}, "plan.json no plan"),
    "plan: settings are a list": plan({"settings": []}, "plan.json no plan"),
    "plan: decisions are a number": plan({"decisions": 3}, "plan.json no plan"),
    "plan: decisions without size": plan({"decisions": [{}]}, "plan.json no plan"),
    "plan: sizes are words": plan({"started": {"many": {}}}, "plan.json no plan"),
    "plan: of another search": plan({"settings": {"source": "x"}}, "out another source options"),
    "plan: a folder": ({"out/plan.json": FOLDER}, plan({}, "")[1], "plan.json no regular file"),
    "plan: other files in the folder": ({"out/thesis.tex": b""}, plan({}, "")[1], "out something else"),
    "runs: missing folder": ({}, "emm curve lost --out=c.png", "lost not a folder"),
    "runs: a file": ({}, "emm curve data.zip --out=c.png", "data.zip not a folder"),
    "runs: none": ({"empty": FOLDER}, "emm curve empty --out=c.png", "No measured run train.py mem_ratio.py"),
    "runs: unknown key": ({}, f"{CURVE} --by=colour", "No run key colour"),
    "runs: key is |D|": ({}, f"{CURVE} --by=max_size", "--by=max_size axis"),
    "report: missing folder": ({}, "emm report lost", "lost not a folder"),
    "expdir: missing": ({}, "mem_ratio --expdir=lost --knn-ref=data.zip", "lost not a folder"),
    "expdir: a file": ({}, "mem_ratio --expdir=data.zip --knn-ref=data.zip", "data.zip a file"),
    "expdir: empty": ({"empty": FOLDER}, "mem_ratio --expdir=empty --knn-ref=data.zip", "empty no network snapshot"),
    "expdir: nothing to follow": ({"empty": FOLDER}, "mem_ratio --expdir=empty --knn-ref=data.zip --watch",
        "empty --watch"),
    "knn-ref: other size": ({"big.zip": make_zip(("0.png", png(np.zeros([16, 16], np.uint8))), ("1.png",
        png(np.zeros([16, 16], np.uint8))))}, MEASURE.replace("data.zip", "big.zip"), "[1, 16, 16]"),
    "knn-ref: one image": ({"one.zip": dataset_zip(1)}, MEASURE.replace("data.zip", "one.zip"), "2"),
    "features: text": ({"f.pt": b"text"}, f"{MEASURE} --features=f.pt", "f.pt no TorchScript torch.jit.save"),
    "features: a folder": ({"f.pt": FOLDER}, f"{MEASURE} --features=f.pt", "f.pt folder"),
    "features: hostile pickle": ({"f.pt": hostile_pickle()}, f"{MEASURE} --features=f.pt", "f.pt no TorchScript"),
    "study: text as options": ({"toy/options.json": b"text"}, "outlier_study moons --out=toy",
        "toy/options.json name another folder"),
    "study: options nested deeply": ({"toy/options.json": b"[" * 100_000}, "outlier_study moons --out=toy",
        "toy/options.json name another folder"),
    "study: other options": ({"toy/options.json": b'{"settings": {}}'}, "outlier_study moons --out=toy",
        "toy other options"),
}  # fmt: skip


# ----------------------------------------------------------------------------
# Options that are wrong by themselves or together.

CONVERT = "dataset_tool --source=data.zip --dest=out.zip"
INJECT = "dataset_inject --source=data.zip --dest=out.zip"
OPTIM = "generate_optim --network=data.zip --outdir=out --seeds=0-1 --steps=1"
NET = GENERATE.format("net.safetensors")
SEARCH = "emm search --source=data.zip --outdir=out --low=2 --high=4"
OPTIONS = {
    line: ({}, line, words)
    for line, words in {
        "dataset_tool": "Missing option",
        "dataset_tool --source=data.zip": "Missing option --dest",
        f"{CONVERT} --max-images=0": "--max-images x>=1",
        f"{CONVERT} --max-images=nan": "--max-images",
        f"{CONVERT} --workers=1000": "--workers",
        f"{CONVERT} --resolution=32": "--resolution 32x32",
        f"{CONVERT} --resolution=-8x-8": "--resolution",
        f"{CONVERT} --resolution=0x0": "0x0 power of two",
        f"{CONVERT} --resolution=24x24": "24x24 power of two",
        f"{CONVERT} --resolution=8x16": "8x16 not square",
        f"{CONVERT} --resolution=65536x65536": "65536x65536",
        f"{CONVERT} --transform=center-crop": "center-crop resolution",
        f"{CONVERT} --transform=tilt": "--transform tilt",
        f"{CONVERT} --colour=1": "--colour No such option",
        f"{CONVERT} extra": "unexpected extra",
        "dataset_size --source=data.zip --dest=out.zip --max-images=3": "3 images --uneven",
        "dataset_size --source=data.zip --dest=out.zip --max-images=40": "only 2 images fewer",
        "dataset_dimension --source=data.zip --dest=out.zip": "--resolution missing",
        "dataset_diversity --source=data.zip --dest=out.zip": "--num-classes",
        "dataset_diversity --source=data.zip --dest=out.zip --num-classes=2 --max-images=1": "2 classes",
        "dataset_random --source=data.zip --dest=out.zip --num-classes=0": "--num-classes",
        "dataset_random --source=data.zip --dest=out.zip --num-classes=2 --seed=-1": "--seed",
        "dataset_unique --source=data.zip --dest=out.zip --max-images=x": "--max-images",
        INJECT: "--duplicates --outliers",
        f"{INJECT} --copies=3": "--copies --duplicates",
        f"{INJECT} --duplicates=50": "50 only 4",
        f"{INJECT} --outliers=1": "--outliers --outlier-source",
        f"{INJECT} --outliers=1 --outlier-class=0 --outliers-inverted": "exclude",
        f"{INJECT} --outliers=1 --outlier-class=7": "class 7",
        f"{INJECT} --outliers=1 --outlier-source=lost.zip": "lost.zip does not exist",
        f"{INJECT} --duplicates=1 --noise=nan": "--noise finite",
        "intra_diversity --source=data.zip --dest=out.zip": "2 classes --class",
        "intra_diversity --source=data.zip --dest=out.zip --class=9": "class 9",
        "intra_diversity --source=data.zip --dest=out.zip --class=0 --inter-rate=0.5": "--mix",
        "intra_diversity --source=data.zip --dest=out.zip --class=0 --inter-rate=2": "--inter-rate",
        "sample_imagenet --root=run --class=dog --num-samples=3 --dest=l.txt": "run none of the dogs",
        "sample_imagenet --root=lost --class=dog --num-samples=3 --dest=l.txt": "--root lost no folder",
        "sample_imagenet --root=run --class=fish --num-samples=3 --dest=l.txt": "--class fish",
        "sample_imagenet --root=run --class=dog --num-samples=3 --dest=l.zip": "--dest .txt",
        "train --outdir=out": "Missing option --data",
        f"{TRAIN} --batch=0": "--batch",
        f"{TRAIN} --batch=6 --batch-gpu=4": "--batch-gpu=4 divide",
        f"{TRAIN} --duration=0": "--duration",
        f"{TRAIN} --duration=nan": "--duration finite",
        f"{TRAIN} --lr=inf": "--lr finite",
        f"{TRAIN} --lr=1e-400": "--lr",
        f"{TRAIN} --dropout=1.5": "--dropout",
        f"{TRAIN} --cond=maybe": "--cond boolean",
        f"{TRAIN} --arch=unet": "--arch unet",
        f"{TRAIN} --cres=0": "--cres",
        f"{TRAIN} --cres=2-1": "--cres backwards",
        f"{TRAIN} --cres=1,1,1,1,1,1": "halved",
        f"{TRAIN} --num-channels=7": "even number",
        f"{TRAIN} --num-channels=100000": "--num-channels 65536",
        f"{TRAIN} --cbase=100000": "--cbase 65536",
        f"{TRAIN} --num-blocks=1000000": "--num-blocks 64",
        f"{TRAIN} --cres=1,100000": "--cres 1024",
        f"{TRAIN} --skip-connections=1,1": "skip",
        f"{TRAIN} --arch=adm --skip-connections=1": "--skip-connections adm",
        f"{TRAIN} --momentum=0.5": "--momentum --optimizer=SGD",
        f"{TRAIN} --final-ema=0.5": "--final-ema mode4",
        f"{TRAIN} --stop-at-mem=0.5": "--stop-at-mem --mem-eval",
        f"{TRAIN} --fp16=1": "--fp16=1 CUDA",
        f"{TRAIN} --device=tpu": "--device=tpu cpu",
        f"{TRAIN} --device=cuda:99": "--device=cuda:99",
        f"{TRAIN} --seed=-1": "--seed",
        f"{TRAIN} --desc=a/b": "--desc slash",
        f"{TRAIN} --desc={'x' * 300}": "xxx too long --desc",
        f"{TRAIN} --transfer=net.safetensors --resume=training-state-000001.pt": "--transfer --resume exclude",
        "generate --outdir=out": "Missing option --network",
        f"{NET} --seeds=": "--seeds",
        f"{NET} --seeds=1,a": "--seeds whole number range",
        f"{NET} --seeds=5-2": "--seeds backwards 2-5",
        f"{NET} --seeds=1,1": "--seeds twice",
        f"{NET} --seeds=-1": "--seeds",
        f"{NET} --seeds=0-4294967296": "--seeds",
        f"{NET} --seeds=4294967296": "--seeds larger",
        f"{NET} --seeds={'9' * 5000}": "--seeds",
        f"{NET} --seeds=0-99999999": "--seeds 10,000,000",
        f"{NET} --seeds=0-6000000,0-6000000": "--seeds 10,000,000",
        f"{NET} --class=0": "--class unconditional",
        f"{NET} --class=-1": "--class",
        f"{NET} --batch=0": "--batch",
        f"{NET} --steps=0": "--steps",
        f"{NET} --sigma_min=9 --sigma_max=3": "sigma_min exceeds",
        f"{NET} --sigma_max=nan": "--sigma_max finite",
        f"{NET} --S_churn=-1": "--S_churn",
        f"{NET} --solver=rk4": "--solver",
        f"{NET} --disc=iddpm --steps=5000": "5000 steps",
        f"{NET} --network=https://": "https://",
        f"{NET} --network=http://127.0.0.1:9/x.safetensors": "http://127.0.0.1:9/x.safetensors",
        f"{OPTIM} --class=7": "--class=7 0-1",
        f"{OPTIM} --ref-size=0": "--ref-size",
        "mem_ratio": "--expdir --network",
        "mem_ratio --expdir=run --network=data.zip": "--expdir --network",
        "mem_ratio --expdir=run": "--knn-ref",
        "mem_ratio --network=data.zip": "--log",
        "mem_ratio --expdir=run --knn-ref=data.zip --cond=1": "--cond --network",
        f"{MEASURE} --holdout=data.zip": "--holdout --gap",
        f"{MEASURE} --until-above": "--until-above --adaptive",
        f"{MEASURE} --threshold=0": "--threshold",
        f"{MEASURE} --threshold=a,b": "--threshold",
        f"{MEASURE} --criterion=none": "--criterion",
        f"{MEASURE} --criterion=calibrated": "50 training images",
        f"{MEASURE} --adaptive=1": "--adaptive",
        f"{MEASURE} --grid=g.doc": "g.doc format",
        f"{MEASURE} --hist=h": "h format",
        f"{MEASURE} --class=3": "--class unconditional",
        f"{MEASURE} --log=run/log.jsonl": "log.jsonl overwrite",
        f"{MEASURE} --gap=2 --holdout=lost.zip": "lost.zip does not exist",
        "mem_ratio --network=data.zip --log=m.log --watch": "--watch --expdir",
        "emm draw": "No such command draw",
        "emm curve": "Give either runs, or the table",
        f"{CURVE} --level=nan": "level 0.9",
        f"{CURVE} --level=90": "level between 0 and 1",
        "emm curve run --out=c": "c format",
        "emm curve run --out=c.json": "c.json format",
        "emm trajectory run --out=c.png --level=0": "level between 0 and 1",
        "emm collapse": "Missing argument",
        "emm report": "Missing argument",
        f"{SEARCH} --low=1": "--low",
        f"{SEARCH} --low=4": "--low=4 not less --high=4",
        f"{SEARCH} --high=40": "--high=40 4 at most",
        f"{SEARCH} --tolerance=1": "--tolerance",
        f"{SEARCH} --level=1": "--level",
        f"{SEARCH} --measure=--colour": "--measure --colour",
        f'{SEARCH} --measure="\'"': "--measure quotation",
        f"{SEARCH} -- --colour": "TRAIN_OPTIONS --colour",
        f"{SEARCH} -- --outdir=x": "TRAIN_OPTIONS --outdir",
        f"{SEARCH} --executor=slurm --slurm=account": "--slurm KEY=VALUE",
        "outlier_study moons": "Missing option --out",
        "outlier_study moons --out=o --preset=large": "--preset large",
        "outlier_study moons --out=o --points=1": "--points",
        "outlier_study moons --out=o --jitter=nan": "--jitter",
        "outlier_study moons --out=o --ratio=0.5": "--ratio",
        "outlier_study moons --out=o --duplicates=100000": "duplicates",
        "snapshot net.safetensors --dest=net.pkl": "--dest .safetensors",
        "snapshot": "Missing argument",
    }.items()
}


# ----------------------------------------------------------------------------
# Where results are to go.

LONG = "x" * 300
TARGETS = {
    f"target {number}: {line}": (files, line, words)
    for number, (files, line, words) in enumerate([
        ({"out.zip": FOLDER}, CONVERT, "out.zip is a folder"),
        ({"out": b"text"}, CONVERT.replace("out.zip", "out"), "out is a file"),
        ({"out/x": b"text"}, CONVERT.replace("out.zip", "out"), "out not empty"),
        ({}, CONVERT.replace("out.zip", "data.zip/out.zip"), "data.zip is not a folder"),
        ({}, CONVERT.replace("out.zip", "data.zip/a/out.zip"), "data.zip"),
        ({}, CONVERT.replace("out.zip", "data.zip"), "data.zip source itself"),
        ({"l.zip": Link("data.zip")}, CONVERT.replace("out.zip", "l.zip"), "l.zip source itself"),
        ({"l.zip": Link("l.zip")}, CONVERT.replace("out.zip", "l.zip"), "l.zip"),
        ({"l": Link("l")}, CONVERT.replace("out.zip", "l/out.zip"), "l"),
        ({}, CONVERT.replace("out.zip", "/proc/out.zip"), "/proc/out.zip"),
        ({}, CONVERT.replace("out.zip", "/proc/sub/out.zip"), "/proc/sub"),
        ({}, CONVERT.replace("out.zip", "/dev/full"), "/dev/full is a file"),
        ({}, CONVERT.replace("out.zip", f"{LONG}.zip"), f"{LONG}.zip name too long"),
        ({}, CONVERT.replace("out.zip", ""), "empty"),
        ({"in/0.png": PNG}, "dataset_tool --source=in --dest=in", "in source itself"),
        ({"l.txt": FOLDER}, "sample_imagenet --root=tree --class=dog --num-samples=1 --dest=l.txt",
        "l.txt is a folder"),
        ({}, "sample_imagenet --root=tree --class=dog --num-samples=1 --dest=/proc/l.txt", "/proc/l.txt"),
        ({}, TRAIN.replace("outdir=out", "outdir=data.zip"), "data.zip is a file"),
        ({}, TRAIN.replace("outdir=out", "outdir=data.zip/runs"), "data.zip is a file"),
        ({}, TRAIN.replace("outdir=out", "outdir="), "empty"),
        ({}, TRAIN.replace("outdir=out", "outdir=/proc/runs"), "/proc"),
        ({"l": Link("x")}, TRAIN.replace("outdir=out", "outdir=l"), "l link"),
        ({"l": Link("l")}, TRAIN.replace("outdir=out", "outdir=l"), "l link"),
        ({}, NET.replace("outdir=out", "outdir=data.zip"), "data.zip is a file"),
        ({}, NET.replace("outdir=out", "outdir=data.zip/x"), "data.zip is a file"),
        ({}, NET.replace("outdir=out", "outdir="), "empty"),
        ({}, NET.replace("outdir=out", "outdir=/proc/x"), "/proc/x"),
        ({"l": Link("x")}, NET.replace("outdir=out", "outdir=l"), "l link"),
        ({"out/000000.png": FOLDER}, NET, "out/000000.png directory"),
        ({"out/000000": b"text"}, f"{NET} --subdirs", "out/000000"),
        ({"t.csv": FOLDER}, f"{OPTIM} --trace=t.csv", "--trace t.csv folder"),
        ({}, f"{OPTIM} --trace=data.zip/t.csv", "--trace data.zip is a file"),
        ({}, f"{OPTIM} --trace=", "--trace empty"),
        ({}, f"{MEASURE} --log=data.zip/mem.log", "data.zip is a file"),
        ({}, f"{MEASURE} --log=run", "--log run is a folder"),
        ({}, f"{MEASURE} --log=/proc/mem.log", "/proc"),
        ({}, f"{MEASURE} --save-images=data.zip", "data.zip is a file"),
        ({}, f"{MEASURE} --grid=data.zip/g.png", "data.zip is a file"),
        ({"g.png": FOLDER}, f"{MEASURE} --grid=g.png", "g.png is a folder"),
        ({"run/mem_traj.jsonl": Link(".")}, MEASURE, "mem_traj.jsonl is a folder"),
        ({"c.png": FOLDER}, CURVE, "c.png is a folder"),
        ({"c.csv": FOLDER}, CURVE, "c.csv is a folder"),
        ({"c.json": FOLDER}, CURVE, "c.json is a folder"),
        ({}, CURVE.replace("c.png", "data.zip/c.png"), "data.zip is a file"),
        ({}, CURVE.replace("c.png", "/proc/c.png"), "/proc/c.png"),
        ({"c.csv": FOLDER}, "emm trajectory run --out=c.png", "c.csv is a folder"),
        ({"page.html": FOLDER}, "emm report run --out=page.html", "page.html is a folder"),
        ({}, "emm report run --out=data.zip/page.html", "data.zip is a file"),
        ({}, "emm report run --out=/proc/page.html", "/proc/page.html"),
        ({}, SEARCH.replace("outdir=out", "outdir=data.zip"), "data.zip"),
        ({}, SEARCH.replace("outdir=out", "outdir=/proc/x"), "/proc/x"),
        ({"l": Link("l")}, SEARCH.replace("outdir=out", "outdir=l"), "l"),
        ({}, "outlier_study moons --out=data.zip", "data.zip is a file"),
        ({}, "outlier_study moons --out=", "empty"),
        ({}, "outlier_study moons --out=/proc/x", "/proc/x"),
        ({"x.safetensors": FOLDER}, "snapshot net.safetensors --dest=x.safetensors", "x.safetensors directory"),
        ({}, "snapshot net.safetensors --dest=/proc/x.safetensors", "/proc/x.safetensors"),
        ({}, "snapshot net.safetensors --dest=data.zip/x.safetensors", "data.zip"),
    ])
}  # fmt: skip

# The folder for the run folders is made before it turns out that there is no room for the run.
MEMORY_CASES = {
    "memory: network": ({"out": FOLDER}, f"{TRAIN} --num-channels=65536 --cres=1024", "not enough memory --batch"),
    "memory: batch": ({"out": FOLDER}, f"{TRAIN} --batch=1000000000000", "not enough memory --batch"),
}

CASES = MEMORY_CASES | IMAGES | ZIPS | LABELS | SOURCES | SNAPSHOTS | STATES | RUNS | OPTIONS | TARGETS

# What cannot be written because there is no room: the same for files of every kind. The number is the size, in bytes,
# that a file may reach.
FULL = {
    CONVERT: 500,
    CONVERT.replace("out.zip", "out"): 50,
    "sample_imagenet --root=tree --class=dog --num-samples=1 --dest=l.txt": 5,
    TRAIN: 10_000,
    NET: 50,
    OPTIM: 50,
    f"{OPTIM} --trace=t.csv": 150,
    f"{OPTIM} --mmap": 200,
    MEASURE: 100,
    CURVE: 1000,
    "emm trajectory run --out=c.png": 1000,
    "emm report run --out=page.html": 1000,
    "snapshot net.safetensors --dest=x.safetensors": 1000,
    "outlier_study moons --out=toy --epochs=2 --points=40 --outliers=2 --duplicates=2": 100,
}


# ----------------------------------------------------------------------------
# The test.


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """The files that lie in the folder of every case: name -> bytes."""
    from training.networks import build_network
    from training.snapshots.snapshot import save_snapshot

    torch.manual_seed(0)
    net = build_network(
        "EDMPrecond", img_resolution=8, img_channels=1, label_dim=0, model_type="SongUNet", model_channels=8,
        channel_mult=[1, 1], num_blocks=1, attn_resolutions=[4], dropout=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("good") / "net.safetensors"
    save_snapshot(path, net, 1, {"path": "data.zip"})
    dataset = {"path": "data.zip", "max_size": 4, "resolution": 8, "use_labels": False, "xflip": False}
    run = {"dataset_kwargs": dataset, "network_kwargs": net.init_kwargs, "total_nimg": 1000, "total_kimg": 1, "seed": 1}
    counts = {"kimg": 1, "num_memorized": 3, "num_samples": 4, "ratio": 0.75, "mean_distance": 1.0}
    record = {**counts, "snapshot": "network-snapshot-000001.safetensors", "seeds": "0-3", "sampler": {}}
    return {
        "data.zip": dataset_zip(),
        "net.safetensors": path.read_bytes(),
        "run/network-snapshot-000001.safetensors": path.read_bytes(),
        "run/training_options.json": json.dumps(run).encode(),
        "run/mem_traj.jsonl": json.dumps(record).encode() + b"\n",
        "tree/n02085620/1.png": PNG,
    }


@pytest.fixture
def folder(good, tmp_path, monkeypatch):
    """A working folder with the good files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFMEM_CACHE", str(tmp_path.parent / "cache"))
    put(good, good)
    return tmp_path


def put(files, good):
    """Write files into the working folder; see `CASES`."""
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content = content(good) if content.__code__.co_argcount else content()
        if path.is_file():
            path.unlink()
        if content is FOLDER:
            path.mkdir()
        elif content is PIPE:
            os.mkfifo(path)
        elif isinstance(content, Link):
            path.symlink_to(content.target)
        elif isinstance(content, int):
            path.touch()
            os.truncate(path, content)  # holds no blocks
        elif content is not None:
            path.write_bytes(content)


def tree():
    """Every file below the working folder, with its content."""
    found = {}
    for path in sorted(Path().rglob("*")):
        plain = path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 30
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if plain else path.stat().st_size
        found[str(path)] = (
            hashlib.sha256(content).hexdigest()
            if plain
            else (path.stat().st_mode if not path.is_symlink() else 0, content if not path.is_dir() else 0)
        )
    return found


class TooLong(BaseException):
    """A command hangs."""


@pytest.fixture
def guard():
    """Commands that hang end with an error, and so do those that ask for too much memory."""

    def ring(number, frame):
        raise TooLong

    previous = signal.signal(signal.SIGALRM, ring)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, limits[1]))
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    resource.setrlimit(resource.RLIMIT_AS, limits)


def run_bad(line):
    """Run a command that fails; return its one line of error."""
    name, *words = shlex.split(line)
    result = CliRunner().invoke(command(name), words)
    if not isinstance(result.exception, SystemExit):
        raise result.exception or AssertionError(f"no error: {result.output}")
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("Error: ")]
    others = [line for line in lines if not line.startswith(("Error: ", "Usage: ", "Try ", "Note: ", "Left out: "))]
    usage = any(line.startswith("Usage: ") for line in lines)
    assert "Traceback" not in result.output
    assert len(errors) == 1 and lines[-1] == errors[0] and not others, result.stderr
    assert result.exit_code == (2 if usage else 1)
    assert len(errors[0]) < 1000
    return errors[0]


@pytest.mark.parametrize(("files", "line", "words"), CASES.values(), ids=CASES)
def test_bad_input(files, line, words, good, folder, guard):
    put(files, good)
    before = tree()
    message = run_bad(line)
    missing = [word for word in words.split() if word not in message]
    assert not missing, message
    assert tree() == before


@pytest.mark.parametrize(("line", "size"), FULL.items(), ids=FULL)
def test_full_disk(line, size, folder, guard):
    before = tree()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # what is beyond fails, as on a full disk
    try:
        message = run_bad(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in message
    whole = {"out/000000.png", "out/000001.png"} if "--trace" in line else set()  # what was finished before
    left = {name for name in tree().keys() - before.keys() - whole if Path(name).is_file()}
    assert not left and all(tree()[name] == value for name, value in before.items())


@pytest.mark.parametrize(
    "content",
    [b"", b"text", npz(images=FOUR), hostile_pickle(), np.zeros([4, 1, 4, 4], np.uint8), np.zeros([9, 1, 8, 8],
    np.uint8),
     np.zeros([4, 1, 8, 8]), npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (4,)}") + hostile_pickle(),
     npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 1, 8, 8)}"), FOLDER],
)  # fmt: skip
def test_decoded_copy_that_is_damaged(content, good, folder, guard):
    result = CliRunner().invoke(command("generate_optim"), shlex.split(f"{OPTIM} --mmap")[1:])
    assert result.exit_code == 0, result.output
    (copy,) = Path().glob("*.decoded.npy")
    copy.unlink()
    if isinstance(content, np.ndarray):
        np.save(copy, content)
    else:
        put({str(copy): content}, good)
    before = tree()
    message = run_bad(f"{OPTIM.replace('outdir=out', 'outdir=other')} --mmap")
    assert copy.name in message and ("delete it" in message or "directory" in message)
    assert tree() == before


# ----------------------------------------------------------------------------
# What is taken on purpose.


def run_good(line):
    name, *words = shlex.split(line)
    result = CliRunner().invoke(command(name), words)
    assert result.exit_code == 0, result.output
    return result


def with_exif():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return encode(COLOUR, "jpeg", exif=exif)


TAKEN = {
    "palette: its colours are RGB": ("0.png", encode(COLOUR.quantize(16))),
    "bilevel: is gray": ("0.png", encode(PIL.Image.fromarray(GRAY).convert("1"))),
    "palette of 4 bits": ("0.png", encode(COLOUR.quantize(16), bits=4)),
    "CMYK: printed photos are common": ("0.jpg", encode(COLOUR.convert("CMYK"), "jpeg")),
    "another extension: the content decides": ("0.jpg", PNG),
    "gif of one frame": ("0.gif", encode(COLOUR, "gif")),
    "text behind the image: decoders stop at its end": ("0.png", PNG + b"text"),
    "upper case": ("0.PNG", PNG),
    "orientation": ("0.jpg", with_exif()),
}


@pytest.mark.parametrize(("name", "content"), TAKEN.values(), ids=TAKEN)
def test_image_that_is_taken(name, content, folder):
    put({f"in/{name}": content}, {})
    assert "1 image, 8x8" in run_good(FOLDER_TO_ZIP).output


def test_zips_that_are_taken(folder):
    """Comments, folders, a program in front, hidden and other files: all are common, and none is an image."""
    more = [("a/", b""), ("__MACOSX/._0.png", b"\0"), ("notes.txt", b""), ("..png", b"")]
    put({"in.zip": b"#!/bin/sh\n" + dataset_zip(more=more)}, {})
    assert "4 images" in run_good(TOOL.format("in.zip")).output


def test_labels_of_other_images_are_taken(folder):
    """Who removes images from a folder need not edit its dataset.json."""
    labels = {"labels": [[f"00000/img{i:08d}.png", i] for i in range(9)]}
    put({"in.zip": dataset_zip(4, json.dumps(labels).encode())}, {})
    assert "4 images, 8x8, 1 channel, labels 0 to 3" in run_good(TOOL.format("in.zip")).output


def test_links_are_followed(folder):
    """Data often lie on another disk. What a link leads to is read, and a result goes where it leads."""
    (folder / "disk").mkdir()
    links = {
        "in": Link("tree/n02085620"),
        "in.zip": Link("data.zip"),
        "out.zip": Link("disk/real.zip"),
        "d": Link("disk"),
    }
    put({**links, "pics/1.png": Link("../tree/n02085620/1.png")}, {})
    run_good(TOOL.format("in"))
    assert Path("out.zip").is_symlink() and zipfile.is_zipfile("disk/real.zip")
    run_good("dataset_tool --source=in.zip --dest=d/other.zip")
    assert zipfile.is_zipfile("disk/other.zip")
    run_good("dataset_tool --source=pics --dest=pics.zip")
    run_good("generate_optim --network=in.zip --outdir=d --seeds=0 --steps=1")
    assert Path("disk/000000.png").is_file()


def test_half_written_lines_are_left_out(good, folder):
    """A run that was killed leaves half a line; all that is whole before it counts."""
    put(
        {"run/mem_traj.jsonl": good["run/mem_traj.jsonl"] + b'{"kimg": 2, "num', "run/stats.jsonl": b'{"Progress/k'}, {}
    )
    assert "75.00" in run_good(CURVE).output
    run_good("emm report run --out=page.html")


@pytest.mark.parametrize(
    "content", [b"", b"text", npz(images=FOUR), npz(seeds=np.array("x")), npz(settings="x"), hostile_pickle()]
)
def test_distances_that_are_damaged_are_measured_again(content, folder):
    run_good(MEASURE)
    (path,) = Path("run/knn-dist").glob("*.npz")
    whole = np.load(path)["knn_distance"]
    path.write_bytes(content)
    run_good(f"{MEASURE} --threshold=0.5")
    np.testing.assert_array_equal(np.load(path)["knn_distance"], whole)


def test_distances_of_a_wrong_kind_are_measured_again(folder):
    run_good(MEASURE)
    (path,) = Path("run/knn-dist").glob("*.npz")
    whole = dict(np.load(path))
    for name, array in [
        ("knn_distance", np.array(["a", "b"])),
        ("seeds", np.float64(3)),
        ("knn_index", np.zeros([2, 2])),
    ]:
        np.savez(path, **{**whole, name: array})
        run_good(f"{MEASURE} --threshold=0.5 --remeasure")
        np.testing.assert_array_equal(np.load(path)["knn_distance"], whole["knn_distance"])


@pytest.mark.parametrize("name", ["training_options.json", "mem_traj.jsonl"])
@pytest.mark.parametrize("content", [b"text\ntext\n", b"[" * 100_000 + b"\n{}\n", b"", b'{"kimg": NaN}\n{}\n'])
def test_report_lists_runs_that_are_damaged(name, content, good, folder):
    put({f"study/a/{Path(path).name}": data for path, data in good.items() if path.startswith("run/")}, {})
    put({f"study/b/{Path(path).name}": data for path, data in good.items() if path.startswith("run/")}, {})
    put({f"study/b/{name}": content, "study/plan.json": b"[" * 100_000, "study/x.png": b"text"}, {})
    result = run_good("emm report study")
    assert "Left out: b (" in result.stderr and "1 runs" in result.stdout
    assert "x.png" in Path("study/report.html").read_text()
