"""Archives: what is unpacked, and what damaged or hostile ones leave behind."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qvsr.data import archives, assets
from qvsr.data.archives import ArchiveError
from qvsr.provenance import DiskFullError, atomic_path

FILES = {
    "set/GT/000/00000000.png": np.random.default_rng(0).bytes(70_000),
    "set/GT/011/00000000.png": b"second",
    "set/readme.txt": b"",
}
Make = Callable[..., Path]


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return path


def tarred(path: Path, files: dict[str, bytes], *more: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as packed:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
        for info in more:
            packed.addfile(info)
    return path


def pack(path: Path, files: dict[str, bytes]) -> Path:
    return zipped(path, files) if path.suffix == ".zip" else tarred(path, files)


def refused(archive: Path, match: str) -> None:
    """It is refused with this message, and neither its folder nor anything beside it appears."""
    target = archive.parent / "out" / "folder"
    before = {file for file in archive.parent.rglob("*") if "out" not in file.parts}
    with pytest.raises(ArchiveError, match=match), atomic_path(target) as partial:
        archives.unpack(archive, partial)
    assert not list(target.parent.iterdir())
    assert {file for file in archive.parent.rglob("*") if "out" not in file.parts} == before


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz"])
def test_what_is_in_it_comes_out(tmp_path: Path, name: str) -> None:
    assert name.endswith(assets.ARCHIVES) and assets.ARCHIVES == archives.SUFFIXES
    archive = pack(tmp_path / name, FILES)
    written = archives.unpack(archive, tmp_path / "out")
    assert {file: (tmp_path / "out" / file).read_bytes() for file in written} == FILES
    assert {file: one.sha256 for file, one in written.items()} == {file: hashlib.sha256(data).hexdigest() for file, data in FILES.items()}
    assert len([file for file in (tmp_path / "out").rglob("*") if file.is_file()]) == 3


def test_parts_of_it(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", FILES)
    assert list(archives.unpack(archive, tmp_path / "one", ("set/GT/011/*", "readme.txt"))) == ["set/GT/011/00000000.png", "set/readme.txt"]
    with pytest.raises(ArchiveError, match=r"a.zip has no file set/GT/999/\*; it is not the archive that is expected"):
        archives.unpack(archive, tmp_path / "two", ("set/GT/011/*", "set/GT/999/*"))
    archives.take(archive, "readme.txt", tmp_path / "readme.txt")
    assert (tmp_path / "readme.txt").read_bytes() == b""
    with pytest.raises(
        ArchiveError, match="a.zip has 2 files 00000000.png, one is needed: set/GT/000/00000000.png, set/GT/011/00000000.png"
    ):
        archives.take(archive, "00000000.png", tmp_path / "frame.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.zip", "one", "readme.txt", "two"]
    with pytest.raises(ArchiveError, match="a.rar is no archive that can be unpacked here: .zip, .tar"):
        archives.unpack(tmp_path / "a.rar", tmp_path / "three")


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("../out.png", r"bad.* holds a path that leaves its folder, '../out.png'"),
        ("set/../../out.png", "holds a path that leaves its folder"),
        ("/tmp/out.png", "holds an absolute path, '/tmp/out.png'"),
        ("C:/out.png", "holds an absolute path, 'C:/out.png'"),
        ("set\\..\\out.png", "holds a name that is no plain path"),
        ("set/a\nb.png", "holds a name that is no plain path"),
    ],
)
def test_a_path_out_of_the_folder(tmp_path: Path, suffix: str, name: str, match: str) -> None:
    refused(pack(tmp_path / f"bad{suffix}", {**FILES, name: b"?"}), match)


def special(name: str, kind: bytes, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


@pytest.mark.parametrize(
    ("info", "match"),
    [
        (special("set/link", tarfile.SYMTYPE, "/etc/passwd"), "bad.tar holds a symbolic link to '/etc/passwd', 'set/link'"),
        (special("set/link", tarfile.SYMTYPE, "GT"), "holds a symbolic link"),
        (special("set/link", tarfile.LNKTYPE, "../../secret"), "holds a hard link to '../../secret'"),
        (special("set/null", tarfile.CHRTYPE), "holds a device or other special file, 'set/null'"),
        (special("set/pipe", tarfile.FIFOTYPE), "holds a device or other special file"),
    ],
)
def test_links_and_devices_in_tar(tmp_path: Path, info: tarfile.TarInfo, match: str) -> None:
    refused(tarred(tmp_path / "bad.tar", FILES, info), match)


def test_links_in_zip(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "bad.zip", FILES)
    info = zipfile.ZipInfo("set/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr(info, "/etc/passwd")
        packed.writestr("set/link/inside.png", b"through it")
    refused(archive, "bad.zip holds a symbolic link, 'set/link'")


def test_a_file_that_comes_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as packed:
        packed.writestr("a.png", b"first")
        with pytest.warns(UserWarning, match="Duplicate name"):
            packed.writestr("a.png", b"second")
    refused(tmp_path / "bad.zip", "bad.zip has 'a.png' twice")
    refused(tarred(tmp_path / "bad.tar", {"a": b"file", "a/b": b"in a file"}), "has 'a/b' as a file and as a folder")


def test_a_bomb_that_says_so(tmp_path: Path) -> None:
    """10 GB of zeros: by its list (zip), by the header of its member (tar.gz)."""
    block, archive = bytes(1 << 20), tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for number in range(10):
            packed.writestr(f"{number}.png", block)
    content = bytearray(archive.read_bytes())
    size, many = (1 << 20).to_bytes(4, "little"), (1 << 30).to_bytes(4, "little")
    start = content.find(b"PK\x01\x02")
    content[start:] = bytes(content[start:]).replace(size, many)  # ten members of 1 GiB each in the list
    archive.write_bytes(content)
    refused(archive, r"bomb.zip would unpack to 10737 MB from 0.0 MB; 20 times its size is the limit")
    info = tarfile.TarInfo("frame.png")
    info.size = 10 << 30
    with gzip.open(tmp_path / "bomb.tar.gz", "wb") as packed:
        packed.write(info.tobuf() + block)
    refused(tmp_path / "bomb.tar.gz", r"bomb.tar.gz would unpack to more than 10737 MB from 0.0 MB at 'frame.png'")


def test_a_bomb_that_hides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "SMALL", 1 << 20)
    info = tarfile.TarInfo("frame.png")
    info.pax_headers = {"comment": "0" * (8 << 20)}  # in a header, not in a file
    with gzip.open(tmp_path / "bomb.tar.gz", "wb") as packed:
        packed.write(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    refused(tmp_path / "bomb.tar.gz", r"bomb.tar.gz is damaged or cut short \(a header of 83886\d\d bytes, 16384 are the limit\)")
    with gzip.open(tmp_path / "bomb.tar.gz", "wb") as packed:
        packed.write(tarfile.TarInfo("frame.png").tobuf() + bytes(8 << 20))  # after the end
    refused(tmp_path / "bomb.tar.gz", r"bomb.tar.gz would unpack to more than 20 times its 0.0 MB, the limit")
    archive = zipped(tmp_path / "bomb.zip", {"frame.png": bytes(4 << 20)})
    content, true, less = archive.read_bytes(), (4 << 20).to_bytes(4, "little"), (1000).to_bytes(4, "little")
    archive.write_bytes(content.replace(true, less))  # its list says 1000 bytes
    refused(archive, "bomb.zip is damaged or cut short")
    many = zipped(tmp_path / "many.zip", {f"{number}": b"" for number in range(20)})
    monkeypatch.setattr(archives, "MEMBERS", 19)
    refused(many, "many.zip has more than 19 members")


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_a_truncated_archive(tmp_path: Path, suffix: str, share: float) -> None:
    archive = pack(tmp_path / f"half{suffix}", FILES)
    content = archive.read_bytes()
    if suffix == ".tar":
        content = content.rstrip(b"\0")  # what follows the files are zeros alone
    archive.write_bytes(content[: int(len(content) * share)])
    refused(archive, r"half.* is damaged or cut short")


def test_a_tar_cut_between_two_files(tmp_path: Path) -> None:
    """tarfile takes that for the end."""
    archive = tarred(tmp_path / "half.tar", {"a.png": b"x" * 512, "b.png": b"y" * 512})
    archive.write_bytes(archive.read_bytes()[:1024])
    refused(archive, "half.tar is damaged or cut short")
    broken = bytearray(tarred(tmp_path / "b.tar", {"a.png": b"x" * 512, "b.png": b"y" * 512}).read_bytes())
    broken[1030] ^= 1  # in the second header
    (tmp_path / "b.tar").write_bytes(broken)
    refused(tmp_path / "b.tar", r"b.tar is damaged or cut short \(bad checksum\)")


def test_other_bytes_in_a_member(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", FILES)
    content = bytearray(archive.read_bytes())
    content[5000] ^= 1
    archive.write_bytes(content)
    refused(archive, r"a.zip is damaged or cut short \(Bad CRC-32 for file 'set/GT/000/00000000.png'\)")


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = pack(tmp_path / "a.zip", FILES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100_000, 50_000, 50_000))  # type: ignore[attr-defined]
    with pytest.raises(DiskFullError, match="a.zip unpacks to more than 0.0 GB, 0.0 GB are free"), atomic_path(tmp_path / "out") as partial:
        archives.unpack(archive, partial)
    assert [file.name for file in tmp_path.iterdir()] == ["a.zip"]
