"""The branch against NumPy's SVD in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qvsr.quant import low_rank
from qvsr.quant.low_rank import gram_init, product, rank_limit, svd_init


@pytest.mark.parametrize("shape", [(12, 20), (8, 6, 3, 3), (6, 4, 3, 1, 1), (6, 5, 3)])
def test_best_approximation(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = np.linalg.svd(weight.flatten(1).double().numpy(), full_matrices=False)
    for rank in (1, 3, rank_limit(weight)):
        l1, l2 = svd_init(weight, rank)
        assert l1.shape == (shape[0], rank) and l2.shape == (rank, *shape[1:])
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
        np.testing.assert_allclose(product(l1, l2).flatten(1), expected, atol=1e-5)  # float32 SVD of values of order 1


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (8, 6, 3, 3)])
def test_a_large_weight_has_the_same_factors(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, vh = np.linalg.svd(weight.flatten(1).double().numpy(), full_matrices=False)
    monkeypatch.setattr(low_rank, "LARGE", 4)
    l1, l2 = svd_init(weight, 5)
    np.testing.assert_allclose(product(l1, l2).flatten(1), (u[:, :5] * s[:5]) @ vh[:5], atol=1e-5)
    np.testing.assert_allclose(l1.norm(dim=0), s[:5], rtol=1e-5)  # U S, the largest first, and orthonormal V
    np.testing.assert_allclose(l2.flatten(1) @ l2.flatten(1).T, np.eye(5), atol=1e-5)
    assert l1.is_contiguous() and l2.is_contiguous()
    dead, rows = svd_init(torch.zeros(shape), 5)
    assert not dead.any() and bool(rows.isfinite().all())


@pytest.mark.parametrize("rank", [0, 7])
def test_rank_above_the_limit_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} is not between 1 and 6, the limit of a weight \(6, 8\)"):
        svd_init(torch.randn(6, 8), rank)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 4, 3, 3), (40, 4, 3)])
def test_the_gram_matrix_gives_the_same_product(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    l1, l2 = gram_init(weight, 4)
    assert l1.shape == (shape[0], 4) and l2.shape == (4, *shape[1:]) and l1.dtype == l2.dtype == torch.float32
    u, s, vt = np.linalg.svd(weight.double().flatten(1).numpy(), full_matrices=False)
    expected = (u[:, :4] * s[:4]) @ vt[:4]
    np.testing.assert_allclose(product(l1, l2).flatten(1).numpy(), expected, atol=1e-5)  # float32 factors
    with pytest.raises(ValueError, match="rank 99 is not between 1 and"):
        gram_init(weight, 99)
