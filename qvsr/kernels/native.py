"""The loops of ``csrc/cpu.c``: compiled for this machine at their first use, called through ctypes.

They need a C compiler (`cc`, or what the variable CC names). Without one, or where the library does not load, :func:`library` is None,
:func:`missing` says why in one line, and plain PyTorch does the same: the same bytes but for rotated inputs, which it rounds otherwise in
the last digit. The library is kept in the user's cache, under a name made of the source, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SOURCE = Path(__file__).parent / "csrc" / "cpu.c"
# -ffp-contract=off: a product and a sum are rounded one after the other, as PyTorch's own operators round them
FLAGS = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-fPIC", "-fopenmp"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
LANES, LARGEST_FACTOR = 16, 64  # as in csrc/cpu.c
LARGE, PAGE, HUGE_PAGES = 2**22, 4096, 14  # bytes from which on large pages pay; MADV_HUGEPAGE of Linux

log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """The library cannot be built or loaded; the message says why in one line."""


class _Part(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("frames", "positions", "channels", "start", "n")),
        *((name, ctypes.c_int32) for name in ("channels_first", "signs_first")),
        *((name, ctypes.c_void_p) for name in ("signs", "factors", "sizes")),
        ("count", ctypes.c_int32),
    )


class _Sums(ctypes.Structure):
    _fields_ = (
        ("sums", ctypes.c_void_p),
        ("ld", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("step", "scale", "zero", "total", "rest", "inputs")),
        *((name, ctypes.c_int32) for name in ("whole", "by_row")),
    )


_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "qvsr_range": [ctypes.POINTER(_Part), _I, _P, _P, _I],
    "qvsr_quantize": [ctypes.POINTER(_Part), _P, _P, _I, _I, _P, _I],
    "qvsr_finish": [_P, _L, _I, _P, ctypes.POINTER(_Sums), _I, _L, _L, _I],
    "qvsr_unpack": [_P, _L, _I, _L, _L, _P, _P, _L, _I],
}


def library() -> ctypes.CDLL | None:
    """The library; None where there is none, and then the reason was logged, once."""
    return _library()[0]


def missing() -> str | None:
    """Why there is no library, in one line; None where there is one."""
    return _library()[1]


@functools.lru_cache(maxsize=1)
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return load(build()), None
    except BuildError as error:
        log.warning("activations are rounded by plain PyTorch, several times as slow: %s", error)
        return None, str(error)


def build(folder: Path | None = None) -> Path:
    """Compile the library if it is not there yet.

    Args:
        folder: where it is kept; None: ``qvsr`` in the user's cache (XDG_CACHE_HOME), or in the system's temporary folder.
    Raises:
        BuildError: no compiler, an error of it, or no folder that can be written.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        raise BuildError(f"there is no C compiler {os.environ.get('CC') or 'cc'!r}; install gcc, or name one in the variable CC")
    key = hashlib.sha256(SOURCE.read_bytes())
    for fact in (*FLAGS, compiler, _run([compiler, "--version"]), _processor()):
        key.update(fact.encode() + b"\0")
    name = f"cpu-{key.hexdigest()[:16]}.so"
    reasons = []
    for place in [folder] if folder is not None else _places():
        if (place / name).is_file():
            return place / name
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place) as scratch:
                # linked without -fopenmp: its functions are those of the library that torch has loaded, and so are its threads
                _run([compiler, *FLAGS, "-c", str(SOURCE), "-o", f"{scratch}/cpu.o"])
                _run([compiler, "-shared", f"{scratch}/cpu.o", "-lm", "-o", f"{scratch}/cpu.so"])
                os.replace(f"{scratch}/cpu.so", place / name)
            return place / name
        except OSError as error:
            reasons.append(f"{place} ({error.strerror})")
    raise BuildError(f"no folder can be written: {', '.join(reasons)}")


def load(path: Path) -> ctypes.CDLL:
    """A built library, its argument types declared."""
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path.name} does not load: {error}") from None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, ctypes.c_int if name in ("qvsr_range", "qvsr_quantize") else None
    return found


def _places() -> list[Path]:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return [Path(home) / "qvsr", Path(tempfile.gettempdir()) / f"qvsr-{user}"]


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        raise BuildError(f"{' '.join(command[:2])} … failed: {lines[0]}")
    return done.stdout


