"""Packed layers on a CPU: unsigned 8-bit activations times signed 8-bit weights through the integer kernels that PyTorch ships.

A weight of up to 8 bits is centred to fit 8 signed bits: ``w - c`` with c as near to the zero point as possible. Up to 7 bits c nearly
always *is* the zero point; at 8 bits the difference r = c - zero_point remains, and r times the sum of the inputs is added. There are two
ways, with the same whole numbers; :mod:`qvsr.kernels.finish` scales them while they are in the cache:

- oneDNN's quantized operators, for layers with many positions: scales of 1 make them return the sums. They want the weight in a layout of
  their own, whose making takes some 3 ns a weight. It is kept: these layers have few weights.
- `torch._int_mm` with plain matrices, for layers with many weights and few positions, and wherever frames or tokens have ranges of their
  own. The weight is unpacked a few output channels at a time and thrown away. A convolution becomes a matrix product by laying out the
  8-bit inputs of each position side by side.

Without VNNI instructions the kernels add pairs of products in 16 bits, which saturates: then nothing here is used (:func:`missing`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qvsr.kernels import native, reference
from qvsr.kernels.finish import BLOCK, Output, blocks, column, of_outputs
from qvsr.kernels.native import Sums
from qvsr.kernels.packing import unpack_rows, unpack_weight
from qvsr.kernels.reference import CONVOLUTIONS, output_shape

KEPT_BELOW = 2**18  # weights of a layer whose layout for oneDNN is kept whatever it is used for
POSITIONS_PER_INPUT = 0.4  # from here on a layer has many positions: kept weights are few beside its activations
PIECES = 8  # of a part; in more it is left to _int_mm
FRAMES = 16  # ranges of their own up to here are calls of their own
ROWS = 8192
LARGEST = 2**31 - 1


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why the integer kernels cannot be used on this CPU, in one line; None where they can."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    for name in ("qlinear_pointwise", "qlinear_prepack", "qconv_pointwise", "qconv_prepack"):
        if not hasattr(torch.ops.onednn, name):
            return f"this PyTorch has no operator onednn::{name}"
    if not hasattr(torch, "_int_mm"):
        return "this PyTorch has no torch._int_mm"
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not any(found.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return "this CPU has no 8-bit dot products without saturation (AVX-512 VNNI, AVX-VNNI or AMX)"
    try:
        return _saturation()
    except RuntimeError as error:
        return f"oneDNN's quantized operators do not work here ({str(error).splitlines()[0]})"


def _saturation() -> str | None:
    """Compare the largest product of 64 inputs with what it must be, for all that is used."""
    q, w = torch.full((16, 64), 255, dtype=torch.uint8), torch.full((16, 64), -128, dtype=torch.int8)
    linear = _linear(q, 0, torch.ops.onednn.qlinear_prepack(w, [16, 64]), 16)
    how = _How((1, 1), (1, 1), (0, 0), (1, 1))
    conv = _conv(q.view(1, 4, 4, 64), 0, _conv_weight(w.view(16, 1, 1, 64), how, (1, 4, 4, 64)), 16, how)
    for name, result in (("_int_mm", torch._int_mm(q, w.t())), ("qlinear_pointwise", linear), ("qconv_pointwise", conv)):
        if not bool((result == 255 * -128 * 64).all()):
            return f"{name} of this CPU loses large products"
    return None


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class _How:
    """What a convolution does apart from its numbers."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


