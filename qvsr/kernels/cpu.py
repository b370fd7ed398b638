"""Packed layers on a CPU: unsigned 8-bit activations times signed 8-bit weights.

A weight of up to 8 bits is centred to fit 8 signed bits: ``w - c`` with c as near to the zero point as possible. Up to 7 bits c nearly
always *is* the zero point; at 8 bits the difference r = c - zero_point remains, and r times the sum of the inputs is added. There are two
ways, with the same whole numbers and the same bytes behind them:

- our own product (``csrc/layer.c``), where there is a C compiler and the processor has AMX, AVX-512 VNNI or AVX-VNNI. It unpacks a panel of the weight
  at a time, gathers the rows that a convolution sees, and scales the sums while they are in the nearest cache.
- `torch._int_mm` with plain matrices elsewhere. The weight is unpacked a few output channels at a time; a convolution becomes a matrix
  product by laying out the 8-bit inputs of each position side by side. :mod:`qvsr.kernels.finish` scales the sums.

Nothing is kept of a weight but its packed integers. Without VNNI instructions `_int_mm` adds pairs of products in 16 bits, which saturates:
then nothing here is used (:func:`missing`).
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
from qvsr.kernels.finish import BLOCK, Output, column, of_outputs
from qvsr.kernels.native import Sums
from qvsr.kernels.packing import unpack_rows, unpack_weight
from qvsr.kernels.reference import output_shape

ROWS = 8192
LARGEST = 2**31 - 1


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why the integer kernels cannot be used on this CPU, in one line; None where they can."""
    if native.engine():
        return None
    if not hasattr(torch, "_int_mm"):
        return "this PyTorch has no torch._int_mm"
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not any(found.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return "this CPU has no 8-bit dot products without saturation (AVX-512 VNNI, AVX-VNNI or AMX)"
    q, w = torch.full((16, 64), 255, dtype=torch.uint8), torch.full((16, 64), -128, dtype=torch.int8)
    if not bool((torch._int_mm(q, w.t()) == 255 * -128 * 64).all()):
        return "torch._int_mm of this CPU loses large products"
    return None


# ---------------------------------------------------------------- weights


@dataclass
class _Weight:
    """What follows from a packed weight and its zero points, each ``(P, N)``.

    Attributes:
        centre: c, int8 or uint8 bits of what is subtracted from the integers; rest: r = c - zero_point.
        total: sum of w - c over a row.
        centred: of each part, whether c is the zero point everywhere; steps: `weight_scale` by part.
        limit: no sum of products exceeds it times the largest ``|q - zero_point|``.
        sizes: values of each part in a row.
    """

    zero_point: Tensor
    version: int
    centre: Tensor
    rest: Tensor
    total: Tensor
    limit: int
    centred: list[bool]
    sizes: list[int]
    scale: Tensor | None = None
    steps: list[Tensor] = field(default_factory=list)

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
    found = _Weight(zero_point, weight._version, torch.cat(centres, 1), remainder, sums, limit, centred, sizes)
    _weights[weight] = found
    return found


def forget(weight: Tensor) -> None:
    """Drop what is known of a packed weight; it is found out again when it is needed."""
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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See :data:`qvsr.kernels.ops.SCHEMAS`."""
    outside, count = q[0].shape[:-1], len(weight)
    positions = math.prod(outside)
    if not positions:
        return weight_scale.new_empty(*outside, count, dtype=dtype)
    facts = _facts(weight, weight_bits, weight_zero_point, [part.shape[-1] for part in q], ())
    if _beyond(facts, zero_point):
        return reference.matmul_packed(q, scale, zero_point, weight, weight_bits, weight_scale, weight_zero_point, bias, thin, up, dtype)
    ranges = [(column(s, outside), column(z, outside).to(torch.int32)) for s, z in zip(scale, zero_point, strict=True)]
    y = Output(positions, weight_scale, bias, thin, up, dtype)
    if _ours(y):
        one = (1,)
        window = native.Window(1, (positions,), (positions,), one, one, (0,), one)
        native.layer(y.values, window, _inputs(facts, q, ranges, weight_scale), weight, weight_bits, y.bias, y.thin, y.up)
    else:
        _blocks([part.reshape(positions, -1) for part in q], ranges, weight, weight_bits, facts, weight_scale, y)
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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See :data:`qvsr.kernels.ops.SCHEMAS`."""
    frames, count = q[0].shape[0], len(weight)
    size = q[0].shape[1:-1]
    shape = output_shape(size, kernel, stride, padding, dilation)
    positions = math.prod(shape)
    if not frames * positions:
        return weight_scale.new_empty(frames, *shape, count, dtype=dtype)
    facts = _facts(weight, weight_bits, weight_zero_point, [part.shape[-1] for part in q], kernel)
    # a zero that is padded is the zero point among the integers, if it is one of them and the pixel's scale does not matter
    refused = any(padding) and any(z.dim() > 1 or not 0 <= _least(z) <= _most(z) <= 255 for z in zero_point)
    if _beyond(facts, zero_point) or refused:
        return reference.conv_packed(
            q,
            scale,
            zero_point,
            weight,
            weight_bits,
            weight_scale,
            weight_zero_point,
            kernel,
            stride,
            padding,
            dilation,
            bias,
            thin,
            up,
            dtype,
        )
    window = native.Window(frames, size, shape, kernel, stride, padding, dilation)
    at = (frames, *shape), stride, padding
    ranges = [(of_outputs(s, *at), of_outputs(z.to(torch.int32), *at)) for s, z in zip(scale, zero_point, strict=True)]
    y = Output(frames * positions, weight_scale, bias, thin, up, dtype)
    if _ours(y):
        native.layer(y.values, window, _inputs(facts, q, ranges, weight_scale), weight, weight_bits, y.bias, y.thin, y.up)
    else:
        rows = [_windows(u, z, window).view(frames * positions, -1) for u, z in zip(q, zero_point, strict=True)]
        _blocks(rows, ranges, weight, weight_bits, facts, weight_scale, y)
    return y.values.view(frames, *shape, count)


def _ours(y: Output) -> bool:
    """Whether our own product writes an output; not in float16."""
    return native.engine() > 0 and y.values.dtype != torch.float16


def _beyond(facts: _Weight, zero_point: Sequence[Tensor]) -> bool:
    """Whether a sum could exceed 32 bits: a range far away from 0 has a large zero point."""
    farthest = max(max(-_least(z), _most(z)) for z in zero_point)
    return not (255 + farthest) * facts.limit <= LARGEST  # a NaN is beyond, too


def _least(values: Tensor) -> float:
    return float(values if values.dim() == 0 else values.min())


def _most(values: Tensor) -> float:
    return float(values if values.dim() == 0 else values.max())


def _inputs(facts: _Weight, q: Sequence[Tensor], ranges: Sequence[tuple[Tensor, Tensor]], weight_scale: Tensor) -> list[native.Input]:
    """The parts as our own product takes them."""
    steps = facts.steps_of(weight_scale)
    return [
        native.Input(
            u, facts.centre[part], steps[part], *ranges[part], facts.total[part], None if facts.centred[part] else facts.rest[part]
        )
        for part, u in enumerate(q)
    ]


# ---------------------------------------------------------------- plain matrices


def _windows(u: Tensor, zero_point: Tensor, window: native.Window) -> Tensor:
    """The integers that each position of the output sees, ``(B, *shape, taps * channels)``; padded with the zero point."""
    if any(window.padding):
        size = [n + 2 * p for n, p in zip(window.input, window.padding, strict=True)]
        padded = u.new_empty(u.shape[0], *size, u.shape[-1])
        padded[:] = zero_point.to(u.dtype).view(-1, *(1,) * (u.dim() - 1))
        inner = tuple(slice(p, p + n) for n, p in zip(window.input, window.padding, strict=True))
        padded[(slice(None), *inner)] = u
        u = padded
    if all(size == 1 for size in (*window.kernel, *window.stride)):
        return u
    steps = u.stride()[1:-1]
    strides = (
        u.stride(0),
        *(step * s for step, s in zip(steps, window.stride, strict=True)),
        *(step * d for step, d in zip(steps, window.dilation, strict=True)),
        1,
    )
    return u.as_strided((u.shape[0], *window.output, *window.kernel, u.shape[-1]), strides).contiguous()


def _blocks(
    rows: Sequence[Tensor],
    ranges: Sequence[tuple[Tensor, Tensor]],
    weight: Tensor,
    bits: int,
    facts: _Weight,
    weight_scale: Tensor,
    y: Output,
) -> None:
    """All parts ``(M, taps * channels)`` times the weight into `y`, a block of rows and output channels at a time."""
    positions, count = y.values.shape
    inputs = [
        None if facts.centred[part] else (_product(u, _ones(u.shape[1]))[:, 0] - ranges[part][1] * u.shape[1]).float()
        for part, u in enumerate(rows)
    ]
    high = min(ROWS, positions)
    wide = max(64, 2 * BLOCK // high // 64 * 64)
    for first in range(0, count, wide):
        n = slice(first, min(first + wide, count))
        columns = [facts.values(weight, bits, part, n.start, n.stop).t() for part in range(len(rows))]
        for begins in range(0, positions, high):
            m, sums = slice(begins, begins + high), []
            for part, (u, step, x) in enumerate(zip(rows, facts.steps_of(weight_scale), inputs, strict=True)):
                scale, zero = (values[m] if values.dim() else values for values in ranges[part])
                rest = {} if x is None else {"rest": facts.rest[part, n], "inputs": x[m]}
                sums.append(Sums(_product(u[m], columns[part]), step[n], scale, zero, facts.total[part, n], **rest))
            y.finish(m, sums, n)


def _product(u: Tensor, w: Tensor) -> Tensor:
    """uint8 ``(M, K)`` times int8 ``(K, n)`` in 32 bits."""
    if u.shape[1] == 1:  # torch 2.14's _int_mm errs here
        return u.to(torch.int32) * w.to(torch.int32)
    return torch._int_mm(u, w)


def _ones(count: int) -> Tensor:
    """A matrix ``(count, 8)`` that adds up rows: `_int_mm` does so many times faster than `sum`."""
    return torch.ones(8, count, dtype=torch.int8).t()
