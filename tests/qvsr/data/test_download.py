"""Downloads over a network that fails: the right file or a clear error, and never a byte twice that could be kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qvsr.data import download
from qvsr.data.download import DownloadError, Resuming
from qvsr.provenance import ROOT
from tests.qvsr.data.server import Fault, Server

CONTENT = np.random.default_rng(1).bytes(1_000_000)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "WAIT", 0)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.bin").write_bytes(CONTENT)
    with Server(tmp_path / "served") as one:
        yield one


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def get(server: Server, work: Path, **settings: object) -> bytes:
    """The file as it arrives; nothing of it stays in the folder."""
    Resuming(work, **settings)(f"{server.url}/a.bin", work / "done")  # type: ignore[arg-type]
    data = (work / "done").read_bytes()
    (work / "done").unlink()
    assert not list(work.iterdir())
    return data


def test_dropped_at_30_percent_it_goes_on_from_there(server: Server, work: Path) -> None:
    server.faults["a.bin"] = Fault(drop=0.3, times=2)
    one = Resuming(work)
    one(f"{server.url}/a.bin", work / "done")
    assert (work / "done").read_bytes() == CONTENT and one.resumed
    starts = [asked.start for asked in server.asked]
    assert [asked.status for asked in server.asked] == [200, 206, 206]
    assert starts[0] == 0 and 300_000 - download.BLOCK <= starts[1] <= 300_000 < starts[2] <= 510_000


def test_a_server_that_ignores_ranges_starts_anew(server: Server, work: Path) -> None:
    server.faults["a.bin"] = Fault(drop=0.3, ranges=False)
    assert get(server, work) == CONTENT
    assert [asked.status for asked in server.asked] == [200, 200] and server.asked[1].start > 0


def test_a_server_that_always_drops_is_given_up(server: Server, work: Path) -> None:
    server.faults["a.bin"] = Fault(drop=0.3, times=-1, ranges=False)
    kept = int(0.3 * len(CONTENT))
    with pytest.raises(DownloadError, match=r"gave up after 5 tries \(.*\), \d+ bytes are kept for the next time") as caught:
        get(server, work)
    part = Resuming(work).part(f"{server.url}/a.bin")
    assert kept - download.BLOCK <= part.stat().st_size <= kept and f"{part.stat().st_size} bytes are kept" in str(caught.value)
    del server.faults["a.bin"]
    assert get(server, work) == CONTENT and server.asked[-1].start == server.asked[-2].start > 0


def test_another_version_is_not_mixed_in(server: Server, work: Path) -> None:
    server.faults["a.bin"] = Fault(drop=0.3, times=-1)
    server.faults["a.bin"].times = 1
    url = f"{server.url}/a.bin"
    one = Resuming(work)
    with pytest.raises(download.DroppedError):
        one._ask(url, one.part(url))
    (server.root / "a.bin").write_bytes(CONTENT[::-1])
    os.utime(server.root / "a.bin", (1, 1))
    assert get(server, work) == CONTENT[::-1]
    assert server.asked[-1].start > 0 and server.asked[-1].status == 200  # asked on, and got the whole of the new one


@pytest.mark.parametrize(("checked", "status"), [(True, 206), (False, 200)])
def test_without_a_tag_only_what_is_checked_is_pieced_together(server: Server, work: Path, checked: bool, status: int) -> None:
    server.faults["a.bin"] = Fault(drop=0.3, tag=False)
    assert get(server, work, checked=checked) == CONTENT
    assert server.asked[-1].status == status


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (Fault(status=404), "^the server answers 404 Not Found$"),
        (Fault(status=403), "^the server answers 403 Forbidden: it asks for a login or refuses$"),
        (Fault(content=b"<html>log in</html>", kind="text/html; charset=utf-8"), "sends a web page .* instead of the file"),
        (Fault(content=CONTENT[:-1]), "^it has 999999 bytes, 1000000 are expected$"),
    ],
)
def test_what_asking_again_does_not_help(server: Server, work: Path, fault: Fault, match: str) -> None:
    server.faults["a.bin"] = fault
    with pytest.raises(DownloadError, match=match):
        get(server, work, size=len(CONTENT))
    assert len(server.asked) == 1 and not list(work.iterdir())


def test_a_busy_server_is_asked_again_and_waited_for(server: Server, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(download, "WAIT", 1.0)
    server.faults["a.bin"] = Fault(status=503)
    with pytest.raises(DownloadError, match=r"^gave up after 4 tries \(the server answers 503 Service Unavailable\)$"):
        get(server, work)
    assert waited == [1, 2, 4] and len(server.asked) == 4
    monkeypatch.setattr(download, "TRIES", 9)
    waited.clear()
    with pytest.raises(DownloadError, match="gave up after 9 tries"):
        get(server, work)
    assert waited == [1, 2, 4, 8, 16, 32, 60, 60]


def test_nobody_there(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAIT", 0)
    with pytest.raises(DownloadError, match="gave up after 4 tries .*refused"):
        Resuming(work)("http://127.0.0.1:9/a.bin", work / "done")


def test_whole_but_not_moved(server: Server, work: Path) -> None:
    """What a process leaves that is killed after the last byte; and a part longer than the file."""
    url = f"{server.url}/a.bin"
    part = Resuming(work).part(url)
    part.write_bytes(CONTENT)
    note = {"url": url, "total": len(CONTENT), "recognised": ""}
    part.with_name(part.name + ".json").write_text(json.dumps(note))
    assert get(server, work, checked=True) == CONTENT and server.asked == []
    part.write_bytes(CONTENT + b"?")
    part.with_name(part.name + ".json").write_text(json.dumps(note))
    assert get(server, work, checked=True) == CONTENT
    assert [asked.status for asked in server.asked] == [416, 200]


def hold(path: Path, log: Path) -> None:
    for _ in range(5):
        with download.lock(path, "a.bin") as locked:
            assert locked
            with log.open("a") as file:
                file.write(f"in {os.getpid()}\n")
            time.sleep(0.01)
            with log.open("a") as file:
                file.write(f"out {os.getpid()}\n")


def test_a_lock_is_held_by_one_process_and_leaves_nothing(tmp_path: Path) -> None:
    path, log = tmp_path / "lock", tmp_path / "log"
    forked = multiprocessing.get_context("fork")
    processes = [forked.Process(target=hold, args=(path, log)) for _ in range(3)]
    for one in processes:
        one.start()
    for one in processes:
        one.join()
    assert [one.exitcode for one in processes] == [0, 0, 0]
    lines = [line.split() for line in log.read_text().splitlines()]
    assert len(lines) == 30
    assert all(a == ["in", b[1]] and b[0] == "out" for a, b in zip(lines[::2], lines[1::2], strict=True))
    assert not path.exists()


def test_a_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from qvsr.data.download import lock\n"
        "with lock(Path(sys.argv[1]), 'a'): print('held', flush=True); time.sleep(60)"
    )
    one = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert one.stdout is not None and one.stdout.readline() == "held\n"
    one.kill()
    one.wait()
    with download.lock(tmp_path / "lock", "a") as locked:
        assert locked


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with download.lock(tmp_path / "lock", "a") as locked:
        assert not locked
