"""Packed layers on a CPU: unsigned 8-bit activations times signed 8-bit weights through the integer kernels that PyTorch ships.

A weight of up to 8 bits is centred to fit 8 signed bits: ``w - c`` with c as near to the zero point as possible. Up to 7 bits c nearly
always *is* the zero point; at 8 bits the difference r = c - zero_point remains, and r times the sum of the inputs is added, which is one
thin product more. There are two ways, with the same sums:

- oneDNN's quantized operators, for layers with many positions: they add scale, zero point and bias in the same pass, but want the weight
  in a layout of their own, whose making takes a few nanoseconds a weight. It is kept: these layers have few weights.
- `torch._int_mm` with plain matrices, for layers with many weights and few positions, and wherever frames or tokens have ranges of their
  own. The weight is unpacked a few output channels at a time and thrown away, the scales are applied to each block of sums while it is in
  the cache. A convolution becomes a matrix product by laying out the 8-bit inputs of each position side by side.

Without VNNI instructions the kernels add pairs of products in 16 bits, which saturates: then nothing here is used (:func:`missing`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qvsr.kernels import reference
from qvsr.kernels.packing import unpack_weight
from qvsr.kernels.reference import output_shape, spread

KEPT_BELOW = 2**18  # weights of a layer whose layout for oneDNN is kept whatever it is used for
POSITIONS_PER_INPUT = 0.5  # from here on a layer has many positions: kept weights are few beside its activations
FRAMES = 16  # ranges of their own up to here are calls of their own
BLOCK = 2**21  # sums of _int_mm at a time: 8 MB, which a cache holds
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
    q, w, one = torch.full((16, 64), 255, dtype=torch.uint8), torch.full((16, 64), -128, dtype=torch.int8), torch.ones(16)
    linear = _linear(q, one[0], one[0] * 0, torch.ops.onednn.qlinear_prepack(w, [16, 64]), one, None, None)
    window = _conv_weight(w.view(16, 1, 64), (1, 1), (16, 4, 4, 64), _How((1, 1), (1, 1), (0, 0), (1, 1)))
    conv = _conv(q.view(1, 4, 4, 64), one[0], one[0] * 0, window, one, None, _How((1, 1), (1, 1), (0, 0), (1, 1)))
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
        limit: no sum of products exceeds it times the largest ``|q - zero_point|``.
        layouts: the parts in oneDNN's layout, once they were needed; ones: a part each, for sums of inputs.
    """

    zero_point: Tensor
    version: int
    centre: Tensor
    rest: Tensor
    total: Tensor
    limit: int
    centred: list[bool]
    scale: Tensor | None = None
    steps: list[Tensor] = field(default_factory=list)
    layouts: list[Tensor] = field(default_factory=list)
    ones: list[Tensor] = field(default_factory=list)

    def steps_of(self, weight_scale: Tensor) -> list[Tensor]:
        """The scales ``(N, P)`` by part, each contiguous."""
        if self.scale is not weight_scale:
            self.scale, self.steps = weight_scale, [column.contiguous() for column in weight_scale.unbind(1)]
        return self.steps

    def values(self, integers: Tensor, part: int, start: int, stop: int) -> Tensor:
        """``w - c`` as int8, of integers uint8 ``(n, taps, channels)``; bytes wrap around, and the difference fits."""
        return integers.view(torch.int8) - self.centre[part, start:stop, None, None]


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
    found = _Weight(zero_point, weight._version, torch.cat(centres, 1), remainder, torch.cat(totals, 1), limit, centred)
    _weights[weight] = found
    return found