@dataclass
class _Weight:
    """What follows from a packed weight and its zero points, each ``(P, N)``.

    Attributes:
        centre: c, int8 or uint8 bits of what is subtracted from the integers; rest: r = c - zero_point.
        total: sum of w - c over a row.
        centred: of each part, whether c is the zero point everywhere; steps: `weight_scale` by part.
        pieces: the channels of each part that oneDNN adds up at a time. It adds up ``q (w - c)`` in 32 bits, makes it float32 and then takes
            off zero_point times `total`: float32 holds that as long as both are below 2^24. Half of it is left for the rest of the sum.
        limit: no sum of products exceeds it times the largest ``|q - zero_point|``.
        sizes: values of each part in a row.
        layouts: the parts in oneDNN's layout, once they were needed.
    """

    zero_point: Tensor
    version: int
    centre: Tensor
    rest: Tensor
    total: Tensor
    pieces: list[list[slice]]
    limit: int
    centred: list[bool]
    sizes: list[int]
    scale: Tensor | None = None
    steps: list[Tensor] = field(default_factory=list)
    layouts: list[list[Tensor]] = field(default_factory=list)

    def steps_of(self, weight_scale: Tensor) -> list[Tensor]:
        """The scales ``(N, P)`` by part, each contiguous."""
        if self.scale is not weight_scale:
            self.scale, self.steps = weight_scale, [column.contiguous() for column in weight_scale.unbind(1)]
        return self.steps

    def values(self, weight: Tensor, bits: int, part: int, start: int, stop: int) -> Tensor:
        """``w - c`` of some output channels of a packed weight, int8 ``(n, taps * channels)``; bytes wrap around, and the difference fits."""
        first, count, centre = sum(self.sizes[:part]), self.sizes[part], self.centre[part, start:stop]
        if native.library() is not None:
            return native.unpack(weight[start:stop], bits, first, count, centre)
        return unpack_rows(weight[start:stop], bits, sum(self.sizes))[:, first : first + count].view(torch.int8) - centre[:, None]


