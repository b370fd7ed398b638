"""Packed layers on a GPU without the library of kernels: PyTorch's own operators on unpacked integers, more slowly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qvsr.kernels.packing import unpack_weight
from qvsr.kernels.reference import CONVOLUTIONS, spread

BLOCK = 2**24  # sums at a time


def matmul_packed(
    q: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    weight: Tensor,
    bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    thin: Tensor | None,
    up: Tensor | None,
) -> Tensor:
    """Integers through ``torch._int_mm``, both sides less 128 where they would not fit; in blocks of rows."""
    channels = [part.shape[-1] for part in q]
    outside, count = q[0].shape[:-1], len(weight)
    rows = [part.reshape(-1, part.shape[-1]) for part in q]
    y = weight_scale.new_zeros(len(rows[0]), count)
    step = max(32, BLOCK // count)
    for index, (u, integers) in enumerate(zip(rows, unpack_weight(weight, bits, channels), strict=True)):
        w = integers[:, 0]
        shift = 128 if bits == 8 else 0
        w8 = (w.to(torch.int16) - shift).to(torch.int8)
        sums = w8.sum(1, dtype=torch.int32).double()
        below = shift - weight_zero_point[:, index].double()  # w - weight_zero_point = w8 + below
        ranges = [spread(values[index], outside).reshape(-1, 1) for values in (scale, zero_point)]
        for first in range(0, len(u), step):
            some = slice(first, first + step)
            u8 = (u[some].to(torch.int16) - 128).to(torch.int8)
            s, z = (values[some] for values in ranges)
            left = 128 - z.double()  # q - z = u8 + left
            total = _product(u8, w8).double() + left * sums + below * (u8.sum(1, dtype=torch.int32).double()[:, None] + u.shape[1] * left)
            y[some] += (total * s.double() * weight_scale[:, index].double()).float()
    if thin is not None and up is not None:
        y += thin.reshape(len(y), -1) @ up.T
    return (y if bias is None else y + bias).view(*outside, count)


def _product(u: Tensor, w: Tensor) -> Tensor:
    """int8 ``(M, K)`` times int8 ``(N, K)``: in 32 bits, or, for shapes that ``_int_mm`` refuses on a GPU, in float64."""
    if u.shape[0] > 16 and u.shape[1] % 8 == 0 and w.shape[0] % 8 == 0:
        return torch._int_mm(u, w.t())
    return u.double() @ w.double().t()


def conv_packed(
    q: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    weight: Tensor,
    bits: int,
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
    """Integers as float32 without their zero points through PyTorch's convolutions, without the 10-bit fractions that these use by default."""
    channels = [part.shape[-1] for part in q]
    y = torch.zeros((), device=weight.device)
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        for index, integers in enumerate(unpack_weight(weight, bits, channels, kernel)):
            w = integers.float() - weight_zero_point[:, index, None, None]
            w = w.transpose(1, 2).reshape(len(weight), channels[index], *kernel)
            s, z = (spread(values[index], q[index].shape[:-1]).unsqueeze(-1) for values in (scale, zero_point))
            u = ((q[index].float() - z) * s).movedim(-1, 1)
            total = CONVOLUTIONS[len(kernel)](u, w, None, tuple(stride), tuple(padding), tuple(dilation)).movedim(1, -1)
            y = y + total * weight_scale[:, index]
    if thin is not None and up is not None:
        y = y + thin.view(*y.shape[:-1], -1) @ up.T
    return (y if bias is None else y + bias).contiguous()
