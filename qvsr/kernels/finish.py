"""From whole-number sums to a layer's output: what simulated and packed execution share behind their products.

    y = bias + L1 thin + sum_1 * (step_1 * scale_1) + sum_2 * (step_2 * scale_2) + ...,    a part each

in float32, from left to right, each product and each sum rounded. A sum below 2^24 is a whole number that float32 holds exactly, in
whatever order and arithmetic it was added up: so both executions give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qvsr.kernels import native
from qvsr.kernels.native import Sums

BLOCK = 2**20  # sums at a time: 4 MB, which a cache holds


class Output:
    """A layer's output ``(M, N)``, filled a block of rows and columns at a time.

    Args:
        like: a tensor of N rows on the output's device.
        bias: ``(N,)``; thin: the input after the branch's first layer, M vectors of R; up: ``(N, R)``.
        dtype: of the output, rounded once, at the end; None: float32.
    """

    def __init__(
        self, positions: int, like: Tensor, bias: Tensor | None, thin: Tensor | None, up: Tensor | None, dtype: torch.dtype | None = None
    ) -> None:
        shape, dtype = (positions, len(like)), dtype or torch.float32
        self.values = native.empty(*shape, dtype=dtype) if like.device.type == "cpu" else like.new_empty(shape, dtype=dtype)
        self.bias = bias
        self.thin = None if thin is None else thin.reshape(positions, -1)
        self.up = None if up is None else up.T.contiguous()

    def finish(self, m: slice, parts: Sequence[Sums], n: slice = slice(None)) -> None:
        """Write rows m and columns n from the sums of all parts there."""
        out, bias = self.values[m, n], None if self.bias is None else self.bias[n]
        thin, up = None if self.thin is None else self.thin[m], None if self.up is None else self.up[:, n]
        # three-dimensional convolutions may put channels first
        parts = [part if part.sums.stride(1) == 1 else part._replace(sums=part.sums.contiguous()) for part in parts]
        if out.device.type == "cpu" and native.library() is not None and out.dtype != torch.float16:
            native.finish(out, bias, thin, up, parts)
            return
        whole, out = out, torch.empty_like(out, dtype=torch.float32)
        out[:] = 0.0 if bias is None else bias
        if thin is not None and up is not None:
            out += thin @ up
        for part in parts:
            sums = part.sums
            if sums.dtype == torch.int32:
                assert part.zero_point is not None and part.total is not None
                sums = sums - part.zero_point.view(-1, 1) * part.total
            values = sums.float()
            if part.rest is not None and part.inputs is not None:
                values = values + part.rest.float() * part.inputs[:, None]
            out += values * (part.step * part.scale.view(-1, 1))
        whole.copy_(out)


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Rows of up to `BLOCK` values, at least one."""
    step = max(1, BLOCK // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def spread(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Values of the leading axes of `shape` over all of it: one for all, one a frame, or one a token."""
    return values.view(*values.shape, *(1,) * (len(shape) - values.dim())).expand(tuple(shape))


def column(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Scales or zero points: one number, or one a row of the matrix whose rows `shape` counts."""
    return values if values.dim() == 0 else spread(values, shape).reshape(-1).contiguous()


def of_outputs(values: Tensor, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """:func:`column` of a convolution's input for its output, of which `shape` counts the positions.

    Values of pixels belong to kernels of one tap; at a padded pixel the sum is 0 and its scale is of no account.
    """
    if values.dim() > 1:
        if any(padding):
            values = F.pad(values, [size for size in reversed(padding) for _ in range(2)])
        values = values[(slice(None), *(slice(None, None, step) for step in stride))]
    return column(values, shape)
