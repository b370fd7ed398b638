"""A server of files on 127.0.0.1 that does what networks do: it breaks off, ignores ranges, sends something else, or is slow.

    with Server(folder) as server:
        server.faults["a.zip"] = Fault(drop=0.3, times=2)
        assets.fetch(...)                       # from f"{server.url}/a.zip"
        server.asked                            # path, first byte and status of every request

It serves the files of one folder, streams them, and answers ranges, ETags and `If-Range`.
"""

from __future__ import annotations

import hashlib
import http.server
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

BLOCK = 1 << 16


@dataclass
class Fault:
    """What goes wrong with one file.

    Args:
        drop: the connection ends after this share of an answer's body,
        times: in this many answers; the later ones are whole. -1: in all.
        ranges: whether a range is answered by the range; otherwise by the whole file.
        status: every answer is this error.
        content: sent in place of the file.
        pause: seconds between blocks of 64 KiB.
        kind: Content-Type.
        tag: whether an ETag is sent, by which a client knows that the file is still the same.
    """

    drop: float | None = None
    times: int = 1
    ranges: bool = True
    status: int | None = None
    content: bytes | None = None
    pause: float = 0.0
    kind: str = "application/octet-stream"
    tag: bool = True


class Asked(NamedTuple):
    path: str
    start: int
    """First byte that was asked for."""
    status: int


@dataclass
class Server:
    """Serves a folder as long as the block runs."""

    root: Path
    faults: dict[str, Fault] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> Server:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def _answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        path = handler.path.lstrip("/")
        fault = self.faults.get(path, Fault())
        file = self.root / path
        wanted = handler.headers.get("Range", "")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        status = fault.status or (200 if file.is_file() or fault.content is not None else 404)
        if status != 200:
            self.asked.append(Asked(path, start, status))
            handler.send_error(status)
            return
        size = len(fault.content) if fault.content is not None else file.stat().st_size
        version = hashlib.sha256(fault.content).hexdigest() if fault.content is not None else f"{size}-{file.stat().st_mtime_ns}"
        tag = f'"{version}"' if fault.tag else ""
        first = start if fault.ranges and handler.headers.get("If-Range", tag) == tag else 0
        if first >= size > 0:
            self.asked.append(Asked(path, start, 416))
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{size}")
            handler.end_headers()
            return
        self.asked.append(Asked(path, start, 206 if first else 200))
        handler.send_response(206 if first else 200)
        handler.send_header("Content-Type", fault.kind)
        handler.send_header("Content-Length", str(size - first))
        if fault.tag:
            handler.send_header("ETag", tag)
        if first:
            handler.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        handler.end_headers()
        end = size
        if fault.drop is not None and fault.times != 0:
            fault.times -= 1
            end = first + int((size - first) * fault.drop)
        try:
            self._send(handler, file, fault, first, end)
        except (BrokenPipeError, ConnectionResetError):
            return  # the client is gone
        if end < size:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, handler: http.server.BaseHTTPRequestHandler, file: Path, fault: Fault, first: int, end: int) -> None:
        while first < end:
            count = min(BLOCK, end - first)
            if fault.content is not None:
                block = fault.content[first : first + count]
            else:
                with file.open("rb") as source:
                    source.seek(first)
                    block = source.read(count)
            handler.wfile.write(block)
            first += count
            if fault.pause:
                time.sleep(fault.pause)
