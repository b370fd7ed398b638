"""What the operators mean, written plainly: integers in float64, in which every sum of theirs is exact.

The rounding of activations is the one that backends on a CPU use too. Products of integers of up to 16 bits stay below 2^53 for every layer
that fits in memory. Slow: a float64 copy of every integer, no integer instructions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qvsr.kernels.finish import Output, column, of_outputs, spread
from qvsr.kernels.native import NAN, Sums
from qvsr.kernels.packing import unpack_weight
from qvsr.kernels.rotate import rotate

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


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
    """See :data:`qvsr.kernels.ops.SCHEMAS`; float32 operations in the order of the simulated layer, which gives its integers to the last one."""
    axis = 1 if channels_first else x.dim() - 1
    piece = x.narrow(axis, start, stop - start).float()
    if rotation:
        piece = rotate(piece, rotation, signs, left, channels_first)
    shape: tuple[int, ...] = ()
    if scale is None or zero_point is None:
        if granularity == "tensor":
            low, high = torch.aminmax(piece)
        else:
            axes = (axis,) if granularity == "token" else tuple(range(1, piece.dim()))
            low, high = piece.amin(axes, keepdim=True), piece.amax(axes, keepdim=True)
        scale, zero_point = grid(low, high, bits, symmetric, floor, clip)
        shape = {"tensor": (), "frame": tuple(x.shape[:1]), "token": tuple(x.movedim(axis, -1).shape[:-1])}[granularity]
    elif piece.numel() and bool(torch.stack(torch.aminmax(piece)).isnan().any()):
        raise ValueError(NAN)
    top = 2**bits - 1
    q = (piece.div_(scale) if rotation else piece.div(scale)).round_()
    if zero_point.numel() == 1:
        offset = float(zero_point)  # a Python number makes clamp_ several times as fast
        q.clamp_(-offset, top - offset).add_(offset)
    else:
        q.clamp_(-zero_point, top - zero_point).add_(zero_point)
    q = q.to(torch.uint8 if bits <= 8 else torch.int32)
    return (q.movedim(1, -1) if channels_first else q).contiguous(), scale.reshape(shape).clone(), zero_point.reshape(shape).clone()


def grid(low: Tensor, high: Tensor, bits: int, symmetric: bool, floor: float, clip: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of ranges; the formulas of :mod:`qvsr.quant.affine`, to which a test holds them."""
    if clip is not None:
        low, high = low * clip, high * clip
    top = 2**bits - 1
    if symmetric:
        half = 2.0 ** (bits - 1)
        bound = torch.maximum(high, -low)
        low, high = -bound * (half / (half - 1)), bound
    scale = ((high - low) / top).clamp_min(floor * min(1.0, 255 / top))
    return scale, torch.round(-low / scale)


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
    rows, outside = [part.unsqueeze(0).flatten(0, -2) for part in q], q[0].shape[:-1]
    pieces = [part[:, 0] for part in unpack_weight(weight, weight_bits, [part.shape[-1] for part in q])]
    y, sums = Output(len(rows[0]), weight_scale, bias, thin, up, dtype), []
    for index, (u, w) in enumerate(zip(rows, pieces, strict=True)):
        s, z = (column(values[index], outside) for values in (scale, zero_point))
        total = (u.double() - z.double().unsqueeze(-1)) @ (w.double() - weight_zero_point[:, index, None].double()).T
        sums.append(Sums(total.float(), weight_scale[:, index].contiguous(), s))
    y.finish(slice(None), sums)
    return y.values.view(*outside, len(weight))


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
    count, shape = len(weight), (q[0].shape[0], *output_shape(q[0].shape[1:-1], kernel, stride, padding, dilation))
    channels = [part.shape[-1] for part in q]
    y, sums = Output(math.prod(shape), weight_scale, bias, thin, up, dtype), []
    for index, w in enumerate(unpack_weight(weight, weight_bits, channels, kernel)):
        w = w.double() - weight_zero_point[:, index, None, None].double()
        w = w.transpose(1, 2).reshape(count, channels[index], *kernel)
        z = spread(zero_point[index], q[index].shape[:-1]).double()
        u = (q[index].double() - z[..., None]).movedim(-1, 1)  # the zeros that are padded are zeros, whatever the zero point
        total = CONVOLUTIONS[len(kernel)](u, w, None, tuple(stride), tuple(padding), tuple(dilation)).movedim(1, -1)
        own, scales = weight_scale[:, index].contiguous(), of_outputs(scale[index], shape, stride, padding)
        sums.append(Sums(total.reshape(-1, count).float(), own, scales))
    y.finish(slice(None), sums)
    return y.values.view(*shape, count)


def output_shape(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Positions of a convolution's output along each axis."""
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True))
