"""The low-rank branch: two thin layers beside the low-bit one (SVDQuant, arXiv 2411.05007; QuantVSR, arXiv 2508.04485).

A weight ``(N, K, *kernel)`` seen as a matrix ``(N, K·taps)`` is approximated by L1 @ L2 with L1 ``(N, R)`` and L2 ``(R, K·taps)``. The branch is a
layer K -> R with the kernel of the original, then one R -> N without a kernel: the product L1 @ L2 is never applied as a dense layer.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rank_limit(weight: Tensor) -> int:
    """Largest rank that the weight, seen as a matrix (outputs, inputs·taps), can have."""
    return min(weight.shape[0], weight[0].numel())


def svd_init(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of a weight with the given rank.

    Args:
        weight: ``(N, K, *kernel)``.
        rank: 1 … ``rank_limit(weight)``.
    Returns:
        L1 ``(N, R)`` = U_R S_R and L2 ``(R, K, *kernel)`` = V_R^T, in the weight's dtype.
    Raises:
        ValueError: a rank that the weight cannot have.
    """
    limit = rank_limit(weight)
    if not 1 <= rank <= limit:
        raise ValueError(f"rank {rank} is not between 1 and {limit}, the limit of a weight {tuple(weight.shape)}")
    u, s, vh = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
    return (u[:, :rank] * s[:rank]).contiguous(), vh[:rank].reshape(rank, *weight.shape[1:]).contiguous()


def product(l1: Tensor, l2: Tensor) -> Tensor:
    """The dense weight ``(N, K, *kernel)`` that the branch stands for; for the residual and for tests, not for execution."""
    return (l1 @ l2.flatten(1)).view(l1.shape[0], *l2.shape[1:])
