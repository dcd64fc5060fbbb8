"""Downloads: cached, whole or not at all, continued after an interruption, checked by size and hash."""

import hashlib
import http.server
import os
import random
import threading
from pathlib import Path

import pytest
from conftest import ROOT
from published_pickles import dumps

import generate
from dnnlib import download as module
from dnnlib.download import cache_dir
from dnnlib.util import fetch
from training.snapshots.snapshot import load_network

CONTENT = random.Random(0).randbytes(3_000_000)
HASH = hashlib.sha256(CONTENT).hexdigest()


class Site(http.server.ThreadingHTTPServer):
    """Serves `content` at every path; how it behaves is set by attributes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.cut, self.ranges, self.chunked, self.status = CONTENT, '"1"', None, True, False, 0
        self.location = None
        self.requests = []  # the Range of each

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/models/network-snapshot-000123.pkl"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        site, wanted = self.server, self.headers.get("Range")
        site.requests.append(wanted)
        if site.status:
            self.send_response(site.status)
            if site.location:
                self.send_header("Location", site.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        if wanted and site.ranges and self.headers.get("If-Range") == site.etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(site.content):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = site.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/{len(site.content)}")
        if site.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if site.etag:
            self.send_header("ETag", site.etag)
        if site.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%b\r\n" % (len(body), body)
            body += b"0\r\n\r\n" if site.cut is None else b""
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if site.cut is None else body[: site.cut])
        if site.cut is not None:
            self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def site():
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(cache):
    return sorted(p.name for p in cache.iterdir())


def test_a_file_is_downloaded_once(site, cache):
    path = fetch(site.url)
    assert path.read_bytes() == CONTENT and path.parent == cache and path.name.endswith("-network-snapshot-000123.pkl")
    assert fetch(site.url) == path == fetch(f"{site.url}#sha256={HASH}") and site.requests == [None]
    assert files(cache) == [path.name]  # nothing beside it
    assert not os.access(path, os.X_OK)


def test_other_addresses_are_other_files(site):
    assert fetch(site.url) != fetch(site.url + "?v=2") and len(site.requests) == 2


def test_local_paths(tmp_path):
    (tmp_path / "x").touch()
    assert fetch(str(tmp_path / "x")) == tmp_path / "x"
    for missing in ("", str(tmp_path / "y")):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            fetch(missing)


def test_goes_on_after_an_interruption(site, cache):
    site.cut = 983_040
    with pytest.raises(OSError, match="ended after 983040 of 3000000 bytes; the same command goes on"):
        fetch(site.url)
    assert not [n for n in files(cache) if not n.endswith((".part", ".part.json"))]
    with pytest.raises(OSError, match="ended after 1966080 of 3000000"):
        fetch(site.url)
    site.cut = None
    assert fetch(f"{site.url}#sha256={HASH}").read_bytes() == CONTENT
    assert site.requests == [None, "bytes=983040-", "bytes=1966080-"] and len(files(cache)) == 1


def test_a_file_that_changed_meanwhile_is_not_mixed(site):
    site.cut = 983_040
    with pytest.raises(OSError):
        fetch(site.url)
    site.cut, site.etag, site.content = None, '"2"', CONTENT[::-1]
    assert fetch(site.url).read_bytes() == CONTENT[::-1] and site.requests[1] == "bytes=983040-"


@pytest.mark.parametrize("change", [dict(ranges=False), dict(etag=None), dict(etag='W/"1"')])
def test_without_a_way_to_tell_it_begins_again(site, change):
    site.__dict__.update(change, cut=983_040)
    with pytest.raises(OSError, match="of 3000000 bytes; try again"):
        fetch(site.url)
    assert not list(cache_dir().iterdir())
    site.cut = None
    assert fetch(site.url).read_bytes() == CONTENT and site.requests == [None, None]


def test_all_bytes_are_there_but_not_the_name(site):
    """The process was killed between the last byte and the renaming."""
    site.cut = 983_040
    with pytest.raises(OSError):
        fetch(site.url)
    (part,) = cache_dir().glob("*.part")
    part.write_bytes(CONTENT)
    site.cut = None
    assert fetch(site.url).read_bytes() == CONTENT and site.requests[1:] == ["bytes=3000000-", None]


@pytest.mark.parametrize("cut", [None, 500_000])
def test_unknown_length(site, cut):
    """A chunked answer that breaks off is not taken for the whole."""
    site.chunked, site.cut = True, cut
    if cut is None:
        assert fetch(site.url).read_bytes() == CONTENT
    else:
        with pytest.raises(OSError, match="ended after"):
            fetch(site.url)


def test_wrong_hash(site, cache):
    with pytest.raises(OSError, match="has not the SHA-256 0000"):
        fetch(f"{site.url}#sha256={'0' * 64}")
    assert files(cache) == []
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        fetch(f"{site.url}#sha256=abc")


def test_cached_file_with_another_hash_is_fetched_again(site):
    path = fetch(site.url)
    path.write_bytes(b"changed")
    assert fetch(site.url).read_bytes() == b"changed"
    assert fetch(f"{site.url}#sha256={HASH}").read_bytes() == CONTENT and len(site.requests) == 2


@pytest.mark.parametrize("status", [404, 403, 500])
def test_errors_of_the_server(site, status, cache):
    site.status = status
    with pytest.raises(OSError, match=f'Cannot download "{site.url}": {status}'):
        fetch(site.url)
    assert files(cache) == []


def test_redirection_without_end(site):
    site.status, site.location = 302, "/again"
    with pytest.raises(OSError, match="Exceeded 30 redirects"):
        fetch(site.url)


def test_redirection_to_a_file_of_this_machine(site):
    site.status, site.location = 302, f"file://{ROOT}/README.md"
    with pytest.raises(OSError, match="Cannot download"):
        fetch(site.url)


def test_encrypted_addresses_stay_encrypted(site):
    response = module.requests.get(site.url)
    with pytest.raises(OSError, match="which is not encrypted"):
        module._check_encrypted("https://example.org/x.pkl", response)
    module._check_encrypted(site.url, response)


def test_no_server():
    with pytest.raises(OSError, match="Cannot download"):
        fetch("http://127.0.0.1:9/x.pkl")


def test_unwritable_cache(site, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFFMEM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="file"):
        fetch(site.url)


def test_many_at_once(site):
    """As the processes of torchrun: one downloads."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(site.url, verbose=False))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1 and site.requests == [None]


