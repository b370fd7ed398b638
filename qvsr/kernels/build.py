"""The CUDA library: ``nvcc`` makes one shared library of ``csrc/*.cu``, once, and keeps it in a cache folder.

``python -m qvsr.kernels.build`` (``make kernels``) builds for all of :data:`ARCHITECTURES`; at the first packed layer on a GPU
:func:`find_or_build` builds for that GPU alone. A library lies in a folder that is named after a digest of the sources, the flags and the
compiler, beside ``report.json``: the command lines, the registers and spills of each kernel, what the library contains. It appears there whole or
not at all, and two processes do not build at the same time.

The same source is built by a C++ compiler for tests without a GPU (:func:`build_emulated`, ``csrc/emulate.h``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "csrc"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
INTERMEDIATE = (100, 120)  # whose PTX is included: a driver translates it for later chips
OWN = (90,)  # whose instructions that no other chip has are used (wgmma): built as sm_90a, which nvcc has from 12.0 on
# -fmad=false: float32 operations as they are written, so that ranges are those of the reference; kernels ask for fmaf where they want it
FLAGS = ("-O3", "-std=c++17", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v")
EMULATED = ("-x", "c++", "-std=c++17", "-O2", "-ffp-contract=off", "-fno-gnu-unique", "-fvisibility=hidden", "-DQVSR_EMULATE", "-fPIC")
NAME = "libqvsr_kernels.so"
LEFT = 3600  # seconds after which a build's folder is swept up if its process is gone: it was killed
SKELETON = 4096  # bytes of machine code up to which an entry has no kernel: the linker adds such

_FATBIN = struct.pack("<IH", 0xBA55ED50, 1)

log = logging.getLogger(__name__)


class BuildError(ValueError):
    """The library cannot be built; the message names the command and the first error, or what is missing."""


@dataclass(frozen=True)
class Kernel:
    """What the assembler says of one kernel for one architecture; a spill is a register that had to go to memory, in bytes."""

    name: str
    architecture: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


@dataclass(frozen=True)
class Built:
    """A library and what is in it: architectures with machine code, architectures with PTX, and the kernels."""

    path: Path
    architectures: tuple[int, ...]
    ptx: tuple[int, ...]
    kernels: tuple[Kernel, ...]
    compiler: str
    seconds: float


# ---------------------------------------------------------------- compilers


def find_nvcc() -> str | None:
    """nvcc: ``$CUDACXX``, ``$CUDA_HOME/bin``, the path, or the toolkit's usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc")
    return next((found for place in places if place and (found := shutil.which(place))), None)


@lru_cache(maxsize=8)
def version_of(nvcc: str) -> str:
    """Release of a compiler, as it says it itself.

    Raises:
        BuildError: it does not run.
    """
    text = run([nvcc, "--version"])
    found = re.search(r"release [\d.]+, (V[\d.]+)", text)
    return found[1] if found else text.strip().splitlines()[-1]