def kept_bytes(weight: Tensor) -> int:
    """Bytes that are kept for a packed weight beside it."""
    found: _Weight | None = _weights.get(weight)
    if found is None:
        return 0
    small = sum(values.numel() * values.element_size() for values in (found.centre, found.rest, found.total))
    return small + sum(layout.numel() for layout in (*found.layouts, *found.ones))


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
    rows, steps = [part.reshape(positions, -1) for part in q], facts.steps_of(weight_scale)
    branch = None if thin is None else thin.reshape(positions, -1)
    if _uses_onednn(count, sum(channels), positions, scale):
        if not facts.layouts:
            for part, integers in enumerate(unpack_weight(weight, weight_bits, channels)):
                values = facts.values(integers, part, 0, count)[:, 0]
                facts.layouts.append(torch.ops.onednn.qlinear_prepack(values.contiguous(), [positions, channels[part]]))
        sums = [
            (_sums(u) - int(z) * u.shape[1]).float() * s if not facts.centred[part] else None
            for part, (u, s, z) in enumerate(zip(rows, scale, zero_point, strict=True))
        ]
        y = _start(branch, up, sums, facts, weight_scale, bias)
        for part, u in enumerate(rows):
            own = bias if y is None else None
            y = _linear(u, scale[part], zero_point[part], facts.layouts[part], steps[part], own, y)
    else:
        y = _start(branch, up, [], facts, weight_scale, bias)
        ranges = [
            [values[part] if values[part].dim() == 0 else spread(values[part], outside).reshape(-1, 1) for values in (scale, zero_point)]
            for part in range(len(q))
        ]
        y = _blocks(rows, ranges, weight, weight_bits, (), facts, weight_scale, bias, y)
    assert y is not None
    return y.view(*outside, count)


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
    positions = frames * math.prod(shape)
    if not positions:
        return weight_scale.new_empty(frames, *shape, count)
    facts = _facts(weight, weight_bits, weight_zero_point, channels, kernel)
    padded = any(padding)
    by_pixel = any(values.dim() > 1 for values in scale)
    # a zero that is padded is the zero point among the integers, if it is one of them
    inside = not padded or all(bool(((z >= 0) & (z <= 255)).all()) for z in zero_point)
    many_frames = frames > FRAMES and any(values.dim() for values in scale)
    if _beyond(facts, zero_point) or (by_pixel and padded) or (not inside and many_frames):
        return reference.conv_packed(
            q, scale, zero_point, weight, weight_bits, weight_scale, weight_zero_point, kernel, stride, padding, dilation, bias, thin, up
        )
    how = _How(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    branch = None if thin is None else thin.reshape(positions, -1)
    taps, steps = math.prod(kernel), facts.steps_of(weight_scale)
    if not by_pixel and not many_frames and (not inside or _uses_onednn(count, sum(channels) * taps, positions, [])):
        layouts = facts.layouts
        if not layouts:
            for part, integers in enumerate(unpack_weight(weight, weight_bits, channels, kernel)):
                layouts.append(_conv_weight(facts.values(integers, part, 0, count), how.kernel, q[part].shape, how))
            if _uses_onednn(count, sum(channels) * taps, positions, []):
                facts.layouts = layouts
        sums: list[Tensor | None] = []
        for part, u in enumerate(q):
            if facts.centred[part]:
                sums.append(None)
                continue
            if len(facts.ones) <= part:
                facts.ones = [
                    _conv_weight(torch.ones(1, taps, size, dtype=torch.int8), how.kernel, (*q[0].shape[:-1], size), how)
                    for size in channels
                ]
            sums.append(
                _conv(u, scale[part], zero_point[part], facts.ones[part], u.new_ones(1, dtype=torch.float32), None, how).reshape(-1, 1)
            )
        y = _start(branch, up, sums, facts, weight_scale, bias)
        for part, u in enumerate(q):
            own = bias if y is None else None
            call = (layouts[part], steps[part], own, how)
            if y is None:
                y = _conv(u, scale[part], zero_point[part], *call).view(positions, count)
                continue
            # a frame at a time: memory of more than some megabytes is given back to the system and costs more to get than to fill
            step = frames if positions * count <= BLOCK else 1
            maps = y.view(frames, -1, count)
            for frame in range(0, frames, step):
                some = slice(frame, frame + step)
                s, z = (values[some] if values.dim() else values for values in (scale[part], zero_point[part]))
                maps[some].add_(_conv(u[some], s, z, *call).view(-1, positions // frames, count))
    else:
        y = _start(branch, up, [], facts, weight_scale, bias)
        ranges, rows = [], []
        for part, u in enumerate(q):
            rows.append(_windows(u, zero_point[part], how, shape).view(positions, -1))
            ranges.append([_of_positions(values[part], how, (frames, *shape)) for values in (scale, zero_point)])
        y = _blocks(rows, ranges, weight, weight_bits, how.kernel, facts, weight_scale, bias, y)
    assert y is not None
    return y.view(frames, *shape, count)


def _uses_onednn(count: int, inputs: int, positions: int, scale: Sequence[Tensor]) -> bool:
    if any(values.dim() for values in scale):
        return False
    return count * inputs <= KEPT_BELOW or positions >= POSITIONS_PER_INPUT * inputs


def _beyond(facts: _Weight, zero_point: Sequence[Tensor]) -> bool:
    """Whether a sum could exceed 32 bits: a range far away from 0 has a large zero point."""
    farthest = max(float(z.abs().max()) for z in zero_point)
    return not (255 + farthest) * facts.limit <= LARGEST  # a NaN is beyond, too


def _start(
    branch: Tensor | None, up: Tensor | None, sums: Sequence[Tensor | None], facts: _Weight, weight_scale: Tensor, bias: Tensor | None
) -> Tensor | None:
    """The branch, what centred weights leave over and the bias ``(M, N)`` in one product; None where there is neither of the first two."""
    columns, rows = ([branch], [up]) if branch is not None and up is not None else ([], [])
    for part, column in enumerate(sums):
        if column is not None:
            columns.append(column)
            rows.append((facts.rest[part] * weight_scale[:, part])[:, None])
    if not columns:
        return None
    left, right = (tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1) for tensors in (columns, rows))
    return left @ right.T if bias is None else torch.addmm(bias, left, right.T)


# ---------------------------------------------------------------- oneDNN


def _linear(
    u: Tensor, scale: Tensor, zero_point: Tensor, layout: Tensor, weight_scale: Tensor, bias: Tensor | None, y: Tensor | None
) -> Tensor:
    """One part of a linear layer, added to `y` if there is one; y may be overwritten."""
    head = (u, float(scale), int(zero_point), layout, weight_scale, _none(len(weight_scale)))
    if y is None:
        return torch.ops.onednn.qlinear_pointwise(*head, bias, 1.0, 0, torch.float32, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise.binary(*head, y, bias, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "")


@lru_cache(maxsize=64)
def _none(count: int) -> Tensor:
    """Zero points of weights, which oneDNN wants to be 0."""
    return torch.zeros(count, dtype=torch.int32)


def _conv_weight(values: Tensor, kernel: tuple[int, ...], shape: Sequence[int], how: _How) -> Tensor:
    """int8 ``(N, taps, channels)`` in oneDNN's layout; `shape` is that of the input, channels last."""
    weight = values.view(len(values), *kernel, -1).movedim(-1, 1)
    size = [shape[0], shape[-1], *shape[1:-1]]
    if len(kernel) == 1:
        weight, size = weight.unsqueeze(2), [*size[:2], 1, size[2]]
    # any scale and zero point but 0: it only says that there will be one
    return torch.ops.onednn.qconv_prepack(weight, torch.ones(len(values)), 1.0, 1, *_two(how), 1, size)


def _conv(u: Tensor, scale: Tensor, zero_point: Tensor, layout: Tensor, weight_scale: Tensor, bias: Tensor | None, how: _How) -> Tensor:
    """One part of a convolution ``(B, ..., N)``: with ranges by frame a call a frame."""
    if scale.dim():
        frames = zip(u.split(1), scale, zero_point, strict=True)
        return torch.cat([_conv(frame, s, z, layout, weight_scale, bias, how) for frame, s, z in frames])
    maps = u.unsqueeze(1) if len(how.kernel) == 1 else u
    y = torch.ops.onednn.qconv_pointwise(
        maps.movedim(-1, 1),
        float(scale),
        int(zero_point),
        layout,
        weight_scale,
        _none(len(weight_scale)),
        bias,
        *_two(how),
        1,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    ).movedim(1, -1)
    return (y.squeeze(1) if len(how.kernel) == 1 else y).contiguous()


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


def _of_positions(values: Tensor, how: _How, shape: tuple[int, ...]) -> Tensor:
    """Scales or zero points as one number, or a column of one a position of the output."""
    if values.dim() == 0:
        return values
    if values.dim() > 1:  # one a pixel, of which a strided kernel of one tap sees some
        values = values[(slice(None), *(slice(None, None, step) for step in how.stride))]
    return spread(values, shape).reshape(-1, 1)


def _blocks(
    rows: Sequence[Tensor],
    ranges: Sequence[Sequence[Tensor]],
    weight: Tensor,
    bits: int,
    kernel: Sequence[int],
    facts: _Weight,
    weight_scale: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
) -> Tensor:
    """All parts ``(M, taps · channels)`` times the weight, a block of rows and output channels at a time, added to `y` if there is one."""
    positions, count, taps = len(rows[0]), len(weight), math.prod(kernel)
    channels = [part.shape[1] // taps for part in rows]
    out = rows[0].new_empty(positions, count, dtype=torch.float32) if y is None else y
    sums = [_sums(u) if not facts.centred[part] else None for part, u in enumerate(rows)]
    zeros = [zero_point.to(torch.int32) for _, zero_point in ranges]
    high = min(ROWS, positions)
    wide = max(64, BLOCK // high // 64 * 64)
    for first in range(0, count, wide):
        n = slice(first, min(first + wide, count))
        integers = unpack_weight(weight[n], bits, channels, kernel)
        columns = [facts.values(part, index, n.start, n.stop).flatten(1).t() for index, part in enumerate(integers)]
        for begin, part in product(range(0, positions, high), range(len(rows))):
            m = slice(begin, begin + high)
            scale, zero = (values[m] if values.dim() else values for values in (ranges[part][0], zeros[part]))
            total = _product(rows[part][m], columns[part])
            total.sub_(zero * facts.total[part, n])
            if (inputs := sums[part]) is not None:
                total.add_((inputs[m] - zero * rows[part].shape[1]) * facts.rest[part, n])
            step = weight_scale[n, part]
            block = torch.mul(total, step).mul_(scale) if scale.dim() else torch.mul(total, step * scale)
            if y is None and part == 0:
                out[m, n] = block if bias is None else block.add_(bias[n])
            else:
                out[m, n] += block
    return out


def _product(u: Tensor, w: Tensor) -> Tensor:
    """uint8 ``(M, K)`` times int8 ``(K, n)`` in 32 bits."""
    if u.shape[1] == 1:  # torch 2.14's _int_mm errs here
        return u.to(torch.int32) * w.to(torch.int32)
    return torch._int_mm(u, w)


def _sums(u: Tensor) -> Tensor:
    """Sums of the rows of uint8 ``(M, K)`` as int32 ``(M, 1)``: `_int_mm` adds them up many times faster than `sum` does."""
    return _product(u, torch.ones(8, u.shape[1], dtype=torch.int8).t())[:, :1]
