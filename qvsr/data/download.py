"""Downloads one file over HTTP in as many pieces as the network leaves it, and locks so that two processes do not do it at once.

:class:`Resuming` is a downloader of pooch. What has arrived is kept in a folder, and the next request, of this process or of a later one,
asks for the rest alone. What the server says about the file (ETag, or the date) goes with that request, so the pieces of two versions
never come together.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import requests

TRIES = 4
"""Requests in a row that bring nothing, after which an address is given up."""
MOST = 500
"""Requests in all."""
WAIT = 1.0
"""Seconds before the second of them; twice as long before each later one, up to"""
LONGEST_WAIT = 60.0
TIMEOUT = 60.0
"""Seconds without a byte."""
BLOCK = 1 << 16
BUSY = {408, 425, 429}


class DownloadError(ValueError):
    """An address that does not give the file, however often it is asked; one line without the address."""


class DroppedError(OSError):
    """A request that broke off; the next may bring the rest."""


class Resuming:
    """Downloads to a file that stays when the connection, or the process, ends early.

    Args:
        folder: where that file lies.
        size: bytes that the file must have, where they are known.
        checked: whether a digest will be compared afterwards. Without one, and without anything from the server by which to recognise
            the file, every try starts anew.
        progress: draw a bar on standard error.
    """

    def __init__(self, folder: Path, size: int | None = None, checked: bool = False, progress: bool = False) -> None:
        self.folder, self.size, self.checked, self.progress = folder, size, checked, progress
        self.resumed = False
        """Whether the file was put together from more than one answer."""

    def part(self, url: str) -> Path:
        """Where what has arrived from an address lies."""
        return self.folder / f"part-{hashlib.sha256(url.encode()).hexdigest()[:12]}"

    def __call__(self, url: str, output_file: str | Path, pooch: Any = None, check_only: bool = False) -> None:
        """Download `url` to `output_file`; pooch's signature.

        Raises:
            DownloadError: the server refuses, sends a web page or a file of another size, or breaks off every time.
        """
        part, tried, fruitless, last = self.part(url), 0, 0, ""
        while tried < MOST and fruitless < TRIES:
            tried += 1
            before = _length(part)
            try:
                self._ask(url, part)
                os.replace(part, output_file)
                _note(part).unlink(missing_ok=True)
                return
            except DroppedError as error:
                last = " ".join(str(error).split())
                fruitless = 0 if _length(part) > before else fruitless + 1
            if fruitless < TRIES:
                time.sleep(min(WAIT * 2 ** max(fruitless - 1, 0), LONGEST_WAIT))
        have = f", {_length(part)} bytes are kept for the next time" if _length(part) else ""
        raise DownloadError(f"gave up after {tried} tries ({last}){have}")

    def forget(self, url: str) -> None:
        """Remove what has arrived from an address."""
        self.part(url).unlink(missing_ok=True)
        _note(self.part(url)).unlink(missing_ok=True)

    def _ask(self, url: str, part: Path) -> None:
        """One request for what is still missing."""
        import requests

        start, headers, total = self._rest(url, part)
        if start and start == total:  # a process was killed between the last byte and the end
            return self._measure(start)
        try:
            with requests.get(url, stream=True, timeout=TIMEOUT, headers=headers) as answer:
                start, total = self._understand(answer, url, start)
                if not start:
                    self.forget(url)  # before the note: bytes of an earlier version must not be taken for this one's
                _note(part).write_text(json.dumps({"url": url, "total": total, "recognised": _recognised(answer)}))
                self.resumed = self.resumed or start > 0
                with part.open("r+b" if start else "wb") as file, self._bar(start, total) as report:
                    file.seek(start)
                    file.truncate()
                    for block in answer.iter_content(BLOCK):
                        file.write(block)
                        report(len(block))
                    file.flush()
                    os.fsync(file.fileno())  # on the disk before it gets its name
        except (requests.RequestException, ConnectionError, TimeoutError) as error:
            raise DroppedError(str(error)) from None
        have = _length(part)
        if total is not None and have < total:
            raise DroppedError(f"the connection ended after {have} of {total} bytes")
        if total is not None and have > total:
            self.forget(url)
            raise DroppedError(f"{have} bytes arrived instead of {total}")
        self._measure(have)

    def _rest(self, url: str, part: Path) -> tuple[int, dict[str, str], int | None]:
        """From which byte to ask on, the request's headers, and the size that the server told before."""
        headers = {"Accept-Encoding": "identity"}  # the file as it is, so that bytes can be counted
        try:
            kept = json.loads(_note(part).read_text())
        except (OSError, ValueError):
            kept = {}
        start = _length(part)
        if not start or kept.get("url") != url or not (kept.get("recognised") or self.checked):
            return 0, headers, None
        headers["Range"] = f"bytes={start}-"
        if kept.get("recognised"):
            headers["If-Range"] = kept["recognised"]
        return start, headers, kept.get("total")

    def _understand(self, answer: requests.Response, url: str, start: int) -> tuple[int, int | None]:
        """The byte that an answer begins with, and how many the whole file has."""
        code = answer.status_code
        if code == 416:  # there is nothing after what is here: it was whole, or it is not of this file
            self.forget(url)
            raise DroppedError(f"the server has no byte {start}: starting anew")
        if code in BUSY or code >= 500:
            self._wait_as_told(answer)
            raise DroppedError(f"the server answers {code} {answer.reason}")
        if code in (401, 403):
            raise DownloadError(f"the server answers {code} {answer.reason}: it asks for a login or refuses")
        if code not in (200, 206):
            raise DownloadError(f"the server answers {code} {answer.reason}")
        if answer.headers.get("Content-Type", "").startswith("text/html"):
            raise DownloadError("the server sends a web page (of a login, a quota or a confirmation) instead of the file")
        if code == 206:
            first, total = _range(answer.headers.get("Content-Range", ""))
            if first != start:
                self.forget(url)
                raise DroppedError(f"the server sends the file from byte {first} where {start} was asked for: starting anew")
        else:
            length = answer.headers.get("Content-Length", "")
            start, total = 0, int(length) if length.isdigit() else None
        if total is not None:
            self._measure(total)
        return start, total

    def _measure(self, size: int) -> None:
        if self.size is not None and size != self.size:
            raise DownloadError(f"it has {size} bytes, {self.size} are expected")

    def _wait_as_told(self, answer: requests.Response) -> None:
        seconds = answer.headers.get("Retry-After", "")
        if seconds.isdigit() and WAIT:
            time.sleep(min(int(seconds), LONGEST_WAIT))

    @contextlib.contextmanager
    def _bar(self, start: int, total: int | None) -> Iterator[Any]:
        if not self.progress:
            yield lambda count: None
            return
        from tqdm import tqdm

        with tqdm(total=total, initial=start, unit="B", unit_scale=True, ncols=79, file=sys.stderr) as bar:
            yield bar.update


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _recognised(answer: requests.Response) -> str:
    """What `If-Range` may say: a strong ETag, or the date of the last change."""
    tag = answer.headers.get("ETag", "")
    return tag if tag.startswith('"') else answer.headers.get("Last-Modified", "")


