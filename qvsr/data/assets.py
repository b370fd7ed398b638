"""Files from elsewhere, weights and data sets: where they come from, whether they are here, and getting them.

``config/assets.yaml`` lists them. They lie side by side in ``resources/assets``, or in the folder that the variable QVSR_ASSETS names: a
file under its name, an archive unpacked in a folder. Nothing here downloads by itself: :func:`fetch` does, when it is asked to. The variable
QVSR_MIRROR names an address of one's own that has the files under their names; it is tried first, also for those behind a login.

A file is used only when its SHA-256 is the listed one. Where none is known, that of the first file is written into ``assets.lock`` beside
the files, and from then on it is the only one. It lies there and not in the repository because every checkout that shares the folder
must see it, and because a run that edits a file of the repository would mark its own results as those of changed code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field, ValidationError, model_validator

from qvsr.provenance import ROOT, DiskFullError, atomic_path, is_disk_full
from qvsr.registry import suggest
from qvsr.settings import Settings

if TYPE_CHECKING:  # imported where something is fetched: what only uses a file does not become stale with how it got here
    from qvsr.data import download

LIST = ROOT / "config" / "assets.yaml"
LOCK = "assets.lock"
MIRROR = "QVSR_MIRROR"
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
MANIFEST = ".asset.json"
State = Literal["here", "missing", "damaged"]


class AssetError(ValueError):
    """A list that cannot be used, a file that is not what it should be, or a fetch that failed; one line."""


class MissingError(AssetError):
    """What a metric needs and what is not on this machine; the message says where it comes from and which command gets it."""


class ByHandError(AssetError):
    """A file behind a login, or with no address that is known: the message says which, where to look and where to put it."""


class Asset(Settings):
    """One file, or the folder that one archive unpacks to."""

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="its name, by which it is also recognised in another folder")
    urls: tuple[str, ...] = Field((), description="where it can be fetched, tried in order; none: by hand, see page")
    member: str = Field("", description="name of the file inside a zip archive, where an address ends in .zip")
    unpack: str = Field("", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$", description="folder that the file, an archive, is unpacked to")
    only: tuple[str, ...] = Field((), description="patterns of what is unpacked; none: everything")
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{8,64}$", description="its digest, or the first digits; null: unknown, see assets.lock"
    )
    bytes: int | None = Field(None, ge=1, description="its size, where it is known")
    about_bytes: int | None = Field(None, ge=1, description="its size as somebody has rounded it, where the exact one is not known")
    page: str = Field(description="where it is described, and where to look when no address works")
    by_hand: str = Field("", description="what to look for on that page, where it is not plain")
    licence: str = Field(description="SPDX name; LicenseRef-… where there is none")
    citation: str = Field("", description="the publication to cite")
    group: Literal["metrics", "backbone", "datasets"] = Field("metrics", description="what needs it; `assets fetch --group`")
    use: str = Field(description="what it is and what for")

    @model_validator(mode="after")
    def _archives(self) -> Asset:
        if self.unpack and self.member:
            raise ValueError("unpack is for a whole archive and member for one file of it: give one of them")
        if self.only and not self.unpack:
            raise ValueError("only is for an archive: give unpack, the folder, too")
        if self.unpack and not self.file.endswith(ARCHIVES):
            raise ValueError(f"file {self.file} cannot be unpacked: {', '.join(ARCHIVES)} can")
        if any(url.endswith(".zip") for url in self.urls) and not (self.member or self.unpack):
            raise ValueError("a zip archive needs member: the name of the file in it, or unpack: a folder for all of it")
        for url in self.urls:
            if urlsplit(url).scheme not in ("http", "https"):
                raise ValueError(f"{url} is no address of http or https")
        return self

    @property
    def path(self) -> Path:
        """Where it lies, or would: a file, or the folder of an archive."""
        return folder() / (self.unpack or self.file)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it is fetched from, in this order: a mirror of one's own, then what is listed.

        Raises:
            AssetError: a mirror that is no address.
        """
        own = os.environ.get(MIRROR, "")
        if own and urlsplit(own).scheme not in ("http", "https"):
            raise AssetError(f"{MIRROR} is {own!r}, an address of http or https is needed, such as http://server/files")
        return (*([f"{own.rstrip('/')}/{self.file}"] if own else []), *self.urls)

    @property
    def expected(self) -> int | None:
        """Bytes to download, exact or rounded."""
        return self.bytes or self.about_bytes

    @property
    def source(self) -> str:
        """Where it comes from, for messages."""
        return self.urls[0] if self.urls else self.page


