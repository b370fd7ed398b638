"""Packed layers on a GPU: the operators of :mod:`qvsr.kernels.ops` by the kernels of ``csrc/``, through ctypes.

A call checks its tensors, fills in the structures of ``csrc/quantize.h`` and ``csrc/api.h`` and starts kernels on PyTorch's current stream of the
tensors' own device. Nothing here waits for the device but a weight's or a rotation's first use. The way from an input to an output:

    quantize_activation   x -> q, scale, zero point; and the sums of q's rows, which are kept beside q as long as q is
    matmul / conv_packed  the weight in the tensor cores' order -> the output, in the type that is asked for

The weight is put in that order at its first use on a device. The packed weight of a layer lies on the CPU, so that the GPU holds it once.
Where there is no library (no ``nvcc``, a build that fails), :mod:`qvsr.kernels.fallback` computes. That is said once, with the reason.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import byref, c_int64
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qvsr.kernels import build, fallback, header, ops, reference
from qvsr.kernels.rotate import rotate

GRANULARITIES = {name: index for index, name in enumerate(ops.GRANULARITIES)}
RESULTS = {torch.float32: "QVSR_FLOAT32", torch.float16: "QVSR_FLOAT16", torch.bfloat16: "QVSR_BFLOAT16"}
DENSE = 128  # channels above which a matrix that has no factors is left to the library of matrix products

log = logging.getLogger(__name__)
_said: set[str] = set()


class CudaError(ops.OperatorError):
    """A kernel could not be started; the message has the operator and the reason that the library or the driver gave."""


# ---------------------------------------------------------------- the library


@lru_cache(maxsize=1)
def interface() -> header.Header:
    """What the headers of ``csrc/`` declare."""
    return header.read((build.SOURCES / name).read_text() for name in ("quantize.h", "api.h"))


def load(path: Path) -> ctypes.CDLL:
    """A built library with the types of its functions.

    Raises:
        CudaError: it cannot be loaded, or lacks a function.
    """
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in interface().functions.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise CudaError(f"the kernels' library {path} cannot be used: {error}; remove it, and it is built again") from error
    return library


# ---------------------------------------------------------------- devices


@dataclass(frozen=True)
class Chip:
    """What kernels are chosen by: compute capability as ``10 · major + minor``, multiprocessors, bytes of shared memory a block can have."""

    architecture: int
    multiprocessors: int
    shared: int


@lru_cache(maxsize=64)
def _chip_of(index: int) -> Chip:
    found = torch.cuda.get_device_properties(index)
    shared = getattr(found, "shared_memory_per_block_optin", 0)
    return Chip(10 * found.major + found.minor, found.multi_processor_count, shared)


def _chip(x: Tensor) -> Chip:
    return _chip_of(x.get_device())


_libraries: dict[int, ctypes.CDLL | str] = {}  # by architecture; or why there is none


def _library_of(architecture: int) -> ctypes.CDLL | str:
    if architecture not in _libraries:
        try:
            if architecture < min(build.ARCHITECTURES):
                raise CudaError(f"compute capability {architecture / 10} is below {min(build.ARCHITECTURES) / 10}")
            _libraries[architecture] = load(build.find_or_build([architecture]).path)
        except (build.BuildError, CudaError) as error:
            _libraries[architecture] = str(error)
    return _libraries[architecture]


def _library(x: Tensor) -> ctypes.CDLL | None:
    """The kernels for the device of `x`; None, said once, where there are none."""
    found = _library_of(_chip(x).architecture)
    if not isinstance(found, str):
        return found
    if found not in _said:
        _said.add(found)
        log.warning("packed layers on the GPU are computed by PyTorch's own operators, more slowly: %s", found)
    return None


def missing(index: int = 0) -> str | None:
    """Why the kernels cannot be used on a GPU, in one line; None where they can. Builds nothing."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU, or no driver for it"
    architecture = _chip_of(index).architecture
    found = _libraries.get(architecture)
    if isinstance(found, str):
        return found
    if found is None and architecture < min(build.ARCHITECTURES):
        return f"compute capability {architecture / 10} is below {min(build.ARCHITECTURES) / 10}"
    if found is None and build.find_nvcc() is None:
        return "there is no nvcc to build the kernels; install NVIDIA's CUDA toolkit, or name the compiler in CUDACXX"
    return None


