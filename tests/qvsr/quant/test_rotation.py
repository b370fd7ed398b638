"""Hadamard matrices against SciPy and against their definition, in integers and float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from qvsr.quant.rotation import HadamardError, can_rotate, hadamard, random_signs, rotation

# halves of the input channels of the published U-Net's layers, and of the small one's
PUBLISHED = (64, 128, 160, 320, 480, 512, 640, 960, 1280, 2560)
SMALL = (8, 12, 16, 20, 24, 28, 32, 36, 48, 60, 72, 96, 144, 192)


@pytest.mark.parametrize("n", [1, 2, 4, 32, 256])
def test_powers_of_two_are_sylvesters(n: int) -> None:
    assert np.array_equal(hadamard(n).numpy(), scipy.linalg.hadamard(n))


@pytest.mark.parametrize("n", PUBLISHED + SMALL)
def test_rows_are_orthogonal(n: int) -> None:
    h = hadamard(n).to(torch.float64)
    assert h.abs().min() == 1 and torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))  # whole numbers: exact


@pytest.mark.parametrize("n", [16, 20, 96])
def test_rotation_is_exact_in_float64(n: int) -> None:
    rot = rotation(n, seed=1, dtype=torch.float64)
    x, w = (torch.randn(9, n, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    assert (rot @ rot.T - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-14
    assert ((x @ rot) @ (w @ rot).T - x @ w.T).abs().max() < 1e-13


@pytest.mark.parametrize("n", [3, 6, 52])
def test_a_size_without_a_matrix_is_not_rotated(n: int) -> None:
    assert not can_rotate(n) and torch.equal(rotation(n, seed=0), torch.eye(n))
    with pytest.raises(HadamardError, match=f"no Hadamard matrix of size {n} can be built"):
        hadamard(n)


def test_signs_depend_on_seed_and_name_only() -> None:
    torch.manual_seed(5)
    first = random_signs(64, 0, "a")
    torch.manual_seed(6)
    assert torch.equal(first, random_signs(64, 0, "a")) and set(first.tolist()) == {-1, 1}
    assert not torch.equal(first, random_signs(64, 1, "a")) and not torch.equal(first, random_signs(64, 0, "b"))
