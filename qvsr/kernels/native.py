"""The loops of ``csrc/cpu``: compiled for this machine at their first use, called through ctypes.

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
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qvsr.kernels.build import BuildError, folder, run

SOURCES = Path(__file__).parent / "csrc" / "cpu"
# -ffp-contract=off: a product and a sum are rounded one after the other, as PyTorch's own operators round them
FLAGS = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-fPIC", "-fopenmp"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
NAN = "quantize_activation: x has NaN, which no integer stands for"
STRIDES = {"tensor": 0, "frame": 1, "token": 2}
LANES, LARGEST_FACTOR = 16, 64  # as in csrc/cpu
LARGE, PAGE, HUGE_PAGES = 2**22, 4096, 14  # bytes from which on large pages pay; MADV_HUGEPAGE of Linux

log = logging.getLogger(__name__)


class _Part(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("frames", "positions", "channels", "start", "n")),
        *((name, ctypes.c_int32) for name in ("channels_first", "signs_first")),
        *((name, ctypes.c_void_p) for name in ("signs", "factors", "sizes")),
        *((name, ctypes.c_int32) for name in ("count", "half")),
    )


class _Sums(ctypes.Structure):
    _fields_ = (
        ("sums", ctypes.c_void_p),
        ("ld", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("step", "scale", "zero", "total", "rest", "inputs")),
        *((name, ctypes.c_int32) for name in ("whole", "by_row")),
    )


class _Output(ctypes.Structure):
    _fields_ = (
        ("out", ctypes.c_void_p),
        ("ld", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("bias", "thin", "up")),
        *((name, ctypes.c_int64) for name in ("rank", "ld_up")),
        ("half", ctypes.c_int32),
    )


class _Shape(ctypes.Structure):
    _fields_ = (
        ("frames", ctypes.c_int64),
        *((name, 3 * ctypes.c_int64) for name in ("input", "output", "kernel", "stride", "padding", "dilation")),
    )


class _Input(ctypes.Structure):
    _fields_ = (("q", ctypes.c_void_p), ("channels", ctypes.c_int64), ("first", ctypes.c_int64), ("centre", ctypes.c_void_p))


_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "qvsr_activation": [ctypes.POINTER(_Part), _I, _I, _F, _I, _F, _I, _P, _P, _P, _P, _I],
    "qvsr_finish": [ctypes.POINTER(_Output), ctypes.POINTER(_Sums), _I, _L, _L, _I],
    "qvsr_unpack": [_P, _L, _I, _L, _L, _P, _P, _L, _I],
    "qvsr_layer": [
        ctypes.POINTER(_Shape),
        ctypes.POINTER(_Input),
        ctypes.POINTER(_Sums),
        _I,
        _P,
        _L,
        _I,
        _L,
        ctypes.POINTER(_Output),
        _I,
        _I,
    ],
    "qvsr_engine": [],
    "qvsr_has_engine": [_I],
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
        log.warning("packed layers round and scale by plain PyTorch, several times as slow: %s", error)
        return None, str(error)


def build(into: Path | None = None) -> Path:
    """Compile the library if it is not there yet.

    Args:
        into: where it is kept; None: where the CUDA kernels are (:func:`qvsr.kernels.build.folder`), or in the system's temporary folder.
    Raises:
        BuildError: no compiler, an error of it, or no folder that can be written.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        raise BuildError(f"there is no C compiler {os.environ.get('CC') or 'cc'!r}; install gcc, or name one in the variable CC")
    key = hashlib.sha256(b"".join(source.read_bytes() for source in sorted(SOURCES.iterdir())))
    for fact in (*FLAGS, compiler, run([compiler, "--version"]), _processor()):
        key.update(fact.encode() + b"\0")
    name = f"cpu-{key.hexdigest()[:16]}.so"
    reasons = []
    for place in _places() if into is None else [into]:
        if (place / name).is_file():
            return place / name
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place) as scratch:
                # linked without -fopenmp: its functions are those of the library that torch has loaded, and so are its threads
                units = sorted(SOURCES.glob("*.c"))
                for source in units:
                    run([compiler, *FLAGS, "-c", str(source), "-o", f"{scratch}/{source.stem}.o"])
                run([compiler, "-shared", *(f"{scratch}/{source.stem}.o" for source in units), "-lm", "-o", f"{scratch}/cpu.so"])
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
        function.argtypes, function.restype = arguments, None if name in ("qvsr_finish", "qvsr_unpack") else ctypes.c_int
    return found


