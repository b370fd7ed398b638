"""Assets over a network that fails, and archives that are not what they should be: the right file or a clear error, never a half one."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qvsr.data import archives, assets, download
from qvsr.data.assets import AssetError, ByHandError
from qvsr.provenance import ROOT, DiskFullError
from tests.qvsr.data.server import Fault, Server
from tests.qvsr.data.test_assets import run

CONTENT = np.random.default_rng(2).bytes(1_000_000)
SHA = hashlib.sha256(CONTENT).hexdigest()
FRAMES = {f"SET/{kind}/000/{number:08d}.png": f"{kind} {number}".encode() for kind in ("GT", "LQ") for number in range(3)}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served" / "mirror").mkdir(parents=True)
    (tmp_path / "served" / "model.ckpt").write_bytes(CONTENT)
    (tmp_path / "served" / "mirror" / "model.ckpt").write_bytes(CONTENT)
    with zipfile.ZipFile(tmp_path / "served" / "set.zip", "w") as packed:
        for name, data in FRAMES.items():
            packed.writestr(name, data)
    with Server(tmp_path / "served") as one:
        yield one


@pytest.fixture
def here(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A list of a model at two addresses, one without a digest, two folders of one archive, one behind a login; and the folder for them."""
    common = {"page": "https://example.org", "licence": "MIT", "use": "tests"}
    archive = {"file": "set.zip", "urls": [f"{server.url}/set.zip"], **common}
    table: dict[str, dict[str, Any]] = {
        "model": {
            "file": "model.ckpt",
            "urls": [f"{server.url}/model.ckpt", f"{server.url}/mirror/model.ckpt"],
            "sha256": SHA,
            "bytes": len(CONTENT),
            **common,
        },
        "unpinned": {"file": "unpinned.ckpt", "urls": [f"{server.url}/model.ckpt"], **common},
        "set": {**archive, "unpack": "SET"},
        "lq": {**archive, "unpack": "SET-LQ", "only": ["SET/LQ/*"]},
        "walled": {"file": "walled.zip", "unpack": "WALLED", "by_hand": "a Baidu link, folder test", **common},
    }
    (tmp_path / "assets.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    monkeypatch.setattr(assets, "read", lambda path=tmp_path / "assets.yaml", real=assets.read: real(path))
    monkeypatch.setenv("QVSR_ASSETS", str(tmp_path / "here"))
    monkeypatch.setattr(download, "WAIT", 0)
    return tmp_path / "here"


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def start(here: Path, name: str, limit: int | None = None) -> subprocess.Popen[str]:
    """`fetch` in a process of its own, which may write no file longer than `limit`."""
    code = (
        "import functools, sys; from pathlib import Path; from qvsr.data import assets\n"
        "assets.read = functools.partial(assets.read, Path(sys.argv[1]))\n"
        "try: print(assets.fetch(sys.argv[2], progress=False))\n"
        "except (ValueError, OSError) as error: sys.exit(f'error: {error}')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(here.parent / "assets.yaml"), name],
        cwd=ROOT,
        env={**os.environ, "QVSR_ASSETS": str(here)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


# --- downloads --------------------------------------------------------------------------------------------------------


def test_dropped_at_30_percent(here: Path, server: Server) -> None:
    server.faults["model.ckpt"] = Fault(drop=0.3)
    assert assets.fetch("model", progress=False).read_bytes() == CONTENT
    assert [(one.path, one.status) for one in server.asked] == [("model.ckpt", 200), ("model.ckpt", 206)]
    assert 300_000 - download.BLOCK <= server.asked[1].start <= 300_000 and names(here) == ["model.ckpt"]


def test_a_server_that_ignores_ranges(here: Path, server: Server) -> None:
    server.faults["model.ckpt"] = Fault(drop=0.3, ranges=False)
    assert assets.fetch("model", progress=False).read_bytes() == CONTENT
    assert [one.status for one in server.asked] == [200, 200] and names(here) == ["model.ckpt"]


@pytest.mark.parametrize(
    "fault",
    [Fault(status=404), Fault(status=500), Fault(content=CONTENT[::-1]), Fault(content=b"short"), Fault(content=b"<p>", kind="text/html")],
    ids=["404", "500", "other content", "other size", "web page"],
)
def test_the_mirror_is_taken(here: Path, server: Server, fault: Fault) -> None:
    server.faults["model.ckpt"] = fault
    assert assets.fetch("model", progress=False).read_bytes() == CONTENT
    assert server.asked[0].path == "model.ckpt" and server.asked[-1].path == "mirror/model.ckpt" and names(here) == ["model.ckpt"]


def test_a_mirror_of_ones_own_is_tried_first(here: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "served" / "group"
    own.mkdir()
    (own / "model.ckpt").write_bytes(b"another file")  # refused by its digest: then the listed address
    with zipfile.ZipFile(own / "walled.zip", "w") as packed:
        packed.writestr("a.png", b"a")
    monkeypatch.setenv("QVSR_MIRROR", f"{server.url}/group/")
    assert assets.fetch("model", progress=False).read_bytes() == CONTENT
    assert server.asked[0].path == "group/model.ckpt" and server.asked[-1].path == "model.ckpt"
    assert content(assets.fetch("walled", progress=False)) == {"a.png": b"a"}  # what lies behind a login is served once for all
    monkeypatch.setenv("QVSR_MIRROR", "/data/files")
    with pytest.raises(
        AssetError, match="QVSR_MIRROR is '/data/files', an address of http or https is needed, such as http://server/files"
    ):
        assets.fetch("unpinned", progress=False)


def test_every_reason_is_told_when_no_address_helps(here: Path, server: Server) -> None:
    server.faults["model.ckpt"], server.faults["mirror/model.ckpt"] = Fault(status=404), Fault(content=CONTENT[::-1])
    with pytest.raises(AssetError) as caught:
        assets.fetch("model", progress=False)
    text = str(caught.value)
    other = hashlib.sha256(CONTENT[::-1]).hexdigest()
    assert f"{server.url}/model.ckpt: the server answers 404 Not Found; " in text
    assert f"{server.url}/mirror/model.ckpt: its SHA-256 begins with {other[:16]}, expected is {SHA[:16]}; " in text
    assert "\n" not in text and text.endswith("`python -m qvsr assets import --from DIR`") and not names(here)


def test_pieces_of_two_files_are_fetched_anew(here: Path, server: Server) -> None:
    """A server that does not say which version it sends: only the digest tells, and the right file is one request away."""
    server.faults["model.ckpt"] = Fault(tag=False)
    url = f"{server.url}/model.ckpt"
    work = here / ".fetch-model.ckpt"
    part = download.Resuming(work).part(url)
    work.mkdir(parents=True)
    part.write_bytes(CONTENT[::-1][:400_000])
    part.with_name(part.name + ".json").write_text(json.dumps({"url": url, "total": len(CONTENT), "recognised": ""}))
    assert assets.fetch("model", progress=False).read_bytes() == CONTENT
    assert [(one.path, one.start) for one in server.asked] == [("model.ckpt", 400_000), ("model.ckpt", 0)]


def test_killed_while_fetching(here: Path, server: Server) -> None:
    server.faults["model.ckpt"] = Fault(pause=0.05)
    process = start(here, "model")
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size > 200_000 for file in here.glob(".fetch-model.ckpt/part-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (here / "model.ckpt").exists()
    server.faults.clear()
    assert assets.fetch("model", progress=False).read_bytes() == CONTENT
    assert len(server.asked) == 2 and server.asked[1].start > 200_000 and names(here) == ["model.ckpt"]


def test_two_processes_fetch_the_same_file(here: Path, server: Server) -> None:
    server.faults["model.ckpt"] = Fault(pause=0.05, drop=0.5)
    both = [start(here, "model"), start(here, "model")]
    seen = set()
    while any(one.poll() is None for one in both):
        if (here / "model.ckpt").exists():
            seen.add((here / "model.ckpt").stat().st_size)
        time.sleep(0.005)
    said = [one.communicate() for one in both]
    assert [out for out, _ in said] == [f"{here / 'model.ckpt'}\n"] * 2
    assert (here / "model.ckpt").read_bytes() == CONTENT and seen <= {len(CONTENT)} and names(here) == ["model.ckpt"]
    assert [one.status for one in server.asked] == [200, 206]  # one download, in two pieces
    assert [err for _, err in said if "model.ckpt: another process is at it, waiting" in err]


def test_disk_full(here: Path, server: Server) -> None:
    """A limit on the size of files stands for the disk: the system refuses a write in the midst of the file."""
    process = start(here, "model", limit=500_000)
    out, err = process.communicate()
    assert process.returncode == 1 and out == "" and err.count("\n") == 1
    assert err.startswith(f"error: {here / 'model.ckpt'}: the disk is full (") and "then run the same command" in err
    assert not (here / "model.ckpt").exists() and {one.path for one in server.asked} == {"model.ckpt"}  # no use in asking the mirror
    out, err = start(here, "model").communicate()
    assert out == f"{here / 'model.ckpt'}\n" and (here / "model.ckpt").read_bytes() == CONTENT
    assert 400_000 < server.asked[-1].start <= 500_000 and names(here) == ["model.ckpt"]


# --- digests that nobody has published ----------------------------------------------------------------------------------


def test_an_unknown_digest_is_recorded_and_enforced(here: Path, server: Server) -> None:
    assert assets.fetch("unpinned", progress=False).read_bytes() == CONTENT
    assert json.loads((here / "assets.lock").read_text()) == {"unpinned.ckpt": SHA}
    assert assets.paths({"unpinned": SHA[:8]}) == {"unpinned": here / "unpinned.ckpt"}
    rows = {row["name"]: row for row in json.loads(run("status", "--json")[1])}
    assert rows["unpinned"]["recorded"] == SHA and rows["unpinned"]["sha256"] is None and rows["model"]["recorded"] == ""
    other = hashlib.sha256(CONTENT[::-1]).hexdigest()
    reason = f"its SHA-256 begins with {other[:16]}, that of the first one with {SHA[:16]}, see {here / 'assets.lock'}"
    (here / "unpinned.ckpt").write_bytes(CONTENT[::-1])
    with pytest.raises(AssetError, match=rf"unpinned.ckpt is damaged \({reason}\): delete it"):
        assets.find("unpinned")
    code, text = run("verify")
    assert code == 1 and f"unpinned: damaged: {reason}\n" in text
    server.faults["model.ckpt"] = Fault(content=CONTENT[::-1])
    with pytest.raises(AssetError, match=reason):
        assets.fetch("unpinned", progress=False)
    server.faults.clear()
    assert assets.fetch("unpinned", progress=False).read_bytes() == CONTENT
    assert names(here) == ["assets.lock", "unpinned.ckpt"]


def test_a_file_put_there_by_hand_is_recorded_when_it_is_used(here: Path) -> None:
    here.mkdir()
    (here / "unpinned.ckpt").write_bytes(b"by hand")
    assert not (here / "assets.lock").exists()
    assets.find("unpinned")
    assert json.loads((here / "assets.lock").read_text()) == {"unpinned.ckpt": hashlib.sha256(b"by hand").hexdigest()}
    (here / "assets.lock").write_text("{")
    with pytest.raises(AssetError, match=r"assets.lock cannot be read \(Expecting .*\): restore it, or delete it to record anew"):
        assets.find("unpinned")


def test_a_digest_that_cannot_be_recorded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here.mkdir()
    (here / "unpinned.ckpt").write_bytes(b"by hand")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(download, "lock", refuse)
    with pytest.raises(
        AssetError, match=r"assets.lock cannot be written \(Permission denied\), and it must have the digest of unpinned.ckpt"
    ):
        assets.find("unpinned")


# --- archives ---------------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".asset.json"}


def test_an_archive_becomes_a_folder(here: Path, server: Server) -> None:
    server.faults["set.zip"] = Fault(drop=0.3)
    assert assets.fetch("set", progress=False) == here / "SET" == assets.find("set")
    assert content(here / "SET") == FRAMES
    assert content(assets.fetch("lq", progress=False)) == {name: data for name, data in FRAMES.items() if "/LQ/" in name}
    archive = hashlib.sha256((server.root / "set.zip").read_bytes()).hexdigest()
    assert json.loads((here / "assets.lock").read_text()) == {"set.zip": archive}
    assert names(here) == ["SET", "SET-LQ", "assets.lock"]
    asked = len(server.asked)
    assets.fetch("SET", progress=False)
    assert len(server.asked) == asked and "set: here\n" in run("verify")[1]


def test_a_folder_that_was_changed(here: Path) -> None:
    frame = assets.fetch("set", progress=False) / "SET/GT/000/00000001.png"
    frame.write_bytes(b"gt 1")
    assert assets.find("set")  # by sizes; verify reads it
    code, text = run("verify")
    assert code == 1 and "set: damaged: the SHA-256 of SET/GT/000/00000001.png begins with " in text
    frame.write_bytes(b"longer than it was")
    with pytest.raises(AssetError, match=r"SET is damaged \(SET/GT/000/00000001.png has 18 bytes, 4 are expected\)"):
        assets.find("set")
    frame.unlink()
    with pytest.raises(AssetError, match=r"\(SET/GT/000/00000001.png is missing\)"):
        assets.find("set")
    (here / "SET" / ".asset.json").unlink()
    with pytest.raises(AssetError, match=r"\(it has no .asset.json that can be read: it was not unpacked here\)"):
        assets.find("set")
    assert content(assets.fetch("set", progress=False)) == FRAMES  # replaced as a whole
    (here / "model.ckpt").mkdir()
    with pytest.raises(AssetError, match=r"model.ckpt is damaged \(it is a folder, a file is expected\)"):
        assets.find("model")


def hostile(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "truncated":
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("a.png", CONTENT)
        return file.getvalue()[:300_000]
    if kind == "symlink":
        with zipfile.ZipFile(file, "w") as packed:
            info = zipfile.ZipInfo("SET/link")
            info.external_attr = 0o120777 << 16
            packed.writestr(info, "/etc")
        return file.getvalue()
    if kind == "bomb":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("a.png", bytes(80 << 20))
        return file.getvalue()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("SET/GT/good.png", b"good")
        packed.writestr({"traversal": "../../evil.png", "absolute": "/tmp/evil.png"}[kind], b"evil")
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("truncated", "is damaged or cut short"),
        ("traversal", "holds a path that leaves its folder, '../../evil.png'"),
        ("absolute", "holds an absolute path, '/tmp/evil.png'"),
        ("symlink", "holds a symbolic link, 'SET/link'"),
        ("bomb", "would unpack to 84 MB from 0.1 MB; 20 times its size is the limit"),
    ],
)
def test_a_bad_archive_leaves_nothing(here: Path, server: Server, kind: str, match: str) -> None:
    server.faults["set.zip"] = Fault(content=hostile(kind))
    with pytest.raises(AssetError, match=rf"set: set.zip could not be fetched: {server.url}/set.zip: (set.zip |){match}"):
        assets.fetch("set", progress=False)
    assert not names(here) and not list(here.parent.rglob("evil.png"))
    server.faults.clear()
    assert content(assets.fetch("set", progress=False)) == FRAMES


def test_a_disk_that_is_full_while_it_unpacks(here: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was downloaded is not downloaded again."""

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(archives, "_write", refuse)
        with pytest.raises(DiskFullError, match=r"SET: the disk is full \(.*\); free some space"):
            assets.fetch("set", progress=False)
    assert names(here) == [".fetch-SET"]
    assert content(assets.fetch("set", progress=False)) == FRAMES
    assert len(server.asked) == 1 and names(here) == ["SET", "assets.lock"]


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_what_lies_behind_a_login(here: Path, tmp_path: Path) -> None:
    with pytest.raises(ByHandError) as caught:
        assets.fetch("walled", progress=False)
    assert str(caught.value) == (
        "walled: walled.zip has no address to fetch it from: get it by hand, see https://example.org (a Baidu link, folder test), "
        f"put it into {here} as walled.zip and run `python -m qvsr assets fetch walled`, "
        "or leave it in any folder and run `python -m qvsr assets import --from DIR`"
    )
    assert not here.exists()
    code, text = run("fetch", "walled", "model", "--no-progress")
    assert code == 1 and f"error: {caught.value}\n" in text and f"model: {here / 'model.ckpt'}\n" in text  # the other is fetched
    (here / "walled.zip").write_bytes(hostile("traversal"))
    with pytest.raises(AssetError, match=r"walled: .*walled.zip is not what is expected \(.*leaves its folder.*\): delete it, then get it"):
        assets.fetch("walled", progress=False)
    assert not (here / "WALLED").exists()
    with zipfile.ZipFile(here / "walled.zip", "w") as packed:
        packed.writestr("a.png", b"a")
    assert content(assets.fetch("walled", progress=False)) == {"a.png": b"a"}


def test_an_archive_brought_from_elsewhere(here: Path, server: Server, tmp_path: Path) -> None:
    brought = tmp_path / "brought"
    brought.mkdir()
    (brought / "set.zip").write_bytes((server.root / "set.zip").read_bytes())
    (brought / "walled.zip").write_bytes(hostile("symlink"))
    code, text = run("import", "--from", str(brought))
    assert code == 1 and f"set: imported, {brought / 'set.zip'}\n" in text and f"lq: imported, {brought / 'set.zip'}\n" in text
    assert "walled: damaged, " in text and "holds a symbolic link, 'SET/link'" in text
    assert content(here / "SET") == FRAMES and names(here) == ["SET", "SET-LQ", "assets.lock"]
    assert (brought / "set.zip").exists() and not server.asked


def test_rules_know_files_and_folders(here: Path) -> None:
    files, folders = assets.names(unpacked=False), assets.names(unpacked=True)
    for name, rule in (("model.ckpt", files), ("SET", folders), ("SET-LQ", folders), ("set.zip", ""), ("model-ckpt", "")):
        assert [bool(re.fullmatch(one, name)) for one in (files, folders)] == [rule == files, rule == folders]


def test_tar_gz_is_unpacked_too(here: Path, server: Server, tmp_path: Path) -> None:
    with tarfile.open(server.root / "set.tar.gz", "w:gz") as packed:
        for name, data in FRAMES.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    table = yaml.safe_load((tmp_path / "assets.yaml").read_text())
    table["tar"] = {**table["set"], "file": "set.tar.gz", "urls": [f"{server.url}/set.tar.gz"], "unpack": "TAR"}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(table))
    assets.read.__defaults__ = (tmp_path / "more.yaml", *assets.read.__defaults__[1:])  # type: ignore[attr-defined, misc]
    assert content(assets.fetch("tar", progress=False)) == FRAMES
