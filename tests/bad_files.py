"""Damaged and hostile files, built in memory: images, zips, tars, pickles, idx and npz files, snapshots."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib

import numpy as np
import PIL.Image
import safetensors.torch
from conftest import png

GRAY = np.arange(64, dtype=np.uint8).reshape(8, 8)
COLOUR = PIL.Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
PNG = png(GRAY)


def encode(image, form="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


# ----------------------------------------------------------------------------
# Images.


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width=8, height=8, depth=8, colour=0, rows=None, extra=b""):
    """A PNG of chosen header, whatever its pixels are."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = zlib.compress(bytes((width + 1) * height) if rows is None else rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def frames(form):
    return encode(COLOUR, form, save_all=True, append_images=[COLOUR.rotate(90)])


def flipped(data, at, mask=0xFF):
    """`data` with the bits `mask` of one byte changed."""
    data = bytearray(data)
    data[at] ^= mask
    return bytes(data)


# ----------------------------------------------------------------------------
# Zips.


def make_zip(*files, method=zipfile.ZIP_STORED):
    """A zip of (name, content) pairs."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


def dataset_zip(images=4, labels=None, more=()):
    """A good dataset, or one whose `dataset.json` is `labels`: bytes as they are, or {"labels": ...}."""
    names = [f"00000/img{i:08d}.png" for i in range(images)]
    if not isinstance(labels, bytes):
        values = [i % 2 for i in range(images)] if labels is None else labels
        labels = json.dumps({"labels": [list(pair) for pair in zip(names, values)]}).encode()
    pictures = [(name, png((GRAY + 40 * i).astype(np.uint8))) for i, name in enumerate(names)]
    return make_zip(*pictures, ("dataset.json", labels), *more)


def bomb_zip(name="0.png", megabytes=2048, announced=None):
    """A zip of a few MB with one member of `megabytes` zeros, which its header may belittle."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = compressor.compress(bytes(1 << 20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    data = block * megabytes + compressor.flush(zlib.Z_FINISH)
    size = (megabytes << 20) if announced is None else announced
    fields = struct.pack("<HHHHIIIHH", 0, 8, 0, 33, 0, len(data), size, len(name), 0)
    local = b"PK\x03\x04\x14\0" + fields
    central = b"PK\x01\x02\x14\0\x14\0" + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name.encode()
    body = local + name.encode() + data
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(body), 0)
    return body + central + end


def encrypted_zip(content):
    """A zip that says that its members are encrypted."""
    data = bytearray(content)
    for magic, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = data.find(magic)
        while start >= 0:
            data[start + at] |= 1
            start = data.find(magic, start + 4)
    return bytes(data)


# ----------------------------------------------------------------------------
# CIFAR-10 and MNIST.


class Call:
    """A pickle of this asks for a call of `function` where it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile_pickle(trace="ran"):
    """A pickle that leaves a folder behind where it is loaded by pickle.load."""
    return pickle.dumps(Call(os.mkdir, trace))


def tar_gz(*members):
    """A .tar.gz of members: (name, bytes), or (name, type of the tar entry, target of a link)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content, *target in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes) and not target:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content, target[0]
                tar.addfile(info)
    return buffer.getvalue()


def cifar(name="cifar-10-batches-py/data_batch_1", **changes):
    batch = {"data": np.zeros([3, 3072], dtype=np.uint8), "labels": [0, 1, 2], **changes}
    return tar_gz((name, pickle.dumps(batch)))


def zeros_gz(megabytes, start=b""):
    """A gzip file of few bytes that unpacks to `start` and zeros."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = compressor.compress(start) + compressor.flush(zlib.Z_FULL_FLUSH)
    block = compressor.compress(bytes(1 << 20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    body = head + block * megabytes + compressor.flush(zlib.Z_FINISH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + body + bytes(8)  # a checksum that no one should come to see


def idx(array, magic=None, shape=None):
    shape = array.shape if shape is None else shape
    header = struct.pack(">I", 0x0800 + array.ndim if magic is None else magic)
    return gzip.compress(header + struct.pack(f">{len(shape)}I", *shape) + array.tobytes())


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy_header(text):
    """A .npy file without data, whose header is `text`."""
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode("latin1")


# ----------------------------------------------------------------------------
# Snapshots.


def change_snapshot(data, tensors=None, header=None, drop=(), metadata=None):
    """The snapshot `data` with other tensors, and with `header` called on its header."""
    found = safetensors.torch.load(data)
    for name in drop:
        del found[name]
    found |= tensors or {}
    length = struct.unpack("<Q", data[:8])[0]
    content = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["diffmem"])
    if header is not None:
        content = header(content) or content
    text = content if isinstance(content, str) else json.dumps(content)
    return safetensors.torch.save(found, metadata={"diffmem": text} if metadata is None else metadata)
