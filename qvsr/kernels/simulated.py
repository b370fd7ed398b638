"""Simulated layers: the integers of :mod:`qvsr.kernels.ops` as floating-point numbers, multiplied by PyTorch's own operators.

Inputs and weights are whole numbers, ``q - zero_point``, so that products and sums are exact in float32 below 2^24 and scales come
afterwards (:mod:`qvsr.kernels.finish`), as in packed execution. At 8 bits the largest sum conceivable of a layer of 2880 inputs is beyond that, but
those of real layers stay far below: terms of both signs cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qvsr.kernels.finish import Output, blocks, column, of_outputs
from qvsr.kernels.native import Sums
from qvsr.kernels.reference import CONVOLUTIONS, output_shape


def matmul(
    q: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    weights: Sequence[Tensor],
    weight_scale: Tensor,
    bias: Tensor | None,
    thin: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``qvsr::matmul_packed`` with weights as whole numbers in float32, ``(N, K)`` a part."""
    outside, count = q[0].shape[:-1], len(weight_scale)
    rows = [part.reshape(-1, part.shape[-1]) for part in q]
    ranges = [[column(values, outside) for values in pair] for pair in zip(scale, zero_point, strict=True)]
    steps = [step.contiguous() for step in weight_scale.unbind(1)]
    y = Output(len(rows[0]), weight_scale, bias, thin, up, dtype)
    for m in blocks(len(y.values), count):
        sums = []
        for part, weight in enumerate(weights):
            s, z = (values[m] if values.dim() else values for values in ranges[part])
            sums.append(Sums(F.linear(rows[part][m].to(weight.dtype).sub_(z.unsqueeze(-1)), weight), steps[part], s))
        y.finish(m, sums)
    return y.values.view(*outside, count)


def conv(
    q: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    weights: Sequence[Tensor],
    weight_scale: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    bias: Tensor | None,
    thin: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``qvsr::conv_packed`` with weights as whole numbers in float32, ``(N, K, *kernel)`` a part."""
    frames, count = q[0].shape[0], len(weight_scale)
    shape = output_shape(q[0].shape[1:-1], kernel, stride, padding, dilation)
    positions = math.prod(shape)
    steps = [step.contiguous() for step in weight_scale.unbind(1)]
    y = Output(frames * positions, weight_scale, bias, thin, up, dtype)
    for m in blocks(frames, count * positions):
        rows = slice(m.start * positions, m.stop * positions)
        sums = []
        for part, weight in enumerate(weights):
            s, z = (values[m] if values.dim() else values for values in (scale[part], zero_point[part]))
            # the zeros of the padding are zeros, whatever the zero point
            maps = q[part][m].to(weight.dtype).sub_(z.view(*z.shape, *(1,) * (q[part].dim() - z.dim())) if z.dim() else z).movedim(-1, 1)
            total = CONVOLUTIONS[len(kernel)](maps, weight, None, tuple(stride), tuple(padding), tuple(dilation)).movedim(1, -1)
            sums.append(Sums(total.reshape(-1, count), steps[part], of_outputs(s, total.shape[:-1], stride, padding)))
        y.finish(rows, sums)
    return y.values.view(frames, *shape, count)