@dataclass(frozen=True)
class Imported:
    """What became of one file that an import recognised."""

    name: str
    file: Path
    outcome: Literal["imported", "here already", "damaged"]
    why: str = ""


def folder() -> Path:
    """The folder that holds the files."""
    return Path(os.environ.get("QVSR_ASSETS") or ROOT / "resources" / "assets")


@functools.cache
def read(path: Path = LIST) -> dict[str, Asset]:
    """Every asset by name.

    Raises:
        AssetError: a list that cannot be read; file, key and reason.

    >>> read()["raft-things"].file
    'raft-things.pth'
    """
    try:
        data = yaml.safe_load(path.read_text())
        found = {name: Asset.model_validate(entry) for name, entry in data.items()}
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AssetError(f"{path}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise AssetError(f"{path}: not a list of assets: {' '.join(str(error).split())}") from None
    places = [asset.unpack or asset.file for asset in found.values()]
    for place in places:
        if places.count(place) > 1:
            raise AssetError(f"{path}: {place} is listed {places.count(place)} times, once is needed")
    by_file = {asset.file: asset for asset in found.values()}
    for asset in found.values():  # two folders may come from one archive
        other = by_file[asset.file]
        if (asset.urls, asset.sha256, asset.bytes) != (other.urls, other.sha256, other.bytes):
            raise AssetError(f"{path}: {asset.file} is listed twice, with other addresses, another digest or size")
    return found


def get(name: str) -> tuple[str, Asset]:
    """Name and asset, by its name or that of its file or folder.

    Raises:
        AssetError: neither; with a suggestion.
    """
    known = read()
    for key, asset in known.items():
        if name in (key, asset.unpack or asset.file):
            return key, asset
    raise AssetError(f"{suggest('asset', name, known)}; see config/assets.yaml")


def names(unpacked: bool) -> str:
    """A regular expression of the files, or of the folders that archives are unpacked to, for rules of the workflow."""
    found = [re.escape(asset.path.name) for asset in read().values() if bool(asset.unpack) == unpacked]
    return "|".join(sorted(found)) or "(?!)"  # none matches nothing


# --- what is here -----------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """SHA-256 of a file; read once a process as long as its size and time stay."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault(asset: Asset, path: Path) -> str:
    """Why a file is not the one that is listed (for a folder: its archive); empty if it is. Reads it whole."""
    size = path.stat().st_size
    if asset.bytes is not None and size != asset.bytes:
        return f"it has {size} bytes, {asset.bytes} are expected"
    return _digest_fault(asset, digest(path))


def _digest_fault(asset: Asset, found: str) -> str:
    if asset.sha256 is not None:
        return "" if found.startswith(asset.sha256) else f"its SHA-256 begins with {found[:16]}, expected is {asset.sha256[:16]}"
    first = recorded(asset)
    if first in ("", found):
        return ""
    return f"its SHA-256 begins with {found[:16]}, that of the first one with {first[:16]}, see {shown(folder() / LOCK)}"


def _folder_fault(asset: Asset, path: Path, whole: bool) -> str:
    """Why a folder is not what its archive held; by names and sizes, or reading every file."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files: dict[str, list[Any]] = manifest["files"]
        archive, only = str(manifest["sha256"]), tuple(manifest["only"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no {MANIFEST} that can be read: it was not unpacked here"
    if only != asset.only:
        return f"of the archive were unpacked {', '.join(only) or 'all files'}; listed are {', '.join(asset.only) or 'all files'}"
    reason = _digest_fault(asset, archive)
    if reason:
        return f"of its archive: {reason}"
    for name, (size, sha256) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} are expected"
        if whole and digest(file) != sha256:
            return f"the SHA-256 of {name} begins with {digest(file)[:16]}, expected is {sha256[:16]}"
    return ""


def check(asset: Asset, whole: bool = True) -> str:
    """Why what lies at an asset's place is not the asset; empty if it is.

    Args:
        whole: read it; otherwise by names and sizes.
    """
    path = asset.path
    if path.is_dir() != bool(asset.unpack):
        return f"it is {'a folder' if path.is_dir() else 'a file'}, {'a folder' if asset.unpack else 'a file'} is expected"
    if asset.unpack:
        return _folder_fault(asset, path, whole)
    if whole:
        return fault(asset, path)
    return "" if asset.bytes in (None, path.stat().st_size) else f"it has {path.stat().st_size} bytes, {asset.bytes} are expected"


def state(asset: Asset) -> State:
    """Whether it is here and what it should be; reads it whole."""
    if not asset.path.exists():
        return "missing"
    return "damaged" if check(asset) else "here"


def glance(asset: Asset) -> State:
    """As :func:`state`, by names and sizes alone."""
    if not asset.path.exists():
        return "missing"
    return "damaged" if check(asset, whole=False) else "here"


def recorded(asset: Asset) -> str:
    """The digest that assets.lock has of the first file of this name; empty: there was none.

    Raises:
        AssetError: an assets.lock that cannot be read.
    """
    return _recorded().get(asset.file, "")


def _recorded() -> dict[str, str]:
    path = folder() / LOCK
    try:
        return {str(file): str(value) for file, value in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise AssetError(
            f"{shown(path)} cannot be read ({' '.join(str(error).split())}): restore it, or delete it to record anew"
        ) from None


def record(asset: Asset) -> None:
    """Write the digest of a file that is here into assets.lock, if none is listed and none was recorded.

    Raises:
        AssetError: the folder is somebody else's.
    """
    if asset.sha256 is not None or recorded(asset):
        return
    from qvsr.data import download

    place = folder() / LOCK
    try:
        with download.lock(place.with_name(f".{LOCK}.lock"), LOCK), atomic_path(place) as partial:
            partial.write_text(json.dumps({asset.file: _own_digest(asset)} | _recorded(), indent=1, sort_keys=True) + "\n")
    except PermissionError as error:
        raise AssetError(
            f"{shown(place)} cannot be written ({error.strerror}), and it must have the digest of {asset.file}, of which none is listed: "
            "let the owner of the folder run `python -m qvsr assets verify`"
        ) from None


def _own_digest(asset: Asset) -> str:
    """SHA-256 of the file that is here; of a folder, that of the archive it came from."""
    if asset.unpack:
        return str(json.loads((asset.path / MANIFEST).read_text())["sha256"])
    return digest(asset.path)


def find(name: str, digits: str = "") -> Path:
    """The file of an asset, its content checked; or its folder, names and sizes checked (`assets verify` reads what is in it).

    Where no digest is known, that of the file is recorded by the first call.

    Args:
        name: of config/assets.yaml.
        digits: first digits of the SHA-256 that a protocol asks for.
    Raises:
        MissingError: it is not here; says where it comes from and how to get it.
        AssetError: no such asset, another content than listed or than `digits`.
    """
    name, asset = get(name)
    if not asset.path.exists():
        raise MissingError(
            f"{asset.path.name} is not in {shown(folder())}: it comes from {asset.source}; get it with `python -m qvsr assets fetch {name}`, "
            "or on a machine without network with `python -m qvsr assets import --from DIR`"
        )
    reason = check(asset, whole=not asset.unpack)
    if reason:
        raise AssetError(f"{shown(asset.path)} is damaged ({reason}): delete it and run `python -m qvsr assets fetch {name}`")
    record(asset)
    found = _own_digest(asset)
    if not found.startswith(digits):
        raise AssetError(f"{name}: the protocol is for a file whose SHA-256 begins with {digits}, {shown(asset.path)} has {found[:16]}")
    return asset.path


def paths(names: Iterable[str] | Mapping[str, str]) -> dict[str, Path]:
    """The files of several assets, as a metric gets them.

    Args:
        names: of config/assets.yaml; or a protocol's mapping of names to first digits of the SHA-256, which are checked too.
    Raises:
        MissingError: one or more are not here; names all of them.
        AssetError: a damaged one, or another than the protocol's.
    """
    digits = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, "")
    found, missing = {}, []
    for name, first in digits.items():
        try:
            found[name] = find(name, first)
        except MissingError as error:
            missing.append(str(error))
    if missing:
        raise MissingError("; ".join(missing))
    return found


def shown(path: Path) -> str:
    """A path as messages show it: relative to the checkout where it lies in it, so that rows do not depend on where that is."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


# --- getting them -----------------------------------------------------------------------------------------------------


def fetch(name: str, progress: bool = True) -> Path:
    """Download an asset unless it is here; it appears whole and checked, or not at all. A damaged one is replaced.

    What has arrived when a connection breaks, or when the process is killed, is kept, and the next call asks for the rest. A second
    process that wants the same file waits for the first.

    Args:
        progress: draw a bar on standard error.
    Returns:
        The file, or the folder that the archive is unpacked to.
    Raises:
        ByHandError: no address is known from which a program can get it.
        AssetError: no such asset, or no address gives the right file; every reason is named.
        DiskFullError: no room; what has arrived stays.
    """
    name, asset = get(name)
    if state(asset) != "here":
        if not (asset.addresses or (asset.unpack and (folder() / asset.file).is_file())):
            raise ByHandError(f"{name}: {asset.file} has no address to fetch it from: {_by_hand(name, asset)}")
        with _alone(asset) as work:
            if state(asset) != "here":  # else another process has got it
                _get(name, asset, work, progress)
                shutil.rmtree(work, ignore_errors=True)
    record(asset)
    return asset.path


@contextlib.contextmanager
def _alone(asset: Asset) -> Iterator[Path]:
    """A folder for what arrives of an asset, this process's alone as long as the block runs; it stays when it holds something."""
    from qvsr.data import download

    base = folder() / f".fetch-{asset.path.name}"
    with download.lock(base.with_name(f"{base.name}.lock"), asset.path.name) as locked:
        work = base if locked else base.with_name(f"{base.name}-{os.getpid()}")
        work.mkdir(parents=True, exist_ok=True)
        try:
            yield work
        finally:
            kept = [file for file in (*work.glob("part-*"), *work.glob("whole/*")) if file.suffix != ".json" and file.stat().st_size]
            if not (kept and locked):
                shutil.rmtree(work, ignore_errors=True)


def _get(name: str, asset: Asset, work: Path, progress: bool) -> None:
    from qvsr.data import archives, download

    brought = folder() / asset.file
    if asset.unpack and brought.is_file():  # put there by hand
        try:
            with atomic_path(asset.path) as partial:
                _place(asset, brought, partial)
        except (AssetError, archives.ArchiveError) as error:
            raise AssetError(f"{name}: {shown(brought)} is not what is expected ({error}): delete it, then get it again") from None
        return
    reasons = []
    for url in asset.addresses:
        for last in (False, True):
            downloader = download.Resuming(work, None if asset.member else asset.bytes, checked=asset.sha256 is not None, progress=progress)
            try:
                with atomic_path(asset.path) as partial:
                    _download(asset, url, work, partial, downloader)
                return
            except DiskFullError:
                raise  # the next address has not more room
            except (OSError, ValueError) as error:
                if downloader.resumed and not last and not isinstance(error, download.DownloadError):
                    continue  # the pieces may be of two files: once more from the start
                reasons.append(f"{url}: {' '.join(str(error).split())[:300]}")
                break
    raise AssetError(f"{name}: {asset.file} could not be fetched: {'; '.join(reasons)}; {_by_hand(name, asset)}")


def _by_hand(name: str, asset: Asset) -> str:
    look = f"{asset.page}{f' ({asset.by_hand})' if asset.by_hand else ''}"
    return (
        f"get it by hand, see {look}, put it into {shown(folder())} as {asset.file} and run `python -m qvsr assets fetch {name}`, "
        "or leave it in any folder and run `python -m qvsr assets import --from DIR`"
    )


def _download(asset: Asset, url: str, work: Path, target: Path, downloader: download.Resuming) -> None:
    import pooch

    from qvsr.data import archives

    pooch.get_logger().setLevel("WARNING")
    file = Path(urlsplit(url).path).name or asset.file

    def place(got: str, action: str, keeper: Any) -> str:
        """pooch's processor: what arrived becomes what is listed."""
        try:
            if asset.member and archives.is_archive(file):
                archives.take(Path(got), asset.member, target)
                _refuse(asset, target)
            else:
                _place(asset, Path(got), target)
        except Exception as error:
            if not (is_disk_full(error) or isinstance(error, DiskFullError)):  # there may be room for what is in it next time
                Path(got).unlink(missing_ok=True)
            raise
        Path(got).unlink(missing_ok=True)
        return str(target)

    whole = work / "whole" / (asset.file if asset.unpack else file)
    downloader.resumed = whole.exists()  # of a process that was killed while it unpacked: pooch takes it as it is
    # no digest for pooch: it knows no first digits, and the listed one may be that of a member
    pooch.retrieve(url, known_hash=None, fname=whole.name, path=whole.parent, downloader=downloader, processor=place)


def _refuse(asset: Asset, file: Path) -> None:
    reason = fault(asset, file)
    if reason:
        raise AssetError(reason)


def _place(asset: Asset, file: Path, target: Path) -> None:
    """Check a file that has arrived and make of it, under another name, what is listed: it moves; an archive is unpacked."""
    from qvsr.data import archives

    _refuse(asset, file)
    if not asset.unpack:
        file.replace(target)
        return
    found = digest(file)
    written = archives.unpack(file, target, asset.only)
    files = {name: [one.size, one.sha256] for name, one in sorted(written.items())}
    content = {"archive": asset.file, "sha256": found, "only": asset.only, "files": files}
    (target / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def import_from(source: Path) -> list[Imported]:
    """Copy every listed file that lies in or below a folder, recognised by its name, if its content is right.

    Raises:
        AssetError: no such folder, or none of the files in it.
    """
    if not source.is_dir():
        raise AssetError(f"no folder {source}")
    by_name: dict[str, list[str]] = {}
    for name, asset in read().items():
        by_name.setdefault(asset.file, []).append(name)
    found = sorted(one for one in source.rglob("*") if one.name in by_name and one.is_file())
    if not found:
        raise AssetError(f"{source}: none of the files that are looked for is in or below it: {', '.join(sorted(by_name))}")
    done: dict[str, Imported] = {}
    for file in found:
        for name in by_name[file.name]:
            if done.get(name, Imported(name, file, "damaged")).outcome == "damaged":  # else a second copy of one that is fine
                done[name] = _import(name, read()[name], file)
    return list(done.values())


def _import(name: str, asset: Asset, file: Path) -> Imported:
    from qvsr.data import archives

    if state(asset) == "here":
        record(asset)
        return Imported(name, file, "here already")
    reason = fault(asset, file)
    if not reason:
        try:
            with atomic_path(asset.path) as partial:
                if asset.unpack:
                    _place(asset, file, partial)
                else:
                    shutil.copyfile(file, partial)
            record(asset)
        except archives.ArchiveError as error:
            reason = str(error)
    return Imported(name, file, "damaged" if reason else "imported", reason)


def size(count: int | None) -> str:
    """A number of bytes for people.

    >>> size(244408911), size(6_680_000_000), size(None)
    ('244 MB', '6.68 GB', '')
    """
    if count is None:
        return ""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else re.sub(r"^0 MB$", "<1 MB", f"{count / 1e6:.0f} MB")
