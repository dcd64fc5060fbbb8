"""Files from the web, kept in a cache: whole or not at all, and continued after an interruption.

Nothing in a file is executed or unpacked. `URL#sha256=HEX` names the content that is wanted; any other is refused.
"""

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from urllib.parse import urldefrag, urlsplit

import requests
from tqdm import tqdm

from dnnlib.locks import file_lock

_BLOCK = 1 << 16  # bytes; of a block that a lost connection cuts, nothing is kept


def cache_dir() -> Path:
    """Folder for downloads: ``DIFFMEM_CACHE``, or ``diffmem`` in the cache folder of the user on this platform."""
    if os.environ.get("DIFFMEM_CACHE"):
        return Path(os.environ["DIFFMEM_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "diffmem"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "diffmem"


def download(url: str, *, verbose: bool = True) -> Path:
    """Return the cached copy of `url`, which is downloaded if there is none.

    What has arrived lies beside it as ``*.part``; after an interruption the next call asks for the rest, provided
    that the server says that the file is still the same. One process downloads, others wait for it.

    Parameters
    ----------
    url : http or https address; ``#sha256=HEX`` at its end is the SHA-256 that the file must have
    verbose : show a progress bar

    Raises
    ------
    ValueError
        If the hash in the address is not one.
    OSError
        If the download fails or ends early, or the file has another size or hash than announced.
    """
    address, wanted = _split(url)
    name = re.sub(r"[^\w.-]", "_", Path(urlsplit(address).path).name)[-100:] or "download"
    path = cache_dir() / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{name}"
    with file_lock(path.with_name(path.name + ".lock")):
        if path.exists() and wanted in (None, _sha256(path)):
            return path
        part = _Part(path)
        try:
            _transfer(address, part, name, verbose)
        except requests.RequestException as err:
            raise OSError(f'Cannot download "{address}": {err}') from err
        if wanted is not None and _sha256(part.path) != wanted:
            part.discard()
            raise OSError(f'"{address}" has not the SHA-256 {wanted} that is asked for; it was not kept.')
        part.finish()
    return path


def _split(url: str) -> tuple[str, str | None]:
    """Address without fragment, and the SHA-256 in the fragment."""
    address, fragment = urldefrag(url)
    if not fragment.startswith("sha256="):
        return address, None
    wanted = fragment.removeprefix("sha256=").lower()
    if not re.fullmatch("[0-9a-f]{64}", wanted):
        raise ValueError(f'"{url}" must end in sha256= and 64 hexadecimal digits.')
    return address, wanted


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Part:
    """A file that is partly there, with what identifies it at the server beside it (ETag or date)."""

    def __init__(self, target: Path):
        self.target = target
        self.path = target.with_name(target.name + ".part")
        self._about = target.with_name(target.name + ".part.json")

    @property
    def can_go_on(self) -> bool:
        return self._about.exists()

    def resume(self) -> tuple[int, str | None]:
        """Bytes that are there, and the validator under which the rest may be asked for."""
        try:
            validator = json.loads(self._about.read_text(encoding="utf-8"))["validator"]
            return self.path.stat().st_size, str(validator)
        except (OSError, ValueError, KeyError, TypeError):
            return 0, None

    def begin(self, response: requests.Response) -> None:
        """Start from nothing; remember the validator, if the server gives a strong one."""
        self.discard()
        tag = response.headers.get("ETag", "")
        validator = response.headers.get("Last-Modified") if not tag or tag.startswith("W/") else tag
        if validator and "bytes" in response.headers.get("Accept-Ranges", ""):
            self._about.write_text(json.dumps(dict(validator=validator)), encoding="utf-8")

    def discard(self) -> None:
        for path in (self.path, self._about):
            path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the whole file its name, once it is on the disk."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self.path, self.target)
        self._about.unlink(missing_ok=True)


def _transfer(url: str, part: _Part, name: str, verbose: bool) -> None:
    """Bring `part` to the size that the server announces."""
    response, there = _open(url, part)
    with response:
        response.raise_for_status()
        _check_encrypted(url, response)
        if there and not response.headers.get("Content-Range", "").startswith(f"bytes {there}-"):
            part.discard()
            raise OSError(f'Cannot download "{url}": the server sends another part than asked for; try again.')
        if there == 0:
            part.begin(response)
        length = response.headers.get("Content-Length", "")
        as_is = response.headers.get("Content-Encoding", "identity") == "identity"
        total = there + int(length) if length.isdecimal() and as_is else None
        received, lost = there, None
        # disable=None: no bar where the output is no terminal
        bar = tqdm(total=total, initial=there, unit="B", unit_scale=True, desc=name, disable=None if verbose else True)
        with open(part.path, "ab") as file, bar:
            try:
                for block in response.iter_content(_BLOCK):
                    file.write(block)
                    received += len(block)
                    bar.update(len(block))
            except requests.RequestException as err:
                lost = err
    if lost is not None or total not in (None, received):
        of = f" of {total}" if total is not None else ""
        then = "the same command goes on with the rest" if part.can_go_on else "try again"
        if not part.can_go_on:
            part.discard()
        raise OSError(f'Cannot download "{url}": it ended after {received}{of} bytes; {then}.') from lost


def _open(url: str, part: _Part) -> tuple[requests.Response, int]:
    """A response, and the number of bytes that are there and that it goes on from."""
    there, validator = part.resume()
    response = _request(url, there, validator)
    if response.status_code == 416:  # there is nothing after what is there
        response.close()
        response = _request(url, 0, None)
    return response, there if response.status_code == 206 else 0


def _request(url: str, there: int, validator: str | None) -> requests.Response:
    headers = {"Accept-Encoding": "identity"}
    if there and validator:
        headers |= {"Range": f"bytes={there}-", "If-Range": validator}
    return requests.get(url, stream=True, timeout=30, headers=headers)


def _check_encrypted(url: str, response: requests.Response) -> None:
    if urlsplit(url).scheme != "https":
        return
    for step in [*response.history, response]:
        if urlsplit(step.url).scheme != "https":
            raise OSError(f'Cannot download "{url}": it leads to "{step.url}", which is not encrypted.')