def targets(architectures: Sequence[int], known: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of which architectures to include machine code, and of which PTX, with a compiler that knows `known`.

    A chip that the compiler does not know runs the code of an earlier chip of its generation, or translated PTX: the nearest that there is.

    >>> targets((75, 90, 120), (75, 80, 90, 100, 120))
    ([75, 90, 120], [120])
    >>> targets((103,), (75, 80, 90, 100)), targets((130,), (75, 80, 90, 100)), targets((75, 120), (75, 80, 89, 90))
    (([100], [100]), ([100], [100]), ([75, 90], [90]))
    """
    nearest = {max((one for one in known if one <= wanted), default=min(known)) for wanted in architectures}
    code = sorted(nearest)
    return code, sorted({*(one for one in code if one in INTERMEDIATE), code[-1]})


def run(command: Sequence[str]) -> str:
    """What a compiler says, on both of its outputs.

    Raises:
        BuildError: it does not run or fails; the message has its first error and the command.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{' '.join(command)}: {error.strerror or error}") from error
    if done.returncode:
        raise BuildError(
            f"{first_error(done.stdout + done.stderr) or f'exit code {done.returncode}'}; the command was: {' '.join(command)}"
        )
    return done.stdout + done.stderr


def first_error(text: str) -> str:
    """The first line of a compiler's output that reports an error.

    >>> first_error("a.cu(3): warning #177-D: unused\\na.cu(5): error: expected a \\";\\"\\n1 error detected")
    'a.cu(5): error: expected a ";"'
    """
    lines = [line.strip() for line in text.splitlines() if re.search(r"\b(fatal|error|undefined reference)\b", line, re.IGNORECASE)]
    return lines[0] if lines else next((line.strip() for line in text.splitlines() if line.strip()), "")


# ---------------------------------------------------------------- building


def folder() -> Path:
    """Where libraries are kept: ``$XDG_CACHE_HOME/qvsr/kernels``, by default ``~/.cache/qvsr/kernels``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qvsr" / "kernels"


def digest(nvcc: str, architectures: Sequence[int], sources: Path = SOURCES) -> str:
    """What decides the bytes of a library: sources, flags, compiler and architectures."""
    whole = hashlib.sha256(json.dumps([version_of(nvcc), FLAGS, INTERMEDIATE, sorted(architectures)]).encode())
    for path in sorted(path for path in sources.iterdir() if path.suffix in (".cu", ".cuh", ".h")):
        whole.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def find(architectures: Sequence[int], into: Path | None = None) -> Built | None:
    """A library of these sources that was built for these architectures, or for all; None: there is none."""
    if (nvcc := find_nvcc()) is None:
        return None
    for wanted in (ARCHITECTURES, tuple(architectures)):
        report = (into or folder()) / digest(nvcc, wanted) / "report.json"
        if report.is_file() and set(architectures) <= {*ARCHITECTURES, *wanted}:
            return _read(report)
    return None


def find_or_build(architectures: Sequence[int] = ARCHITECTURES, into: Path | None = None) -> Built:
    """The library of these sources for these architectures (``10 · major + minor``), built if it is not there.

    Raises:
        BuildError: there is no nvcc, or it fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("there is no nvcc; install NVIDIA's CUDA toolkit, or name the compiler in CUDACXX")
    if found := find(architectures, into):
        return found
    from filelock import FileLock  # torch needs it, too

    place = (into or folder()) / digest(nvcc, architectures)
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        if not (place / "report.json").is_file():
            names = ", ".join(f"sm_{one}" for one in architectures)
            log.warning("building the CUDA kernels for %s with nvcc %s, once; they are kept in %s", names, version_of(nvcc), place)
            _sweep(place.parent)
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".building-{os.getpid()}-") as temporary:
                _build(nvcc, architectures, Path(temporary) / "whole")
                shutil.rmtree(place, ignore_errors=True)
                os.replace(Path(temporary) / "whole", place)
    return _read(place / "report.json")


def _sweep(into: Path) -> None:
    """Remove what builds that were killed have left."""
    for left in into.glob(".building-*"):
        process = re.match(r"\.building-(\d+)-", left.name)
        with suppress(FileNotFoundError):  # another process sweeps as well
            if time.time() - left.stat().st_mtime > LEFT and not (process and _runs(int(process[1]))):
                shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _build(nvcc: str, architectures: Sequence[int], into: Path, sources: Path = SOURCES) -> None:
    into.mkdir()
    started = time.monotonic()
    known = sorted(int(name) for name in re.findall(r"sm_(\d+)\b", run([nvcc, "--list-gpu-code"])))
    code, ptx = targets(architectures, known)
    own = [f"{one}a" if one in OWN and not version_of(nvcc).startswith("V11.") else str(one) for one in code]
    options = [f"-gencode=arch=compute_{one},code=sm_{one}" for one in own]
    options += [f"-gencode=arch=compute_{one},code=compute_{one}" for one in ptx]
    commands = []
    for source in sorted(sources.glob("*.cu")):
        commands.append([nvcc, *FLAGS, *options, "-c", str(source), "-o", str(into / f"{source.stem}.o")])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        said = list(pool.map(run, commands))
    objects = [command[-1] for command in commands]
    link = [nvcc, "-shared", *options, *objects, "-o", str(into / NAME)]
    run(link)
    for one in objects:
        Path(one).unlink()
    facts = {
        "compiler": version_of(nvcc),
        "architectures": code,
        "ptx": ptx,
        "seconds": round(time.monotonic() - started, 1),
        "kernels": [asdict(kernel) for kernel in kernels_of("\n".join(said))],
        "commands": [" ".join(command) for command in (*commands, link)],
    }
    (into / "report.json").write_text(json.dumps(facts, indent=1) + "\n")


def _read(report: Path) -> Built:
    facts: dict[str, Any] = json.loads(report.read_text())
    kernels = tuple(Kernel(**one) for one in facts["kernels"])
    return Built(report.parent / NAME, tuple(facts["architectures"]), tuple(facts["ptx"]), kernels, facts["compiler"], facts["seconds"])


# ---------------------------------------------------------------- what was built


_ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)a?'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")