def described(index: int = 0) -> str:
    """What a GPU's kernels are or will be, in a few words; of a machine on which nothing is missing."""
    architecture = _chip_of(index).architecture
    found = build.find([architecture])
    state = f"built by nvcc {found.compiler}" if found else "to be built at the first use"
    return f"kernels of compute capability {architecture / 10}, {state}"


def _where(x: Tensor) -> tuple[AbstractContextManager[Any], int | None]:
    """The device of `x` as the current one, and its current stream."""
    if not x.is_cuda:  # under emulation, which tests use
        return nullcontext(), None
    return torch.cuda.device(x.device), torch.cuda.current_stream(x.device).cuda_stream


def _captured(device: torch.device) -> bool:
    """Whether work is being recorded for a CUDA graph instead of done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _finished(x: Tensor) -> None:
    """Wait for what the current stream makes of `x`: other streams are going to read it, too."""
    if x.is_cuda:
        torch.cuda.current_stream(x.device).synchronize()


def _three(values: Sequence[int]) -> Any:
    return (c_int64 * 3)(*values)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _started(name: str, code: int, message: Any) -> None:
    if code:
        raise CudaError(f"{name}: the kernel was not started: {message(code).decode()} (code {code})")


# ---------------------------------------------------------------- activations


@dataclass(frozen=True)
class _Rows:
    """What is known of quantized rows beside their integers."""

    bits: int
    totals: Tensor


_rows: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_factors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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
    """See :data:`qvsr.kernels.ops.SCHEMAS`; maps whose channels come last in memory are taken as they are.

    NaN in `x` makes scales NaN: on a GPU an error would have to wait for the device.
    """
    name, fixed = "quantize_activation", scale is not None and zero_point is not None
    ops.check_activation(x, start, stop, channels_first, bits, granularity, fixed, last=True)
    ops.check(name, x.device, signs=signs, clip=clip, scale=scale, zero_point=zero_point)
    for factor in rotation:
        ops.check_device(name, "rotation", factor, x.device)
    rest = (bits, granularity, symmetric, floor, clip, scale, zero_point)
    library = _library(x)
    if library is None or bits == 16 or not x.numel():
        return reference.quantize_activation(x, start, stop, channels_first, left, rotation, signs, *rest)
    if len(rotation) == 1 and len(rotation[0]) > DENSE and signs is None:
        return _rotated_before(x, start, stop, channels_first, left, rotation, signs, *rest)

    channels, last = x.shape[1 if channels_first else -1], not channels_first or x.movedim(1, -1).is_contiguous()
    outside = (x.shape[0], *x.shape[2:]) if channels_first else tuple(x.shape[:-1])
    ranges = {"tensor": (), "frame": outside[:1], "token": outside}[granularity] if not fixed else ()
    q = x.new_empty((*outside, stop - start), dtype=torch.uint8)
    found_scale, found_zero = x.new_empty(ranges), x.new_empty(ranges)
    totals = x.new_empty(math.prod(outside), dtype=torch.int32)
    keys = x.new_empty(0 if fixed or granularity == "token" else 2 * max(1, math.prod(ranges)), dtype=torch.int32)
    call = interface().structures["QvsrActivation"](
        x=x.data_ptr(),
        frames=outside[0],
        tokens=math.prod(outside[1:]),
        channels=channels,
        start=start,
        K=stop - start,
        signs=_pointer(signs),
        clip=_pointer(clip),
        fixed_scale=_pointer(scale) if fixed else None,
        fixed_zero=_pointer(zero_point) if fixed else None,
        q=q.data_ptr(),
        scale=found_scale.data_ptr(),
        zero_point=found_zero.data_ptr(),
        totals=totals.data_ptr(),
        keys=keys.data_ptr() if keys.numel() else None,
        shared_limit=_chip(x).shared,
        channels_first=not last,
        signs_last=left,
        norm=1.0 if signs is None else 1 / math.sqrt(stop - start),
        bits=bits,
        granularity=GRANULARITIES["tensor" if fixed else granularity],
        symmetric=symmetric,
        floor=floor,
    )
    held = _fill(call, rotation, left)
    here, stream = _where(x)
    with here:
        code = library.qvsr_quantize(byref(call), stream)
    if code == interface().numbers["QVSR_QUANTIZE_CHANNELS"]:
        return _rotated_before(x, start, stop, channels_first, left, rotation, signs, *rest)
    _started(name, code, library.qvsr_quantize_message)
    del held
    _rows[q] = _Rows(bits, totals)
    return q, found_scale, found_zero


def _rotated_before(
    x: Tensor, start: int, stop: int, channels_first: bool, left: bool, rotation: Sequence[Tensor], signs: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    piece = rotate(x.narrow(1 if channels_first else -1, start, stop - start), rotation, signs, left, channels_first)
    return quantize_activation(piece.contiguous(), 0, stop - start, channels_first, left, [], None, *rest)


def _fill(call: Any, rotation: Sequence[Tensor], left: bool) -> list[Tensor]:
    """Write the factors into a call: neighbours that are Sylvester's matrices as one. What is returned must live until the call is made."""
    held: list[Tensor] = []
    count, most = 0, interface().numbers["QVSR_MAX_FACTORS"]
    for factor in rotation:
        size, matrix = len(factor), _matrix_of(factor, left)
        if matrix is None and count and not call.factor[count - 1].matrix:
            call.factor[count - 1].size *= size
            continue
        if count == most:
            raise ops.OperatorError(f"quantize_activation: a rotation of {len(rotation)} factors; up to {most} are possible")
        call.factor[count].size = size
        if matrix is not None:
            call.factor[count].matrix, call.factor[count].pitch = matrix.data_ptr(), matrix.shape[1]
            held.append(matrix)
        count += 1
    call.factors = count
    return held


