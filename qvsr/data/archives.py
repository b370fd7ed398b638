"""Unpacks zip and tar archives from elsewhere, which may be damaged or made to do harm.

Every name, kind and size is checked before it is believed: an archive writes below its own folder, regular files alone, and not much more
than it weighs. Frames and weights hardly compress, so what grows twentyfold is no archive of them.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO

from qvsr.provenance import DiskFullError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
BLOCK = 1 << 20
RATIO = 20
"""The content may have this many times the archive's bytes, and"""
SMALL = 64 << 20
"""always this many: a small archive of text compresses better."""
MEMBERS = 500_000
HEADER = 16 << 10
"""Bytes of what tar writes before a member about its name and attributes; tarfile takes hours for a long one that is made for it."""
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    OverflowError,
)
_END, _HEADER = tarfile.EOFHeaderError, tarfile.HeaderError  # type: ignore[attr-defined]


class ArchiveError(ValueError):
    """An archive that is damaged or that no honest program would have made; one line that names it and the member."""


@dataclass(frozen=True)
class Written:
    """One unpacked file."""

    size: int
    sha256: str


def is_archive(name: str) -> bool:
    """Whether a file's name is that of an archive that can be unpacked.

    >>> is_archive("val_sharp.tar.gz"), is_archive("model.ckpt")
    (True, False)
    """
    return name.lower().endswith(SUFFIXES)


def unpack(archive: Path, target: Path, only: tuple[str, ...] = ()) -> dict[str, Written]:
    """Unpack an archive into a new folder. When it raises, the folder may hold a part: give it a temporary name (`atomic_path`).

    Args:
        archive: .zip, .tar, .tar.gz or .tgz.
        target: folder that does not exist yet.
        only: patterns of the members to write (``train_sharp/000/*``, where ``*`` crosses folders; or a file's name in any folder), each
            of which must match; empty: all. The others are checked too.
    Returns:
        Size and SHA-256 of every file by its path in the folder.
    Raises:
        ArchiveError: damaged, cut short, or with a path out of the folder, a link, a device, or a content beyond all measure.
        DiskFullError: what it declares does not fit on the disk.
    """
    if not is_archive(archive.name):
        raise ArchiveError(f"{archive.name} is no archive that can be unpacked here: {', '.join(SUFFIXES)} are")
    target.mkdir(parents=True)
    found: dict[str, Written] = {}
    try:
        for name, source, size in _members(archive, target):
            if source is None:
                continue  # a folder; one that holds files appears with them
            if not only or any(_matches(name, pattern) for pattern in only):
                found[name] = _write(archive.name, name, source, size, target / name)
    except ArchiveError:
        raise
    except (*_DAMAGE, ValueError) as error:
        raise ArchiveError(f"{archive.name} is damaged or cut short ({' '.join(str(error).split()) or type(error).__name__})") from None
    unmet = [pattern for pattern in only if not any(_matches(name, pattern) for name in found)]
    if unmet or not found:
        raise ArchiveError(f"{archive.name} has no file {unmet[0] if unmet else 'at all'}; it is not the archive that is expected")
    return found


def take(archive: Path, member: str, target: Path) -> None:
    """Write one file of an archive, found by its name in whatever folder of it, to `target`.

    Raises:
        ArchiveError: as :func:`unpack`; or it has no such file, or two.
    """
    scratch = target.with_name(f"{target.name}.unpacked")
    try:
        names = list(unpack(archive, scratch, (member,)))
        if len(names) > 1:
            raise ArchiveError(f"{archive.name} has {len(names)} files {member}, one is needed: {', '.join(names)}")
        (scratch / names[0]).replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or PurePosixPath(name).name == pattern


def _members(archive: Path, target: Path) -> Iterator[tuple[str, IO[bytes] | None, int]]:
    """Name, content (none for a folder) and declared size of every member, each checked before it is handed out."""
    allowed = max(RATIO * archive.stat().st_size, SMALL)
    reader = _zip(archive) if archive.name.lower().endswith(".zip") else _tar(archive, allowed)
    seen: set[str] = set()
    total, count = 0, 0
    room = shutil.disk_usage(target).free
    for raw, kind, size, source in reader:
        count += 1
        name = _checked(archive.name, raw, kind)
        if count > MEMBERS:
            raise ArchiveError(f"{archive.name} has more than {MEMBERS} members; no data set has that many")
        if kind == "folder":
            yield name, None, 0
            continue
        if name in seen:
            raise ArchiveError(f"{archive.name} has {name!r} twice")
        seen.add(name)
        total += size
        if total > allowed:
            raise ArchiveError(
                f"{archive.name} would unpack to more than {total / 1e6:.0f} MB from {archive.stat().st_size / 1e6:.1f} MB at {name!r}; "
                f"{RATIO} times its size is the limit"
            )
        if total > room:
            raise DiskFullError(f"{archive.name} unpacks to more than {total / 1e9:.1f} GB, {room / 1e9:.1f} GB are free; free some space")
        yield name, source, size


