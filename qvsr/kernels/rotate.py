"""Rotations of channels: one dense product, or two thin ones where the matrix is a Kronecker product.

A Hadamard matrix ``A (x) B`` of size a·b takes a + b multiplications a value instead of a·b. At size 640 that is 5 to 10 times as fast on a
CPU, at 160 no faster: the products become too thin (measured, one thread). Layers that are open for a method rotate with this function, and
frozen ones where there is no faster one (:mod:`qvsr.kernels.native`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

FAST = 256  # channels from which on two thin products are faster than a dense one
BLOCK = 2**17  # values of a block of tokens: both products of it stay in a core's cache


def rotate(x: Tensor, matrices: Sequence[Tensor], signs: Tensor | None, left: bool, channels_first: bool) -> Tensor:
    """``x @ R`` (right) or ``R @ c`` for every channel vector c (left) with ``R = diag(signs) (A (x) B)``.

    Args:
        x: ``(…, n)``, or ``(B, n, …)`` with `channels_first`, of one part.
        matrices: R itself; or, with signs, matrices of +-1 whose Kronecker product over sqrt(n) is A (x) B.
        signs: ``(n,)`` in the type of `x`; None: contained in R.
        left: as convolutions are rotated; linear layers are rotated from the right, channels last.
    Returns:
        a new tensor, shaped as `x`, contiguous.
    """
    if signs is not None:
        matrices = _grouped(tuple(matrices), x.dtype)
    if len(matrices) == 1:
        matrix = matrices[0] if signs is None else signs[:, None] * matrices[0]
        if channels_first:
            return torch.matmul(matrix, x.flatten(2)).view(x.shape)
        return x @ (matrix.T if left else matrix)
    first, second = matrices
    assert signs is not None, "factors leave out the signs"
    a, b = first.shape[0], second.shape[0]
    if channels_first:
        batch, maps = x.shape[0], x[0, 0].numel()
        y = torch.matmul(first, x.reshape(batch, a, b * maps))
        y = torch.matmul(second, y.view(batch * a, b, maps)).view(batch, a * b, maps)
        y = y * signs[:, None] if torch.is_grad_enabled() else y.mul_(signs[:, None])
        return y.view(x.shape)
    rows = x.reshape(-1, a * b)
    if torch.is_grad_enabled():
        return _rows(rows, first, second, signs, left).view(x.shape)
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    step = max(1, BLOCK // (a * b)) if x.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), step):
        _rows(rows[start : start + step], first, second, signs, left, out[start : start + step])
    return out.view(x.shape)


@lru_cache(maxsize=128)
def _grouped(factors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """One matrix below `FAST` channels, else two of about equal size, orthogonal together."""
    sizes = [len(factor) for factor in factors]
    n = math.prod(sizes)
    cut = 0
    if n >= FAST and len(factors) > 1:
        cut = min(range(1, len(factors)), key=lambda cut: math.prod(sizes[:cut]) + math.prod(sizes[cut:]))
    groups = [factors[:cut], factors[cut:]] if cut else [factors]
    built = []
    for group in groups:
        matrix = group[0].to(dtype)
        for factor in group[1:]:
            matrix = torch.kron(matrix, factor.to(dtype))
        built.append(matrix)
    built[-1] = built[-1] / math.sqrt(n)
    return built


def _rows(x: Tensor, first: Tensor, second: Tensor, signs: Tensor, left: bool, out: Tensor | None = None) -> Tensor:
    """Rows ``(M, a·b)`` times R, or times its transpose."""
    a, b = first.shape[0], second.shape[0]
    if left:
        return torch.mul(torch.matmul(first, (x.reshape(-1, b) @ second.T).view(-1, a, b)).view(x.shape), signs, out=out)
    y = ((x * signs).view(-1, b) @ second).view(-1, a, b)
    return torch.matmul(first.T, y, out=None if out is None else out.view(-1, a, b)).view(x.shape)