@pytest.mark.parametrize(
    "change, platform, folder",
    [
        (dict(DIFFMEM_CACHE="/a"), "linux", "/a"),
        (dict(XDG_CACHE_HOME="/b"), "linux", "/b/diffmem"),
        ({}, "linux", "/home/u/.cache/diffmem"),
        ({}, "darwin", "/home/u/Library/Caches/diffmem"),
    ],
)
def test_place_of_the_cache(change, platform, folder, monkeypatch):
    for name in ("DIFFMEM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/u")
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module.sys, "platform", platform)
    assert cache_dir() == Path(folder)


# ----------------------------------------------------------------------------
# A snapshot from the web.


def test_published_snapshot_from_the_web(site, tmp_path, run_cli):
    site.content = (ROOT / "tests/reference/edm_pickles/ddpmpp-uncond-edm.pkl").read_bytes()
    assert load_network(site.url)[1]["kimg"] == 123
    args = [f"--network={site.url}", f"--outdir={tmp_path / 'out'}", "--seeds=0", "--steps=2", "--device=cpu"]
    run_cli(generate.main, args)
    assert len(list((tmp_path / "out").glob("*.png"))) == 1 and len(site.requests) == 1


def test_hostile_snapshot_from_the_web(site, tmp_path, run_cli):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    site.content = dumps(Hostile())
    args = [f"--network={site.url}", f"--outdir={tmp_path / 'out'}"]
    assert f'"{site.url}" asks for posix.mkdir' in run_cli(generate.main, args, code=1).stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
