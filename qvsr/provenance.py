"""Where a result comes from, and how it gets to disk whole or not at all.

Nothing here reads a clock: two runs of one commit on one machine write the same bytes.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import qvsr

ROOT = Path(__file__).resolve().parent.parent
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MARK = ".partial-"


class DiskFullError(OSError):
    """A file that could not be written whole because there is no room for it."""


class CodeDigestError(ValueError):
    """A pattern of source files that matches none."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`: renamed to it when the block ends, removed when the block raises.

    The block creates either a file or a directory under the name that it gets (its extension is that of `path`). An existing
    `path` is replaced only after the block has ended. What an earlier process left when it was killed is removed first.

    Args:
        path: the file or directory to appear; its folder is created.
    Raises:
        DiskFullError: the disk is full (or a quota or a limit on file sizes is reached); one line that names the path.
        FileNotFoundError: the block ended without creating anything.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with atomic_path(folder / "a.txt") as partial:
    ...     _ = partial.write_text("whole")
    >>> [file.name for file in folder.iterdir()]
    ['a.txt']
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in _leftovers(path):
            _remove(leftover)
        # the extension stays last, because writers (matplotlib, OpenCV, pandas) choose the format by it
        partial = path.with_name(f"{_MARK}{os.getpid()}-{path.name}")
        _remove(partial)
        try:
            yield partial
            if not partial.exists():
                raise FileNotFoundError(f"nothing was written for {path}")
            _share(partial)
            _replace(partial, path)
        except BaseException:
            _remove(partial)
            raise
    except DiskFullError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise DiskFullError(
                f"{path}: the disk is full ({_room(path)}); free some space or change output, then run the same command"
            ) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception means that there is no room; libraries written in Rust or C tell it only in words.

    >>> is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    True
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return "No space left on device" in str(error) or any(f"(os error {number})" in str(error) for number in _FULL)


def _room(path: Path) -> str:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB free in {folder}"


def _leftovers(path: Path) -> list[Path]:
    """Partial outputs of `path` whose process is gone."""
    found = []
    for one in path.parent.iterdir():
        if one.name.startswith(_MARK) and one.name.endswith(f"-{path.name}"):
            pid, _, name = one.name.removeprefix(_MARK).partition("-")
            if name in (path.name, f"old-{path.name}") and pid.isdigit() and not _runs(int(pid)):
                found.append(one)
    return found


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as somebody else
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _share(partial: Path) -> None:
    """Permissions as for any new file: safetensors makes its files unreadable for everybody else."""
    mask = os.umask(0)
    os.umask(mask)
    for file in [partial, *partial.rglob("*")]:
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _replace(partial: Path, path: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        os.replace(partial, path)
        return
    # a directory cannot be renamed over one that holds files: the old one steps aside for an instant
    old = path.with_name(f"{_MARK}{os.getpid()}-old-{path.name}")
    _remove(old)
    os.replace(path, old)
    os.replace(partial, path)
    _remove(old)


def code_digest(*patterns: str, root: Path = ROOT) -> str:
    """Digest of the source files that a stage uses, so that an edit of one of them makes its outputs stale.

    Args:
        patterns: glob patterns relative to `root`, such as ``qvsr/quant/**/*.py``; one with a ``!`` in front leaves files out.
    Returns:
        16 hexadecimal digits over the paths and contents, in order of path.
    Raises:
        CodeDigestError: a pattern matches no file: the stage would never become stale by it.

    >>> code_digest("qvsr/config.py") == code_digest("qvsr/conf*.py")
    True
    """
    files: set[Path] = set()
    for pattern in patterns:
        matched = {file for file in root.glob(pattern.removeprefix("!")) if file.is_file() and "__pycache__" not in file.parts}
        if not matched:
            raise CodeDigestError(f"code_digest: {pattern!r} matches no file below {root}; correct the pattern in workflow/rules")
        files = files - matched if pattern.startswith("!") else files | matched
    return file_digest(*sorted(files), root=root)


def file_digest(*files: Path, root: Path = ROOT) -> str:
    """16 hexadecimal digits of SHA-256 over the names (relative to `root` where they lie below it) and contents of files."""
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(root) if file.is_relative_to(root) else Path(file.name)
        digest.update(f"{name.as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def git_hash(root: Path = ROOT) -> str:
    """Commit of the working tree, with ``+changes`` when tracked files differ from it; ``unknown`` outside git."""
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if dirty else "")


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True).stdout.strip()


@functools.cache
def versions(*packages: str) -> dict[str, str]:
    """Installed versions by package name, read without importing the packages."""
    found = {"python": platform.python_version()}
    for package in packages or ("torch", "numpy", "pyiqa", "opencv-python-headless"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@functools.cache
def device() -> str:
    """Name of the processor that this process computes on."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def head() -> dict[str, object]:
    """What stands at the head of every result: versions, commit, machine. The same for two runs of one commit."""
    return {"qvsr": qvsr.__version__, "git": git_hash(), "versions": versions(), "device": device()}
