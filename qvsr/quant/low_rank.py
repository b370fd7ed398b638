"""The low-rank branch: two thin layers beside the low-bit one (SVDQuant, arXiv 2411.05007; QuantVSR, arXiv 2508.04485).

A weight ``(N, K, *kernel)`` seen as a matrix ``(N, K·taps)`` is approximated by L1 @ L2 with L1 ``(N, R)`` and L2 ``(R, K·taps)``. The branch is a
layer K -> R with the kernel of the original, then one R -> N without a kernel: the product L1 @ L2 is never applied as a dense layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGE = 512  # smaller side of a matrix from which the decomposition goes by its Gram matrix


def rank_limit(weight: Tensor) -> int:
    """Largest rank that the weight, seen as a matrix (outputs, inputs·taps), can have."""
    return min(weight.shape[0], weight[0].numel())


def svd_init(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of a weight with the given rank.

    Large weights go by :func:`gram_init`: a layer of 1280 channels with 9 taps takes a second of one core instead of ten.

    Args:
        weight: ``(N, K, *kernel)``.
        rank: 1 … ``rank_limit(weight)``.
    Returns:
        L1 ``(N, R)`` = U_R S_R and L2 ``(R, K, *kernel)`` = V_R^T, in the weight's dtype.
    Raises:
        ValueError: a rank that the weight cannot have.
    """
    _check_rank(weight, rank)
    if min(weight.shape[0], weight[0].numel()) >= LARGE:
        l1, l2 = (values.flip(dim) for values, dim in zip(gram_init(weight, rank), (1, 0), strict=True))  # largest first
        if weight.shape[0] > weight[0].numel():
            return l1.contiguous(), l2.contiguous()
        s = l2.flatten(1).norm(dim=1)
        rows = l2.flatten(1) / s[:, None].clamp_min(torch.finfo(s.dtype).tiny)
        return (l1 * s).contiguous(), rows.view_as(l2).contiguous()
    u, s, vh = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
    return (u[:, :rank] * s[:rank]).contiguous(), vh[:rank].reshape(rank, *weight.shape[1:]).contiguous()


def product(l1: Tensor, l2: Tensor) -> Tensor:
    """The dense weight ``(N, K, *kernel)`` that the branch stands for; for the residual and for tests, not for execution."""
    return (l1 @ l2.flatten(1)).view(l1.shape[0], *l2.shape[1:])


def gram_init(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """:func:`svd_init` by the eigenvectors of ``W W^T`` (or ``W^T W`` where that is smaller) in float64: the same product, 3 to 13 times as fast.

    For searches that decompose a weight dozens of times. Squaring costs accuracy only in singular values below 1e-8 of the largest.

    Args:
        weight, rank: as of :func:`svd_init`.
    Returns:
        L1 ``(N, R)`` and L2 ``(R, K, *kernel)`` in the weight's dtype; the smaller side has orthonormal vectors.
    Raises:
        ValueError: a rank that the weight cannot have.
    """
    _check_rank(weight, rank)
    matrix = weight.detach().flatten(1).double()
    tall = matrix.shape[0] > matrix.shape[1]
    vectors = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T).eigenvectors[:, -rank:]
    l1, l2 = (matrix @ vectors, vectors.T) if tall else (vectors, vectors.T @ matrix)
    return l1.to(weight.dtype).contiguous(), l2.reshape(rank, *weight.shape[1:]).to(weight.dtype).contiguous()


def _check_rank(weight: Tensor, rank: int) -> None:
    limit = rank_limit(weight)
    if not 1 <= rank <= limit:
        raise ValueError(f"rank {rank} is not between 1 and {limit}, the limit of a weight {tuple(weight.shape)}")