_weights: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _facts(weight: Tensor, bits: int, zero_point: Tensor, parts: Sequence[int], kernel: Sequence[int]) -> _Weight:
    """The facts of a packed weight, computed at its first use and kept as long as it is."""
    found: _Weight | None = _weights.get(weight)
    if found is not None and found.zero_point is zero_point and found.version == weight._version:
        return found
    centres, rests, totals, limit = [], [], [], 0
    for first in range(0, len(weight), step := max(1, BLOCK // (sum(parts) * math.prod(kernel)))):
        rows = unpack_weight(weight[first : first + step], bits, parts, kernel)
        zeros = zero_point[first : first + step].double()
        centre, rest, total = [], [], []
        for part, integers in enumerate(rows):
            flat = integers.flatten(1).to(torch.int16)
            low, high = flat.amin(1).double(), flat.amax(1).double()
            c = torch.maximum(torch.minimum(zeros[:, part], low + 128), high - 127)
            flat -= c.to(torch.int16)[:, None]
            r = c - zeros[:, part]
            limit = max(limit, flat.shape[1], int((flat.abs().sum(1) + r.abs() * flat.shape[1]).max()))
            centre.append((c % 256).to(torch.uint8).view(torch.int8))
            rest.append(r.clamp(-LARGEST, LARGEST).to(torch.int32))
            total.append(flat.sum(1, dtype=torch.int32))
        centres.append(torch.stack(centre))
        rests.append(torch.stack(rest))
        totals.append(torch.stack(total))
    remainder = torch.cat(rests, 1)
    centred = [not bool(part.any()) for part in remainder]
    sums, sizes = torch.cat(totals, 1), [size * math.prod(kernel) for size in parts]
    pieces = [_cut(size, float(values.abs().max())) for size, values in zip(parts, sums, strict=True)]
    found = _Weight(zero_point, weight._version, torch.cat(centres, 1), remainder, sums, pieces, limit, centred, sizes)
    _weights[weight] = found
    return found


def _cut(channels: int, largest: float) -> list[slice]:
    """Channels in as many about equal pieces as 255 times their largest total asks for, of a multiple of 16 each."""
    size = -(-channels // max(1, math.ceil(255 * largest / 2**23)))
    size = -(-size // 16) * 16
    return [slice(start, min(start + size, channels)) for start in range(0, channels, size)]


def kept_bytes(weight: Tensor) -> int:
    """Bytes that are kept for a packed weight beside it."""
    found: _Weight | None = _weights.get(weight)
    if found is None:
        return 0
    small = sum(values.numel() * values.element_size() for values in (found.centre, found.rest, found.total))
    return small + sum(layout.numel() for layouts in found.layouts for layout in layouts)


def forget(weight: Tensor) -> None:
    """Drop what is kept for a packed weight; it is made again when it is needed."""
    _weights.pop(weight, None)


# ---------------------------------------------------------------- layers


def matmul_packed(
    q: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    weight: Tensor,
    weight_bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    thin: Tensor | None,
    up: Tensor | None,
) -> Tensor:
    """See :data:`qvsr.kernels.ops.SCHEMAS`."""
    outside, channels, count = q[0].shape[:-1], [part.shape[-1] for part in q], len(weight)
    positions = math.prod(outside)
    if not positions:
        return weight_scale.new_empty(*outside, count)
    facts = _facts(weight, weight_bits, weight_zero_point, channels, ())
    if _beyond(facts, zero_point):
        return reference.matmul_packed(q, scale, zero_point, weight, weight_bits, weight_scale, weight_zero_point, bias, thin, up)
    rows = [part.reshape(positions, -1) for part in q]
    y = Output(positions, weight_scale, bias, thin, up)
    if _exact_in_onednn(facts, zero_point) and _uses_onednn(count, sum(channels), positions, scale):
        if not facts.layouts:
            for part, pieces in enumerate(facts.pieces):
                values = facts.values(weight, weight_bits, part, 0, count)
                prepack = torch.ops.onednn.qlinear_prepack
                facts.layouts.append([prepack(values[:, k].contiguous(), [positions, values[:, k].shape[1]]) for k in pieces])
        zeros = [int(z) for z in zero_point]
        inputs = [_inputs(facts, part, u, zeros[part]) for part, u in enumerate(rows)]
        for m in blocks(positions, count):
            sums = []
            for part, (u, step) in enumerate(zip(rows, facts.steps_of(weight_scale), strict=True)):
                layouts_of = zip(facts.pieces[part], facts.layouts[part], strict=True)
                total = _added([_linear(_piece(u[m], k), zeros[part], layout, count) for k, layout in layouts_of])
                sums.append(Sums(total, step, scale[part], **_rest(facts, inputs, part, m)))
            y.finish(m, sums)
    else:
        ranges = [[column(values, outside) for values in pair] for pair in zip(scale, zero_point, strict=True)]
        _blocks(rows, ranges, weight, weight_bits, facts, weight_scale, y)
    return y.values.view(*outside, count)


def conv_packed(
    q: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    weight: Tensor,
    weight_bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    bias: Tensor | None,
    thin: Tensor | None,
    up: Tensor | None,
) -> Tensor:
    """See :data:`qvsr.kernels.ops.SCHEMAS`."""
    frames, count, channels = q[0].shape[0], len(weight), [part.shape[-1] for part in q]
    shape = output_shape(q[0].shape[1:-1], kernel, stride, padding, dilation)
    positions = math.prod(shape)
    if not frames * positions:
        return weight_scale.new_empty(frames, *shape, count)
    facts = _facts(weight, weight_bits, weight_zero_point, channels, kernel)
    padded = any(padding)
    by_pixel = any(values.dim() > 1 for values in scale)
    # a zero that is padded is the zero point among the integers, if it is one of them
    inside = not padded or all(float(z.min()) >= 0 and float(z.max()) <= 255 for z in zero_point)
    exact = _exact_in_onednn(facts, zero_point)
    by_frame = any(values.dim() for values in scale)
    many_frames = by_frame and frames > FRAMES
    if _beyond(facts, zero_point) or (by_pixel and padded) or (not inside and (many_frames or not exact)):
        return reference.conv_packed(
            q, scale, zero_point, weight, weight_bits, weight_scale, weight_zero_point, kernel, stride, padding, dilation, bias, thin, up
        )
    how = _How(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    y = Output(frames * positions, weight_scale, bias, thin, up)
    keeps = exact and _uses_onednn(count, sum(channels) * math.prod(kernel), frames * positions, [])
    if not by_pixel and not many_frames and (not inside or keeps):
        each = list(blocks(frames, count * positions if not by_frame else BLOCK))  # a frame at a time where each has its own zero point
        layouts = facts.layouts
        if not layouts:
            for part, (u, pieces) in enumerate(zip(q, facts.pieces, strict=True)):
                values = facts.values(weight, weight_bits, part, 0, count).view(count, *kernel, -1)
                layouts.append([_conv_weight(values[..., k], how, u[each[0]][..., k].shape) for k in pieces])
            if keeps:
                facts.layouts = layouts
        for m in each:
            rows = slice(m.start * positions, m.stop * positions)
            sums = []
            for part, (u, step) in enumerate(zip(q, facts.steps_of(weight_scale), strict=True)):
                s, z = (values[m.start] if values.dim() else values for values in (scale[part], zero_point[part]))
                zero = int(z)
                layouts_of = zip(facts.pieces[part], layouts[part], strict=True)
                total = _added([_conv(_piece(u[m], k), zero, layout, count, how) for k, layout in layouts_of]).reshape(-1, count)
                rest = {} if facts.centred[part] else {"rest": facts.rest[part], "inputs": _window_inputs(u[m], zero, how)}
                sums.append(Sums(total, step, s, **rest))
            y.finish(rows, sums)
    else:
        windows = [_windows(u, zero_point[part], how, shape).view(frames * positions, -1) for part, u in enumerate(q)]
        ranges = [[of_outputs(values[part], (frames, *shape), stride, padding) for values in (scale, zero_point)] for part in range(len(q))]
        _blocks(windows, ranges, weight, weight_bits, facts, weight_scale, y)
    return y.values.view(frames, *shape, count)


def _uses_onednn(count: int, inputs: int, positions: int, scale: Sequence[Tensor]) -> bool:
    if any(values.dim() for values in scale):
        return False
    return count * inputs <= KEPT_BELOW or positions >= POSITIONS_PER_INPUT * inputs


def _exact_in_onednn(facts: _Weight, zero_point: Sequence[Tensor]) -> bool:
    """Whether its sums are whole numbers that float32 holds: inputs are in pieces for zero points of up to 255, and not in too many."""
    return all(_farthest(z) <= 255 for z in zero_point) and max(map(len, facts.pieces)) <= PIECES


def _farthest(zero_point: Tensor) -> float:
    return abs(float(zero_point)) if zero_point.dim() == 0 else float(zero_point.abs().max())


def _beyond(facts: _Weight, zero_point: Sequence[Tensor]) -> bool:
    """Whether a sum could exceed 32 bits: a range far away from 0 has a large zero point."""
    farthest = max(_farthest(z) for z in zero_point)
    return not (255 + farthest) * facts.limit <= LARGEST  # a NaN is beyond, too


def _piece(u: Tensor, channels: slice) -> Tensor:
    """Some channels of inputs ``(..., K)``, contiguous."""
    return u[..., channels].contiguous()


def _added(sums: Sequence[Tensor]) -> Tensor:
    """The sum of whole numbers in float32, in the first of them."""
    for one in sums[1:]:
        sums[0].add_(one)
    return sums[0]


def _inputs(facts: _Weight, part: int, u: Tensor, zero_point: Tensor | int) -> Tensor | None:
    """What the rest of the centred weights is multiplied by: the sum of ``q - zero_point`` of each row of uint8 ``(M, K)``; None: no rest."""
    return None if facts.centred[part] else (_sums(u) - zero_point * u.shape[1]).float()


def _rest(facts: _Weight, inputs: Sequence[Tensor | None], part: int, m: slice, n: slice = slice(None)) -> dict[str, Tensor]:
    """The arguments of :func:`qvsr.kernels.native.Sums` that add the rest."""
    values = inputs[part]
    return {} if values is None else {"rest": facts.rest[part, n], "inputs": values[m]}


# ---------------------------------------------------------------- oneDNN


def _linear(u: Tensor, zero_point: int, layout: Tensor, count: int) -> Tensor:
    """One part of a linear layer: whole numbers in float32."""
    head = (u, 1.0, zero_point, layout, _ones(count), _zeros(count))
    return torch.ops.onednn.qlinear_pointwise(*head, None, 1.0, 0, torch.float32, "none", [], "")


@lru_cache(maxsize=64)
def _zeros(count: int) -> Tensor:
    """Zero points of weights, which oneDNN wants to be 0."""
    return torch.zeros(count, dtype=torch.int32)


@lru_cache(maxsize=64)
def _ones(count: int) -> Tensor:
    """Scales of weights that leave the sums as they are."""
    return torch.ones(count)


def _conv_weight(values: Tensor, how: _How, shape: Sequence[int]) -> Tensor:
    """int8 ``(N, *kernel, channels)`` in oneDNN's layout; `shape` is that of the input, channels last."""
    weight = values.movedim(-1, 1)
    size = [shape[0], shape[-1], *shape[1:-1]]
    if len(how.kernel) == 1:
        weight, size = weight.unsqueeze(2), [*size[:2], 1, size[2]]
    # any scale and zero point but 0: it only says that there will be one
    return torch.ops.onednn.qconv_prepack(weight, _ones(len(values)), 1.0, 1, *_two(how), 1, size)


def _conv(u: Tensor, zero_point: int, layout: Tensor, count: int, how: _How) -> Tensor:
    """One part of a convolution ``(B, ..., N)``: whole numbers in float32."""
    maps = u.unsqueeze(1) if len(how.kernel) == 1 else u
    head = (maps.movedim(-1, 1), 1.0, zero_point, layout, _ones(count), _zeros(count))
    y = torch.ops.onednn.qconv_pointwise(*head, None, *_two(how), 1, 1.0, 0, torch.float32, "none", [], "").movedim(1, -1)
    return y.squeeze(1) if len(how.kernel) == 1 else y


def _window_inputs(u: Tensor, zero_point: int, how: _How) -> Tensor:
    """Sums of ``q - zero_point`` over what each position of the output sees, ``(M,)``: a convolution of one channel with ones."""
    maps = (_sums(u.reshape(-1, u.shape[-1])) - zero_point * u.shape[-1]).float().view(u.shape[0], 1, *u.shape[1:-1])
    window = maps.new_ones(1, 1, *how.kernel)
    return CONVOLUTIONS[len(how.kernel)](maps, window, None, how.stride, how.padding, how.dilation).flatten()


def _two(how: _How) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation; oneDNN has no one-dimensional convolution, its second axis is of size 1."""
    one = len(how.kernel) == 1
    return [1] * one + list(how.stride), [0] * one + list(how.padding), [1] * one + list(how.dilation)


# ---------------------------------------------------------------- plain matrices


def _windows(u: Tensor, zero_point: Tensor, how: _How, shape: tuple[int, ...]) -> Tensor:
    """The integers that each position of the output sees, ``(B, *shape, taps · channels)``; padded with the zero point."""
    if any(how.padding):
        size = [n + 2 * p for n, p in zip(u.shape[1:-1], how.padding, strict=True)]
        padded = u.new_empty(u.shape[0], *size, u.shape[-1])
        padded[:] = zero_point.to(u.dtype).view(-1, *(1,) * (u.dim() - 1))
        inner = tuple(slice(p, p + n) for n, p in zip(u.shape[1:-1], how.padding, strict=True))
        padded[(slice(None), *inner)] = u
        u = padded
    if all(size == 1 for size in (*how.kernel, *how.stride)):
        return u
    steps = u.stride()[1:-1]
    strides = (
        u.stride(0),
        *(step * s for step, s in zip(steps, how.stride, strict=True)),
        *(step * d for step, d in zip(steps, how.dilation, strict=True)),
        1,
    )
    return u.as_strided((u.shape[0], *shape, *how.kernel, u.shape[-1]), strides).contiguous()


def _blocks(
    rows: Sequence[Tensor],
    ranges: Sequence[Sequence[Tensor]],
    weight: Tensor,
    bits: int,
    facts: _Weight,
    weight_scale: Tensor,
    y: Output,
) -> None:
    """All parts ``(M, taps * channels)`` times the weight into `y`, a block of rows and output channels at a time."""
    positions, count = y.values.shape
    zeros = [zero_point.to(torch.int32) for _, zero_point in ranges]
    inputs = [_inputs(facts, part, u, zeros[part]) for part, u in enumerate(rows)]
    high = min(ROWS, positions)
    wide = max(64, 2 * BLOCK // high // 64 * 64)
    for first in range(0, count, wide):
        n = slice(first, min(first + wide, count))
        columns = [facts.values(weight, bits, part, n.start, n.stop).t() for part in range(len(rows))]
        for begins in range(0, positions, high):
            m, sums = slice(begins, begins + high), []
            for part, (u, step) in enumerate(zip(rows, facts.steps_of(weight_scale), strict=True)):
                scale, zero = (values[m] if values.dim() else values for values in (ranges[part][0], zeros[part]))
                total = _product(u[m], columns[part])
                sums.append(Sums(total, step[n], scale, zero, facts.total[part, n], **_rest(facts, inputs, part, m, n)))
            y.finish(m, sums, n)


def _product(u: Tensor, w: Tensor) -> Tensor:
    """uint8 ``(M, K)`` times int8 ``(K, n)`` in 32 bits."""
    if u.shape[1] == 1:  # torch 2.14's _int_mm errs here
        return u.to(torch.int32) * w.to(torch.int32)
    return torch._int_mm(u, w)


def _sums(u: Tensor) -> Tensor:
    """Sums of the rows of uint8 ``(M, K)`` as int32 ``(M,)``: `_int_mm` adds them up many times faster than `sum` does."""
    return _product(u, torch.ones(8, u.shape[1], dtype=torch.int8).t())[:, 0]
