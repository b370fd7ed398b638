"""The branch against NumPy's SVD in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qvsr.quant.low_rank import product, rank_limit, svd_init


@pytest.mark.parametrize("shape", [(12, 20), (8, 6, 3, 3), (6, 4, 3, 1, 1), (6, 5, 3)])
def test_best_approximation(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = np.linalg.svd(weight.flatten(1).double().numpy(), full_matrices=False)
    for rank in (1, 3, rank_limit(weight)):
        l1, l2 = svd_init(weight, rank)
        assert l1.shape == (shape[0], rank) and l2.shape == (rank, *shape[1:])
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
        np.testing.assert_allclose(product(l1, l2).flatten(1), expected, atol=1e-5)  # float32 SVD of values of order 1


@pytest.mark.parametrize("rank", [0, 7])
def test_rank_above_the_limit_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} is not between 1 and 6, the limit of a weight \(6, 8\)"):
        svd_init(torch.randn(6, 8), rank)