def _places() -> list[Path]:
    return [folder(), Path(tempfile.gettempdir()) / f"qvsr-{os.getuid() if hasattr(os, 'getuid') else 'user'}"]


def _processor() -> str:
    """What code compiled for this processor may depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


# ---------------------------------------------------------------- calls


def quantizes(rotation: Sequence[Tensor], signs: Tensor | None) -> bool:
    """Whether :func:`quantize_activation` can do such a rotation: none, or small factors with signs."""
    return not rotation or (signs is not None and max(factor.shape[0] for factor in rotation) <= LARGEST_FACTOR)


def quantize_activation(
    x: Tensor,
    start: int,
    stop: int,
    channels_first: bool,
    left: bool,
    rotation: Sequence[Tensor],
    signs: Tensor | None,
    bits: int,
    granularity: str,
    symmetric: bool,
    floor: float,
    clip: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :data:`qvsr.kernels.ops.SCHEMAS`; for rotations of :func:`quantizes`, up to 8 bits, and an input with elements."""
    outside = (x.shape[0], *x.shape[2:]) if channels_first else x.shape[:-1]
    frames = x.shape[0] if channels_first or granularity == "frame" else 1
    positions = math.prod(outside) // frames
    part = _Part(x.data_ptr(), frames, positions, x.shape[1 if channels_first else -1], start, stop - start, channels_first)
    part.half = x.dtype == torch.bfloat16
    if rotation:
        assert signs is not None
        known = _rotation(tuple(rotation), signs, left)
        part.signs_first, part.count, part.signs, part.factors, part.sizes = not left, len(rotation), *known.pointers
    dynamic, top = scale is None or zero_point is None, 2**bits - 1
    stride = STRIDES[granularity] if dynamic else 0
    room = None
    if scale is None or zero_point is None:
        shape = ((), outside[:1], outside)[stride]
        scale, zero_point = torch.empty(shape), torch.empty(shape)
        room = torch.empty(2 * frames * (positions if stride == 2 else -(-positions // LANES)))
    else:
        scale, zero_point = scale.clone(), zero_point.clone()
    q = torch.empty((*outside, stop - start), dtype=torch.uint8)
    code: int = _found().qvsr_activation(
        *(part, dynamic, stride, 1.0 if clip is None else float(clip), symmetric, floor * min(1.0, 255 / top), top),
        *(scale.data_ptr(), zero_point.data_ptr(), None if room is None else room.data_ptr(), q.data_ptr(), torch.get_num_threads()),
    )
    if code & 1:
        raise MemoryError("quantize_activation: no memory for a tile of 16 positions")
    if code & 2 and not dynamic:
        raise ValueError(NAN)
    return q, scale, zero_point


class _Rotation(NamedTuple):
    """What a rotation looks like to ``activation.c``; the first three keep the memory."""

    signs: Tensor
    factors: Tensor
    sizes: ctypes.Array[ctypes.c_int32]
    pointers: tuple[int, int, int]


@functools.lru_cache(maxsize=4096)
def _rotation(rotation: tuple[Tensor, ...], signs: Tensor, left: bool) -> _Rotation:
    """Factors one after another, transposed where rows are multiplied from the right; signs with the factor that makes them orthogonal."""
    factors = torch.cat([(factor if left else factor.T).flatten() for factor in rotation]).float()
    sizes = (ctypes.c_int32 * len(rotation))(*(len(factor) for factor in rotation))
    scaled = signs.float() * len(signs) ** -0.5
    return _Rotation(scaled, factors, sizes, (scaled.data_ptr(), factors.data_ptr(), ctypes.addressof(sizes)))


def finish(out: Tensor, bias: Tensor | None, thin: Tensor | None, up: Tensor | None, parts: Sequence[Sums]) -> None:
    """``qvsr_finish`` of ``layer.c``; see :func:`qvsr.kernels.finish.finish`."""
    found = (_Sums * len(parts))()
    for there, part in zip(found, parts, strict=True):
        pointers = (None if values is None else values.data_ptr() for values in part[1:])
        there.__init__(part.sums.data_ptr(), part.sums.stride(0), *pointers, part.sums.dtype == torch.int32, part.scale.dim() > 0)
    _found().qvsr_finish(_output(out, bias, thin, up), found, len(parts), *out.shape, torch.get_num_threads())


def _output(out: Tensor, bias: Tensor | None, thin: Tensor | None, up: Tensor | None) -> _Output:
    branch = (None, None, 0, 0) if thin is None or up is None else (thin.data_ptr(), up.data_ptr(), up.shape[0], up.stride(0))
    return _Output(out.data_ptr(), out.stride(0), None if bias is None else bias.data_ptr(), *branch, out.dtype == torch.bfloat16)


ENGINES = (None, "AVX-VNNI", "AVX-512 VNNI", "AMX")  # as in csrc/cpu/layer.c


def has_engine(number: int) -> bool:
    """Whether one of `ENGINES` can multiply in :func:`layer` here."""
    found = library()
    return found is not None and bool(found.qvsr_has_engine(number))


@functools.lru_cache(maxsize=1)
def engine() -> int:
    """The best that can multiply in :func:`layer`, a number of `ENGINES`; 0: nothing, there is no :func:`layer`."""
    found = library()
    return 0 if found is None else int(found.qvsr_engine())


def described() -> str:
    """What multiplies and what rounds on this machine, in one line, where there are integer instructions at all (:func:`qvsr.kernels.cpu.missing`)."""
    if name := ENGINES[engine()]:
        return f"8-bit integer products by {name}, inputs rounded, sums scaled, all in C"
    if library() is None:
        return f"8-bit integer products by torch._int_mm; inputs rounded by PyTorch, more slowly: {missing()}"
    return "8-bit integer products by torch._int_mm; inputs rounded in C"


class Input(NamedTuple):
    """One part of a layer's input and what scales its sums.

    Attributes:
        q: uint8, contiguous, channels last; centre: int8 ``(N,)``, what is subtracted from the weight.
        step: scales of the weight ``(N,)``; scale: of the inputs, ``()`` or one a position of the output; zero_point: int32, shaped alike.
        total: int32 ``(N,)``, sums of the centred weight; rest: int32 ``(N,)``, centre less zero point, or None: nothing.
    """

    q: Tensor
    centre: Tensor
    step: Tensor
    scale: Tensor
    zero_point: Tensor
    total: Tensor
    rest: Tensor | None


class Window(NamedTuple):
    """What a layer sees of its input; sizes of up to three axes. A linear layer has one axis, its rows, and kernels of 1."""

    frames: int
    input: Sequence[int]
    output: Sequence[int]
    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]


def layer(
    out: Tensor,
    window: Window,
    parts: Sequence[Input],
    weight: Tensor,
    bits: int,
    bias: Tensor | None,
    thin: Tensor | None,
    up: Tensor | None,
) -> None:
    """``qvsr_layer`` of ``layer.c``: packed weights times rounded inputs, scaled, with branch and bias, into `out` ``(M, N)``."""
    inputs, sums, first = (_Input * len(parts))(), (_Sums * len(parts))(), 0
    taps = math.prod(window.kernel)
    for index, part in enumerate(parts):
        inputs[index] = _Input(part.q.data_ptr(), part.q.shape[-1], first, part.centre.data_ptr())
        first += part.q.shape[-1] * taps
        rest = None if part.rest is None else part.rest.data_ptr()
        pointers = (values.data_ptr() for values in (part.step, part.scale, part.zero_point, part.total))
        sums[index] = _Sums(None, 0, *pointers, rest, None, 1, part.scale.dim() > 0)
    shape = _Shape(window.frames)
    for name, fill in zip(Window._fields[1:], (1, 1, 1, 1, 0, 1), strict=True):
        values = tuple(getattr(window, name))
        setattr(shape, name, (3 * ctypes.c_int64)(*(fill,) * (3 - len(values)), *values))
    head = (shape, inputs, sums, len(parts), weight.data_ptr(), weight.shape[1], bits, out.shape[1], _output(out, bias, thin, up))
    if code := _found().qvsr_layer(*head, engine(), torch.get_num_threads()):
        raise MemoryError("a packed layer: no memory for a panel of its weight") if code == 1 else RuntimeError(f"qvsr_layer: code {code}")


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


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor; on Linux a large one gets large pages, which come several times as fast as small ones."""
    y = torch.empty(shape, dtype=dtype)
    size, advise = y.numel() * y.element_size(), _advise()
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
    _found().qvsr_unpack(*pointers, len(packed), torch.get_num_threads())
    return out


def _found() -> ctypes.CDLL:
    found = library()
    assert found is not None
    return found