def _checked(archive: str, raw: str, kind: str) -> str:
    """The member's name as a path below the folder."""
    if kind not in ("file", "folder"):
        raise ArchiveError(f"{archive} holds a {kind}, {raw!r}; only files and folders are unpacked")
    path = PurePosixPath(raw)
    if path.is_absolute() or re.match(r"[A-Za-z]:", raw):
        raise ArchiveError(f"{archive} holds an absolute path, {raw!r}; nothing of it was unpacked")
    if ".." in path.parts:
        raise ArchiveError(f"{archive} holds a path that leaves its folder, {raw!r}; nothing of it was unpacked")
    if "\\" in raw or any(ord(letter) < 32 for letter in raw) or len(raw) > 1000 or (not path.parts and kind == "file"):
        raise ArchiveError(f"{archive} holds a name that is no plain path, {raw[:80]!r}; nothing of it was unpacked")
    return str(path)


def _write(archive: str, name: str, source: IO[bytes], size: int, path: Path) -> Written:
    """Copy one member, counting: what an archive declares is not what it holds."""
    digest, done = hashlib.sha256(), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("xb")  # never through anything that is there already
    except (FileExistsError, NotADirectoryError):
        raise ArchiveError(f"{archive} has {name!r} as a file and as a folder, or in two spellings") from None
    with file:
        while block := source.read(min(BLOCK, size + 1 - done)):
            done += len(block)
            if done > size:
                raise ArchiveError(f"{archive}: {name!r} goes on after the {size} bytes that it declares")
            digest.update(block)
            file.write(block)
    if done != size:
        raise ArchiveError(f"{archive} is damaged or cut short: {name!r} has {done} of {size} bytes")
    return Written(done, digest.hexdigest())


Member = tuple[str, str, int, IO[bytes] | None]
"""Name, kind (file, folder, or what is refused), declared size, content."""


def _zip(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as packed:
        infos = packed.infolist()
        # the whole list first: a bomb, a link or a path outside at its end is refused before the first file is written
        allowed = max(RATIO * archive.stat().st_size, SMALL)
        declared = sum(info.file_size for info in infos)
        if declared > allowed:
            raise ArchiveError(
                f"{archive.name} would unpack to {declared / 1e6:.0f} MB from {archive.stat().st_size / 1e6:.1f} MB; "
                f"{RATIO} times its size is the limit"
            )
        for info in infos:
            _checked(archive.name, info.orig_filename, _kind(info))
        for info in infos:
            kind = _kind(info)
            if kind == "folder":
                yield info.filename, kind, 0, None
                continue
            with packed.open(info) as source:
                yield info.filename, kind, info.file_size, source


def _kind(info: zipfile.ZipInfo) -> str:
    if info.flag_bits & 1:
        return "member under a password"
    if info.is_dir():
        return "folder"
    kind = stat.S_IFMT(info.external_attr >> 16)  # where it was packed on Unix, else 0
    return {0: "file", stat.S_IFREG: "file", stat.S_IFLNK: "symbolic link"}.get(kind, "device or other special file")


class _Counted:
    """A stream that ends with an error after so many bytes: headers can hold as much as files do."""

    def __init__(self, source: IO[bytes], archive: Path, allowed: int) -> None:
        self.source, self.archive, self.left = source, archive, allowed

    def read(self, size: int) -> bytes:
        block = self.source.read(size)
        self.left -= len(block)
        if self.left < 0:
            raise ArchiveError(
                f"{self.archive.name} would unpack to more than {RATIO} times its {self.archive.stat().st_size / 1e6:.1f} MB, the limit"
            )
        return block


class _Strict(tarfile.TarInfo):
    """A header after which the archive is read on: :mod:`tarfile` takes one that it cannot read, and a missing end mark, for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Strict:
        info = super().frombuf(buf, encoding, errors)
        if info.type not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE) and info.size > HEADER:
            raise ArchiveError(f"a header of {info.size} bytes, {HEADER} are the limit")
        return info

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _Strict:
        try:
            return super().fromtarfile(tarfile)
        except _END:
            raise
        except (_HEADER, ArchiveError) as error:
            raise ArchiveError(f"{Path(str(tarfile.name or '')).name or 'the archive'} is damaged or cut short ({error})") from None


def _tar(archive: Path, allowed: int) -> Iterator[Member]:
    with archive.open("rb") as file:
        packed = file.peek(2)[:2] == b"\x1f\x8b"
        source = _Counted(gzip.GzipFile(fileobj=file) if packed else file, archive, allowed + SMALL)  # type: ignore[arg-type]
        # as a stream, member by member: nothing is read twice, and nothing is believed about what is still to come
        with tarfile.open(archive, fileobj=source, mode="r|", tarinfo=_Strict) as members:  # type: ignore[call-overload]
            for member in members:
                kind = _kind_of(member)
                yield member.name, kind, member.size if kind == "file" else 0, members.extractfile(member) if kind == "file" else None
        while source.read(BLOCK):  # the checksum of gzip stands at its end
            pass


def _kind_of(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"{'symbolic' if member.issym() else 'hard'} link to {member.linkname[:80]!r}"
    if member.issparse():
        return "sparse file"
    if member.isdir():
        return "folder"
    return "file" if member.isreg() else "device or other special file"
