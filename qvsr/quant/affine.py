"""Asymmetric uniform quantizers (arXiv 1712.05877; QuantVSR's form, arXiv 2508.04485).

A value x becomes the integer ``q = clamp(round(x / scale) + zero_point, 0, 2^bits - 1)`` and comes back as
``(q - zero_point) * scale``. The published form has two peculiarities that are kept and are arguments here: the scale never
falls below `SCALE_FLOOR`, and the zero point is not clamped to the integer range (a channel that does not contain 0 has its
zero point outside), so an integer kernel must carry it in a wider type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCALE_FLOOR = 1e-4
BITS = (*range(2, 9), 16)


def levels(bits: int) -> int:
    """Largest integer of an unsigned `bits`-bit quantizer.

    >>> levels(4)
    15
    """
    if bits not in BITS:
        raise ValueError(f"{bits} bits cannot be quantized to: 2 to 8 can, and 16 for comparison with full precision")
    return int(2**bits - 1)


def storage(bits: int) -> torch.dtype:
    """Type of the integers in memory; torch does little with uint16.

    >>> storage(8), storage(16)
    (torch.uint8, torch.int32)
    """
    return torch.uint8 if bits <= 8 else torch.int32


def channel_range(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each output channel (axis 0), every other axis kept with size 1."""
    axes = tuple(range(1, weight.dim()))
    return weight.amin(axes, keepdim=True), weight.amax(axes, keepdim=True)


def tensor_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of the whole tensor, both ``()``."""
    low, high = torch.aminmax(x)
    return low, high


def vector_range(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum along one axis, which is kept with size 1: of each token or pixel over its channels."""
    return x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)


def symmetric_range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The range around ``low … high`` whose zero point is 2^(bits-1), the middle of the integers (QuaRot, arXiv 2404.00456).

    The largest magnitude m lies on the outermost positive level: the scale is ``m / (2^(bits-1) - 1)``, and one level more lies below 0.

    >>> low, high = symmetric_range(torch.tensor(-7.0), torch.tensor(3.0), 4)
    >>> [value.item() for value in (low, high, *qparams(low, high, 4))]
    [-8.0, 7.0, 1.0, 8.0]
    """
    half = 2.0 ** (bits - 1)
    top = torch.maximum(high, -low)
    return -top * (half / (half - 1)), top


def qparams(low: Tensor, high: Tensor, bits: int, floor: float = SCALE_FLOOR, clamp_zero_point: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point that map ``low … high`` to ``0 … 2^bits - 1``.

    Args:
        low, high: same shape, any.
        floor: smallest scale; beyond 8 bits, for which nothing is published, it shrinks with the levels: the range has the same floor.
        clamp_zero_point: widen the range to contain 0, so that the zero point is one of the integers; the published
            quantizer does not.
    Returns:
        scale and zero point (whole numbers in floating point), shaped as `low`.
    """
    if clamp_zero_point:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / levels(bits)).clamp_min(floor * min(1.0, levels(8) / levels(bits)))
    return scale, torch.round(-low / scale)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Integers of `x` (:func:`storage`), shaped as `x`; `scale` and `zero_point` broadcast."""
    return (torch.round(x / scale) + zero_point).clamp_(0, levels(bits)).to(storage(bits))


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values of the integers `q`, in the dtype of `scale`."""
    return (q.to(scale.dtype) - zero_point) * scale


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize; the gradient is the identity strictly inside the clamp and zero elsewhere.

    As in the reference data the two outermost levels pass no gradient either. In a residual layer the gradients of branch and
    residual cancel except where the residual's are cut off, so this detail is most of the gradient of L1 and L2.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
        q = torch.round(x / scale).add_(zero_point)
        ctx.save_for_backward((q > 0) & (q < top))
        return q.clamp_(0, top).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """`x` rounded to the values that the quantizer can represent.

    The rounding passes gradients straight through; values at or beyond the outermost levels pass none; scale and zero point get none.
    """
    result: Tensor = _FakeQuantize.apply(x, scale, zero_point, levels(bits))  # type: ignore[no-untyped-call]
    return result


def round_to_grid(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, overwrite: bool = False) -> Tensor:
    """:func:`fake_quantize` without gradients; `overwrite` reuses the memory of `x`.

    ``clamp(round(x/s) + z, 0, n) - z`` equals ``clamp(round(x/s), -z, n - z)`` because all of them are whole numbers; the bounds of one
    quantizer over the whole tensor are passed as Python numbers, with which `clamp` is four times as fast on a CPU.
    """
    q = x.div_(scale) if overwrite else x.div(scale)
    q.round_()
    if zero_point.numel() == 1:
        offset = float(zero_point)
        q.clamp_(-offset, levels(bits) - offset)
    else:
        q.clamp_(-zero_point, levels(bits) - zero_point)
    return q.mul_(scale)