def _range(header: str) -> tuple[int, int | None]:
    """First byte and size of the whole of a ``Content-Range``; -1 where it cannot be read.

    >>> _range("bytes 300-999/1000"), _range("bytes 300-999/*"), _range("")
    ((300, 1000), (300, None), (-1, None))
    """
    unit, _, rest = header.partition(" ")
    place, _, total = rest.partition("/")
    first = place.partition("-")[0]
    if unit != "bytes" or not first.isdigit():
        return -1, None
    return int(first), int(total) if total.isdigit() else None


# --- one process at a time --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[bool]:
    """Hold a lock for a block, over every process and machine that sees the folder; the system releases it when a process is killed.

    Args:
        path: its file, which is there only as long as somebody holds it or waits.
        what: named on standard error while another process holds it.
    Yields:
        False where the file system has no locks: the block must then use names of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(path, what)
    try:
        yield file is not None
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # before it is released: who waits then sees that its file is gone and takes a new one
            file.close()


def _locked(path: Path, what: str) -> IO[bytes] | None:
    import fcntl

    said = False
    while True:
        file = path.open("ab")
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not said:
                    print(f"{what}: another process is at it, waiting", file=sys.stderr, flush=True)
                    said = True
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            file.close()
            if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                return None
            raise
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        file.close()
