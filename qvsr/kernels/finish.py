"""From whole-number sums to a layer's output: what simulated and packed execution share behind their products.

    y = (bias + L1 thin) + sum_1 * (step_1 * scale_1) + sum_2 * (step_2 * scale_2) + ...,    a part each

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


def begin(positions: int, thin: Tensor | None, up: Tensor | None, bias: Tensor | None, like: Tensor) -> tuple[Tensor, bool]:
    """An output ``(M, N)`` like `like` ``(N, …)``, and whether it holds the branch and the bias already; else nothing."""
    y = native.empty(positions, len(like)) if like.device.type == "cpu" else like.new_empty(positions, len(like))
    if thin is None or up is None:
        return y, False
    left = thin.reshape(positions, -1)
    return (torch.mm(left, up.T, out=y) if bias is None else torch.addmm(bias, left, up.T, out=y)), True


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


def finish(out: Tensor, add: bool, bias: Tensor | None, parts: Sequence[Sums]) -> None:
    """Scale a block of sums, part after part, and add it to what is there: the output itself if `add`, else the bias.

    Args:
        out: float32 ``(M, N)``, rows contiguous.
    """
    # three-dimensional convolutions may put channels first
    parts = [part if part.sums.stride(1) == 1 else part._replace(sums=part.sums.contiguous()) for part in parts]
    if out.device.type == "cpu" and native.library() is not None:
        native.finish(out, add, bias, parts)
        return
    for index, part in enumerate(parts):
        sums = part.sums
        if sums.dtype == torch.int32:
            assert part.zero_point is not None and part.total is not None
            sums = sums - part.zero_point.view(-1, 1) * part.total
        values = sums.float()
        if part.rest is not None and part.inputs is not None:
            values = values + part.rest.float() * part.inputs[:, None]
        values = values * (part.step * part.scale.view(-1, 1))
        if add or index:
            out += values
        else:
            torch.add(values, 0.0 if bias is None else bias, out=out)
