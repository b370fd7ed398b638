"""Quantizers whose smallest and largest value are trained (the learnable boundary quantizer of PassionSR, arXiv 2411.17106).

A value x becomes ``s (clip(round(x/s) + z, 0, n) - z)`` with ``s = (high - low) / n``, ``z = round(-low/s)`` and n = 2^bits - 1, as in
:mod:`qvsr.quant.affine`. Both roundings pass gradients straight through. What they then give is written out here, by where x falls:

    x is          d/dx    d/ds             d/dlow, at fixed s
    inside        1       round(x/s) - x/s     0
    below         0       -z - low/s           1
    above         0       n - z - low/s        1

and ``ds/dhigh = 1/n = -ds/dlow``, or 0 where s is at its floor. So the bounds hear of the rounding errors inside and of what is cut off: a value
above moves `high` by 1 and `low` by nothing, up to the rounding of z.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qvsr.quant import affine


class _BoundedQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, bits: int, floor: float) -> Tensor:
        scale, zero_point = affine.qparams(low, high, bits, floor)
        q = torch.round(x / scale).add_(zero_point)
        clipped = q.clamp(0, affine.levels(bits))
        inside = q == clipped
        y = clipped.sub_(zero_point).mul_(scale)
        ctx.save_for_backward(x, y, inside, low, scale)
        ctx.levels, ctx.floor = affine.levels(bits), floor
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        (gradient,), (x, y, inside, low, scale) = gradients, ctx.saved_tensors
        passed = gradient * inside
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return passed, None, None, None, None
        cut_off = (gradient - passed).sum_to_size(low.shape)
        # y/s is the integer less z, from which x/s is subtracted inside and low/s outside
        by_scale = ((y - torch.where(inside, x, low)).mul_(gradient)).sum_to_size(low.shape) / scale
        by_scale = torch.where(scale > ctx.floor, by_scale / ctx.levels, 0.0)
        return passed, cut_off - by_scale, by_scale, None, None


def bounded_quantize(x: Tensor, low: Tensor, high: Tensor, bits: int, floor: float = affine.SCALE_FLOOR) -> Tensor:
    """`x` rounded to the values between two bounds; gradients reach `x`, `low` and `high`.

    Args:
        low, high: same shape, which broadcasts over `x`.
        floor: smallest scale; there only the zero point follows `low`, and nothing `high`.
    """
    result: Tensor = _BoundedQuantize.apply(x, low, high, bits, floor)  # type: ignore[no-untyped-call]
    return result


class Trained(nn.Module):
    """A trainable tensor that is counted in a unit of its own: one step of Adam at learning rate r moves it by about r units.

    Args:
        value: at the start.
        unit: positive, broadcasts over `value`; None: 1, and the parameter is the value.
    """

    def __init__(self, value: Tensor, unit: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("unit", None if unit is None else unit.detach().clone(), persistent=False)
        self.parameter = nn.Parameter(value.detach().clone() if unit is None else value.detach() / unit, requires_grad=False)

    unit: Tensor | None

    def forward(self) -> Tensor:
        """The value."""
        return self.parameter if self.unit is None else self.parameter * self.unit
