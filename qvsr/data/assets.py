"""Weights that metrics read: where they come from, whether they are here, and getting them.

``config/assets.yaml`` lists them. The files lie side by side in ``resources/assets``, or in the folder that the variable QVSR_ASSETS names.
Nothing here downloads by itself: :func:`fetch` does, when it is asked to. A file is used only when its SHA-256 is the listed one.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from qvsr.provenance import ROOT, atomic_path
from qvsr.registry import suggest
from qvsr.settings import Settings

LIST = ROOT / "config" / "assets.yaml"
State = Literal["here", "missing", "damaged"]


class AssetError(ValueError):
    """A list that cannot be used, a file that is not what it should be, or a fetch that failed; one line."""


class MissingError(AssetError):
    """What a metric needs and what is not on this machine; the message says where it comes from and which command gets it."""


class Asset(Settings):
    """One file of weights."""

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="its name, by which it is also recognised in another folder")
    urls: tuple[str, ...] = Field((), description="where it can be fetched, tried in order; none: by hand, see page")
    member: str = Field("", description="name of the file inside a zip archive, where an address ends in .zip")
    sha256: str = Field(pattern=r"^[0-9a-f]{8,64}$", description="its digest, or the first digits of it")
    bytes: int | None = Field(None, ge=1, description="its size, where it is known")
    page: str = Field(description="where it is described, and where to look when no address works")
    licence: str = Field(description="SPDX name; LicenseRef-… where there is none")
    use: str = Field(description="what it is and what for")

    @model_validator(mode="after")
    def _member_of_archives(self) -> Asset:
        if any(url.endswith(".zip") for url in self.urls) and not self.member:
            raise ValueError("a zip archive needs member: the name of the file in it")
        return self

    @property
    def path(self) -> Path:
        """Where it lies, or would."""
        return folder() / self.file

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
    files = [asset.file for asset in found.values()]
    for file in files:
        if files.count(file) > 1:
            raise AssetError(f"{path}: {file} is listed {files.count(file)} times, once is needed")
    return found


def get(name: str) -> tuple[str, Asset]:
    """Name and asset, by its name or that of its file.

    Raises:
        AssetError: neither; with a suggestion.
    """
    known = read()
    for key, asset in known.items():
        if name in (key, asset.file):
            return key, asset
    raise AssetError(f"{suggest('asset', name, known)}; see config/assets.yaml")


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
    """Why a file is not this asset; empty if it is."""
    size = path.stat().st_size
    if asset.bytes is not None and size != asset.bytes:
        return f"it has {size} bytes, {asset.bytes} are expected"
    found = digest(path)
    return "" if found.startswith(asset.sha256) else f"its SHA-256 begins with {found[:16]}, expected is {asset.sha256[:16]}"


def state(asset: Asset) -> State:
    """Whether a file is here and what it should be; reads it whole."""
    if not asset.path.is_file():
        return "missing"
    return "damaged" if fault(asset, asset.path) else "here"


def glance(asset: Asset) -> State:
    """As :func:`state`, by size alone."""
    if not asset.path.is_file():
        return "missing"
    return "here" if asset.bytes in (None, asset.path.stat().st_size) else "damaged"


def find(name: str, digits: str = "") -> Path:
    """The file of an asset, its content checked.

    Args:
        name: of config/assets.yaml.
        digits: first digits of the SHA-256 that a protocol asks for.
    Raises:
        MissingError: it is not here; says where it comes from and how to get it.
        AssetError: no such asset, another content than listed or than `digits`.
    """
    name, asset = get(name)
    if not asset.path.is_file():
        raise MissingError(
            f"{asset.file} is not in {shown(folder())}: it comes from {asset.source}; get it with `python -m qvsr assets fetch {name}`, "
            "or on a machine without network with `python -m qvsr assets import --from DIR`"
        )
    reason = fault(asset, asset.path)
    if reason:
        raise AssetError(f"{shown(asset.path)} is damaged ({reason}): delete it and run `python -m qvsr assets fetch {name}`")
    found = digest(asset.path)
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
    """Download an asset unless it is here; it appears whole and checked, or not at all. A damaged file is replaced.

    Args:
        progress: draw a bar on standard error.
    Raises:
        AssetError: no such asset, no address, or none that gives the right file; every reason is named.
    """
    name, asset = get(name)
    if state(asset) == "here":
        return asset.path
    by_hand = f"get it by hand, see {asset.page}, and run `python -m qvsr assets import --from DIR`"
    if not asset.urls:
        raise AssetError(f"{name}: {asset.file} has no address to fetch it from: {by_hand}")
    reasons = []
    for url in asset.urls:
        try:
            with atomic_path(asset.path) as partial:
                _download(asset, url, partial, progress)
                reason = fault(asset, partial)
                if reason:
                    raise AssetError(reason)
            return asset.path
        except (OSError, ValueError, zipfile.BadZipFile) as error:  # those of requests are OSErrors
            reasons.append(f"{url}: {' '.join(str(error).split())[:200]}")
    raise AssetError(f"{name}: {asset.file} could not be fetched: {'; '.join(reasons)}; {by_hand}")


def _download(asset: Asset, url: str, target: Path, progress: bool) -> None:
    import pooch

    pooch.get_logger().setLevel("WARNING")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        archive = url.endswith(".zip")
        downloader = pooch.HTTPDownloader(progressbar=progress, timeout=60)
        got = Path(pooch.retrieve(url, known_hash=None, fname=PurePosixPath(url).name, path=scratch, downloader=downloader))
        if not archive:
            got.replace(target)
            return
        with zipfile.ZipFile(got) as packed:
            members = [one for one in packed.namelist() if PurePosixPath(one).name == asset.member]
            if not members:
                raise AssetError(f"the archive has no {asset.member}")
            with packed.open(members[0]) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)


def import_from(source: Path) -> list[Imported]:
    """Copy every listed file that lies in or below a folder, recognised by its name, if its content is right.

    Raises:
        AssetError: no such folder, or none of the files in it.
    """
    if not source.is_dir():
        raise AssetError(f"no folder {source}")
    by_name = {asset.file: (name, asset) for name, asset in read().items()}
    found = sorted(one for one in source.rglob("*") if one.name in by_name and one.is_file())
    if not found:
        raise AssetError(f"{source}: none of the files that are looked for is in or below it: {', '.join(sorted(by_name))}")
    done: dict[str, Imported] = {}
    for file in found:
        name, asset = by_name[file.name]
        if done.get(name, Imported(name, file, "damaged")).outcome != "damaged":
            continue  # a second copy of one that is fine
        if state(asset) == "here":
            done[name] = Imported(name, file, "here already")
            continue
        reason = fault(asset, file)
        if not reason:
            with atomic_path(asset.path) as partial:
                shutil.copyfile(file, partial)
        done[name] = Imported(name, file, "damaged" if reason else "imported", reason)
    return list(done.values())


def size(count: int | None) -> str:
    """A number of bytes for people.

    >>> size(244408911), size(None)
    ('244 MB', '')
    """
    return "" if count is None else re.sub(r"^0 MB$", "<1 MB", f"{count / 1e6:.0f} MB")