def kernels_of(text: str) -> list[Kernel]:
    """The kernels that ``ptxas -v`` reports on.

    >>> kernels_of('''ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
    ... ptxas info    : Function properties for _Z1fv
    ...     8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
    ... ptxas info    : Used 12 registers, used 1 barriers, 352 bytes cmem[0]''')
    [Kernel(name='_Z1fv', architecture=80, registers=12, stack=8, spill_stores=4, spill_loads=0)]
    """
    found: list[Kernel] = []
    entry, stack = None, (0, 0, 0)
    for line in text.splitlines():
        if start := _ENTRY.search(line):
            entry, stack = start, (0, 0, 0)
        elif bytes_of := _STACK.search(line):
            stack = tuple(int(number) for number in bytes_of.groups())  # type: ignore[assignment]
        elif entry and (used := _USED.search(line)):
            found.append(Kernel(entry["name"], int(entry["architecture"]), int(used[1]), *stack))
            entry = None
    return found


def readable(names: Sequence[str]) -> dict[str, str]:
    """Names of kernels as they are written in the source, where ``c++filt`` is at hand."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    lines = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=False).stdout.splitlines()
    short = [re.sub(r"\(anonymous namespace\)::|<unnamed>::|_GLOBAL__N__\w+::|^void ", "", line).partition("(")[0] for line in lines]
    return dict(zip(names, short, strict=True)) if len(short) == len(names) else {name: name for name in names}


def contents(library: Path) -> tuple[list[int], list[int]]:
    """Architectures of which a library has machine code, and PTX, read from the file itself.

    A fat binary is a header of 16 bytes (magic number, version, its size, size of what follows) and entries: what it is (1: PTX, 2: machine
    code), its header's size at byte 4, its size at byte 8, its architecture at byte 28. ``cuobjdump --list-elf`` finds the same.
    """
    data, found, at = library.read_bytes(), {1: set[int](), 2: set[int]()}, 0
    while (at := data.find(_FATBIN, at)) >= 0:
        header, size = struct.unpack_from("<HQ", data, at + 6)
        entry, end = at + header, at + header + size
        at += len(_FATBIN)
        while header == 16 and entry < end <= len(data):
            kind, head, length, architecture = struct.unpack_from("<H2xIQ12xI", data, entry)
            if kind in found and length > SKELETON:
                found[kind].add(architecture)
            entry += head + length
    return sorted(found[2]), sorted(found[1])


def table(built: Built) -> str:
    """Registers and spills, a line a kernel and a column an architecture: ``126`` or ``255+16`` with 16 bytes of spills."""
    names = readable(sorted({kernel.name for kernel in built.kernels}))
    rows: dict[str, dict[int, str]] = {}
    for kernel in built.kernels:
        spills = kernel.spill_stores + kernel.spill_loads
        rows.setdefault(names[kernel.name], {})[kernel.architecture] = f"{kernel.registers}{f'+{spills}' if spills else ''}"
    columns = sorted({kernel.architecture for kernel in built.kernels})
    lines = [f"| kernel | {' | '.join(f'sm_{one}' for one in columns)} |", f"|---|{'---:|' * len(columns)}"]
    lines += [f"| `{name}` | {' | '.join(row.get(one, '') for one in columns)} |" for name, row in sorted(rows.items())]
    return "\n".join(lines)


# ---------------------------------------------------------------- without a GPU


def build_emulated(into: Path, names: Sequence[str] = (), flags: Sequence[str] = (), sources: Path = SOURCES) -> Path:
    """The kernels as functions of a CPU, for tests: a C++ compiler with ``csrc/emulate.h``.

    Args:
        into: a folder that exists.
        names: source files; none: all.
        flags: more of them, ``-fsanitize=address`` say.
    Returns:
        the shared library.
    Raises:
        BuildError: there is no compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise BuildError("there is no C++ compiler; install g++, or name one in CXX")
    paths = [sources / name for name in names] or sorted(sources.glob("*.cu"))
    commands = [[compiler, *EMULATED, *flags, "-c", str(path), "-o", str(into / f"{path.stem}.o")] for path in paths]
    for command in commands:
        run(command)
    library = into / "libqvsr_emulated.so"
    run([compiler, "-shared", *flags, *(command[-1] for command in commands), "-o", str(library)])
    return library


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qvsr.kernels.build", description="Build the CUDA kernels and say what they take.")
    parser.add_argument("--into", type=Path, help=f"folder of libraries (default: {folder()})")
    parser.add_argument("--architectures", help=f"compute capabilities without the point (default: {','.join(map(str, ARCHITECTURES))})")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        wanted = [int(one) for one in chosen.architectures.split(",")] if chosen.architectures else ARCHITECTURES
        built = find_or_build(wanted, chosen.into)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    code, ptx = (", ".join(map(str, some)) for some in (built.architectures, built.ptx))
    print(f"{built.path}\nmachine code of {code}, PTX of {ptx}; nvcc {built.compiler}, {built.seconds:.0f} s\n\n{table(built)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