def _matrix_of(factor: Tensor, left: bool) -> Tensor | None:
    """A factor as the kernel reads it, float32 with rows of a multiple of four; None for Sylvester's. Kept as long as the factor is."""
    kept = _factors.setdefault(factor, {})
    if left not in kept:
        n = len(factor)
        sylvester = torch.ones(1, 1)
        while len(sylvester) < n:
            sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), sylvester)
        if n > 1 and len(sylvester) == n and torch.equal(factor.cpu().float(), sylvester):
            kept[left] = None
        else:
            padded = factor.new_zeros(n, -(-n // 4) * 4, dtype=torch.float32)
            padded[:, :n] = (factor.T if left else factor).float()
            _finished(padded)
            kept[left] = padded
    return kept[left]


# ---------------------------------------------------------------- weights


@dataclass
class _Weight:
    """What GPUs hold of a packed weight: tiles and boxes (``csrc/api.h``) by device and form, a part each; the weight itself by device."""

    version: int
    forms: dict[tuple[torch.device, int], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    copies: dict[torch.device, Tensor] = field(default_factory=dict)


_weights: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _kept(weight: Tensor) -> _Weight:
    found: _Weight | None = _weights.get(weight)
    if found is None or found.version != weight._version:
        found = _weights[weight] = _Weight(weight._version)
    return found


def _tiles(
    library: ctypes.CDLL, name: str, weight: Tensor, bits: int, form: int, parts: Sequence[int], kernel: Sequence[int], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """A weight in the order of the tensor cores, made at its first use on a device and kept as long as the weight is."""
    forms = _kept(weight).forms
    if (device, form) in forms:
        return forms[device, form]
    if _captured(device):
        raise CudaError(f"{name}: its weight is not in the order of the tensor cores yet; run the layer once before a graph is captured")
    packed = weight.to(device)
    made, offset, taps = [], 0, math.prod(kernel)
    here, stream = _where(packed)
    values = sum(parts) * taps
    for size in parts:
        bytes_of = library.qvsr_tiles_bytes(len(packed), size, _three(kernel), form)
        boxes_of = library.qvsr_boxes_count(len(packed), _three(kernel))
        for code in (bytes_of, boxes_of):
            _started(name, min(code, 0), library.qvsr_message)
        tiles, boxes = packed.new_empty(bytes_of), packed.new_empty(boxes_of, dtype=torch.int32)
        row = (packed.data_ptr(), packed.stride(0), values, offset, bits, len(packed), size)
        with here:
            code = library.qvsr_repack(*row, _three(kernel), form, tiles.data_ptr(), boxes.data_ptr(), stream)
        _started(name, code, library.qvsr_message)
        made.append((tiles, boxes))
        offset += size * taps
    _finished(packed)
    forms[device, form] = made
    return made


def _copied(weight: Tensor, device: torch.device) -> Tensor:
    """A packed weight as it is, on the device: for operators that unpack it."""
    if weight.device == device:
        return weight
    copies = _kept(weight).copies
    if device not in copies:
        copies[device] = weight.to(device)
    return copies[device]


def kept_bytes(weight: Tensor) -> int:
    """Bytes of GPUs that a packed weight takes beside itself."""
    found: _Weight | None = _weights.get(weight)
    if found is None:
        return 0
    tensors = [*found.copies.values(), *(one for made in found.forms.values() for pair in made for one in pair)]
    return sum(one.numel() * one.element_size() for one in tensors)


def forget(weight: Tensor) -> None:
    """Drop what GPUs hold of a packed weight; it is made again when it is needed. A recorded graph of its layer must not be replayed any more."""
    _weights.pop(weight, None)


# ---------------------------------------------------------------- layers


_workspaces: dict[tuple[torch.device, int | str | None], Tensor] = {}


def _workspace(library: ctypes.CDLL, like: Tensor, chip: Chip, stream: int | None) -> Tensor:
    """Zeros of a stream, in which sums of a layer of few rows come together; kernels leave them zero.

    CUDA graphs share one, made by the calls before them: two must not be replayed at the same time. It never grows, since graphs know its place.
    """
    keys: tuple[tuple[torch.device, int | str | None], ...] = ((like.device, "graphs"), (like.device, stream))
    if _captured(like.device):
        return _workspaces[keys[0]]
    for key in keys:
        if key not in _workspaces:
            size = library.qvsr_workspace_bytes(chip.multiprocessors, interface().numbers["QVSR_MAX_PARTS"])
            _workspaces[key] = torch.zeros(size, dtype=torch.uint8, device=like.device)
    return _workspaces[keys[1]]


def matmul_packed(
    q: list[Tensor],
    scale: list[Tensor],
    zero_point: list[Tensor],
    weight: Tensor,
    weight_bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    thin: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See :data:`qvsr.kernels.ops.SCHEMAS`."""
    return _layer("matmul_packed", q, scale, zero_point, weight, weight_bits, weight_scale, weight_zero_point, None, bias, thin, up, dtype)


def conv_packed(
    q: list[Tensor],
    scale: list[Tensor],
    zero_point: list[Tensor],
    weight: Tensor,
    weight_bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    bias: Tensor | None,
    thin: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See :data:`qvsr.kernels.ops.SCHEMAS`."""
    how = (kernel, stride, padding, dilation)
    return _layer("conv_packed", q, scale, zero_point, weight, weight_bits, weight_scale, weight_zero_point, how, bias, thin, up, dtype)


def _layer(
    name: str,
    q: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    weight: Tensor,
    bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    how: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]] | None,
    bias: Tensor | None,
    thin: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    shape = ops.check_layer(name, q, scale, zero_point, weight, bits, weight_scale, weight_zero_point, how, bias, thin, up, dtype)
    out = weight_scale.new_empty(shape, dtype=dtype or torch.float32)
    if not out.numel():
        return out
    channels, inside, device = [part.shape[-1] for part in q], q[0].shape[1:-1], out.device
    library = _library(out)

    def computed(module: Any) -> Tensor:
        here = _copied(weight, device)
        y: Tensor = getattr(module, name)(q, scale, zero_point, here, bits, weight_scale, weight_zero_point, *(how or ()), bias, thin, up)
        return y.to(out.dtype)

    if bits == 16 or any(part.dtype != torch.uint8 for part in q):
        return computed(reference)
    if library is None:
        return computed(fallback)

    chip = _chip(out)
    known = [_rows.get(part) for part in q]
    form = library.qvsr_form(chip.architecture, bits, max(8 if rows is None else rows.bits for rows in known))
    _started(name, min(form, 0), library.qvsr_message)
    front = (1,) * (3 - len(how[0])) if how else (1, 1, 1)
    tiles = _tiles(library, name, weight, bits, form, channels, (*front, *(how[0] if how else ())), device)
    here, stream = _where(out)
    parts, held = (interface().structures["QvsrPart"] * len(q))(), []
    count = math.prod(q[0].shape[:-1])
    with here:
        for index, part in enumerate(q):
            rows, pitch, totals = _prepared(library, name, part, known[index], form, stream)
            held += [rows, totals]
            one = parts[index]
            one.q, one.pitch, one.totals, one.K = rows.data_ptr(), pitch, totals.data_ptr(), channels[index]
            one.scale, one.zero_point = scale[index].data_ptr(), zero_point[index].data_ptr()
            one.group = count // scale[index].numel()
            one.tiles, one.boxes = (tensor.data_ptr() for tensor in tiles[index])
            one.w_scale, one.w_zero_point = (tensor.data_ptr() + 4 * index for tensor in (weight_scale, weight_zero_point))
            one.w_stride = weight_scale.shape[1]
        workspace = _workspace(library, out, chip, stream)
        layer = interface().structures["QvsrLayer"](
            N=len(weight),
            parts=len(q),
            weight_bits=bits,
            form=form,
            arch=chip.architecture,
            multiprocessors=chip.multiprocessors,
            dtype=interface().numbers[RESULTS[out.dtype]],
            rank=0 if up is None else up.shape[1],
            out=out.data_ptr(),
            bias=_pointer(bias),
            thin=_pointer(thin),
            up=_pointer(up),
            workspace=workspace.data_ptr(),
            workspace_bytes=workspace.numel(),
        )
        if how is None:
            code = library.qvsr_matmul(parts, byref(layer), count, stream)
        else:
            sizes = {"in": inside, "out": shape[1:-1], "kernel": how[0], "stride": how[1], "padding": how[2], "dilation": how[3]}
            window = interface().structures["QvsrWindow"](frames=q[0].shape[0])
            for what, values in sizes.items():
                setattr(window, what, _three((*(0 if what == "padding" else 1 for _ in front), *values)))
            code = library.qvsr_conv(parts, byref(layer), byref(window), stream)
        wgmma = library.qvsr_wgmma()
    if wgmma < 0:
        _slower(device, library.qvsr_message(wgmma).decode())
    if code == interface().numbers["QVSR_SUM"]:
        return computed(reference)
    _started(name, code, library.qvsr_message)
    return out


@lru_cache(maxsize=64)
def _slower(device: torch.device, reason: str) -> None:
    """Say it once of each device."""
    log.warning("%s: products that would take wgmma take mma.sync, more slowly: %s", device, reason)


def _prepared(library: ctypes.CDLL, name: str, q: Tensor, known: _Rows | None, form: int, stream: int | None) -> tuple[Tensor, int, Tensor]:
    """Rows as the kernel reads them, bytes from one to the next, and their sums: q itself where that will do."""
    size = q.shape[-1]
    pitch = library.qvsr_pitch(size, form)
    whole = form != interface().numbers["QVSR_NIBBLES"] and pitch == size and q.data_ptr() % 16 == 0
    if whole and known is not None:
        return q, pitch, known.totals
    rows = math.prod(q.shape[:-1])
    copy = q if whole else q.new_empty(rows * pitch)
    totals = known.totals if known is not None else q.new_empty(rows, dtype=torch.int32)
    code = library.qvsr_prepare(q.data_ptr(), rows, size, form, None if whole else copy.data_ptr(), totals.data_ptr(), stream)
    _started(name, code, library.qvsr_message)
    return copy, pitch, totals


for _function in (quantize_activation, matmul_packed, conv_packed):
    torch.library.impl(f"qvsr::{_function.__name__}", "CUDA", _function)