def _processor() -> str:
    """What code compiled for this processor may depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


# ---------------------------------------------------------------- calls


def quantizes(rotation: Sequence[Tensor], signs: Tensor | None) -> bool:
    """Whether :class:`Activation` can do such a rotation: none, or small factors with signs."""
    return not rotation or (signs is not None and max(len(factor) for factor in rotation) <= LARGEST_FACTOR)


class Activation:
    """One part of an input, contiguous float32, as ``csrc/cpu.c`` takes it; arguments as of ``qvsr::quantize_activation``."""

    def __init__(
        self,
        x: Tensor,
        start: int,
        stop: int,
        channels_first: bool,
        left: bool,
        rotation: Sequence[Tensor],
        signs: Tensor | None,
        granularity: str,
    ) -> None:
        self.shape = (x.shape[0], *x.shape[2:], stop - start) if channels_first else (*x.shape[:-1], stop - start)
        self.granularity = granularity
        rows = math.prod(self.shape[:-1])
        frames = x.shape[0] if channels_first or granularity == "frame" else 1
        rows //= frames
        self.runs = -(-rows // LANES)
        self._kept = [x]
        part = self.part = _Part(x.data_ptr(), frames, rows, x.shape[1 if channels_first else -1], start, stop - start, channels_first)
        if rotation:
            assert signs is not None
            factors, sizes, scaled = _prepared(tuple(rotation), left), [len(factor) for factor in rotation], signs * (stop - start) ** -0.5
            self._kept += [factors, scaled]
            self._sizes = (ctypes.c_int32 * len(sizes))(*sizes)
            part.signs_first, part.signs, part.factors, part.count = not left, scaled.data_ptr(), factors.data_ptr(), len(sizes)
            part.sizes = ctypes.cast(self._sizes, ctypes.c_void_p)

    def range(self) -> tuple[Tensor, Tensor]:
        """Minimum and maximum: ``()``, ``(B,)`` or one a token."""
        by_token, x = self.granularity == "token", self._kept[0]
        low, high = x.new_empty(2, self.part.frames, self.part.positions if by_token else self.runs).unbind()
        _call("qvsr_range", self.part, by_token, low.data_ptr(), high.data_ptr(), torch.get_num_threads())
        if by_token:
            return low.view(self.shape[:-1]), high.view(self.shape[:-1])
        return (low.amin(1), high.amax(1)) if self.granularity == "frame" else (low.amin(), high.amax())

    def integers(self, scale: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, bool]:
        """uint8, channels last, and whether there was NaN; scale and zero point contiguous, shaped as :meth:`range` returns."""
        q = torch.empty(self.shape, dtype=torch.uint8)
        stride = {"tensor": 0, "frame": 1, "token": 2}[self.granularity] if scale.dim() else 0
        pointers = scale.data_ptr(), zero_point.data_ptr(), stride, 2**bits - 1, q.data_ptr()
        return q, bool(_call("qvsr_quantize", self.part, *pointers, torch.get_num_threads()) & 2)


def finish(out: Tensor, add: bool, bias: Tensor | None, parts: Sequence[Sums]) -> None:
    """``qvsr_finish`` of ``csrc/cpu.c``; see :func:`qvsr.kernels.finish.finish`."""
    found = (_Sums * len(parts))()
    for there, part in zip(found, parts, strict=True):
        pointers = (None if values is None else values.data_ptr() for values in part[1:])
        there.__init__(part.sums.data_ptr(), part.sums.stride(0), *pointers, part.sums.dtype == torch.int32, part.scale.dim() > 0)
    start = None if bias is None else bias.data_ptr()
    _call("qvsr_finish", out.data_ptr(), out.stride(0), add, start, found, len(parts), *out.shape, torch.get_num_threads())


class Sums(NamedTuple):
    """One part's sums of a layer and what scales them.

    Attributes:
        sums: whole numbers ``(M, N)``, rows contiguous: float32, or int32 from which ``zero_point * total`` is taken first.
        step: scales of the weight ``(N,)``; scale: of the inputs, ``()`` or ``(M,)``; zero_point: int32, shaped alike; total: int32 ``(N,)``.
        rest, inputs: ``(N,)`` int32 and ``(M,)`` float32, whose product belongs to the sums; both or neither.
    """

    sums: Tensor
    step: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    total: Tensor | None = None
    rest: Tensor | None = None
    inputs: Tensor | None = None


def empty(*shape: int) -> Tensor:
    """An uninitialised float32 tensor; on Linux a large one gets large pages, which come several times as fast as small ones."""
    y = torch.empty(shape)
    size, advise = y.numel() * 4, _advise()
    if size >= LARGE and advise is not None:
        start = -(-y.data_ptr() // PAGE) * PAGE
        advise(start, (y.data_ptr() + size - start) // PAGE * PAGE, HUGE_PAGES)
    return y


@functools.lru_cache(maxsize=1)
def _advise() -> ctypes._NamedFuncPointer | None:
    """Linux's madvise."""
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [_P, ctypes.c_size_t, _I]
    return function


def unpack(packed: Tensor, bits: int, start: int, count: int, centre: Tensor) -> Tensor:
    """Values start to start + count of each row of a packed weight, less the row's centre: int8 ``(N, count)``.

    Args:
        packed: uint8 ``(N, row_bytes)`` of :func:`qvsr.kernels.packing.pack_rows`, contiguous; bits: 2 to 8.
        centre: int8 ``(N,)``, contiguous; differences wrap around.
    """
    out = torch.empty(len(packed), count, dtype=torch.int8)
    pointers = packed.data_ptr(), packed.shape[1], bits, start, count, centre.data_ptr(), out.data_ptr()
    _call("qvsr_unpack", *pointers, len(packed), torch.get_num_threads())
    return out


@functools.lru_cache(maxsize=128)
def _prepared(rotation: tuple[Tensor, ...], left: bool) -> Tensor:
    """The factors one after another; transposed where rows are multiplied from the right."""
    return torch.cat([(factor if left else factor.T).flatten() for factor in rotation]).float()


def _call(name: str, *arguments: object) -> int:
    found = library()
    assert found is not None
    code: int | None = getattr(found, name)(*arguments)
    if code and code & 1:
        raise MemoryError("quantize_activation: no memory for a tile of 16 positions")
    return code or 0
