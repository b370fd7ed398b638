"""Fast rotations against the dense matrix in float64, from both sides and in both layouts."""

from __future__ import annotations

import math

import pytest
import torch

from qvsr.kernels.rotate import rotate
from qvsr.quant.layer import LayerPlan, QuantLayer
from qvsr.quant.rotation import can_rotate, factors, hadamard, random_signs, rotation_from_signs, small_factors

SIZES = (2, 12, 160, 256, 320, 480, 640)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("grad", [False, True])
def test_products_of_small_factors_are_the_dense_one(n: int, grad: bool) -> None:
    signs = random_signs(n, 0)
    matrix, thin = rotation_from_signs(signs, torch.float64), [hadamard(size).double() for size in small_factors(n)]
    generator = torch.Generator().manual_seed(0)
    tokens, maps = torch.randn(2, 300, n, dtype=torch.float64, generator=generator), torch.randn(2, n, 3, 4, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        for left, expected in ((False, tokens @ matrix), (True, tokens @ matrix.T)):
            assert (rotate(tokens, thin, signs.double(), left, False) - expected).abs().max() < 1e-13
        expected = torch.einsum("jk,bkhw->bjhw", matrix, maps)
        assert (rotate(maps, thin, signs.double(), True, True) - expected).abs().max() < 1e-13


@pytest.mark.parametrize("n", [n for n in range(1, 700) if can_rotate(n)])
def test_a_matrix_is_the_kronecker_product_of_its_small_factors(n: int) -> None:
    product = torch.ones(1, 1, dtype=torch.int8)
    for size in small_factors(n):
        product = torch.kron(product, hadamard(size))
    assert torch.equal(product, hadamard(n))
    assert n & (n - 1) or n == 1 or set(small_factors(n)) == {2}


@pytest.mark.parametrize("n", [320, 512])
def test_the_matrix_of_a_large_size_is_the_product_of_two(n: int) -> None:
    left, right = factors(n) or (0, 0)
    assert left * right == n and min(left, right) >= math.isqrt(n) // 2
    assert torch.equal(hadamard(n), torch.kron(hadamard(left), hadamard(right)))


@pytest.mark.parametrize("make", [lambda: torch.nn.Linear(640, 8), lambda: torch.nn.Conv2d(640, 8, 3, padding=1)], ids=["linear", "conv2d"])
def test_a_layer_with_large_parts_rotates_fast_and_has_no_matrix(make) -> None:
    """What is rotated cancels out, so the layer is the original one but for 8 bits' rounding."""
    torch.manual_seed(0)
    module = make().requires_grad_(False)
    x = torch.randn(3, 640) if isinstance(module, torch.nn.Linear) else torch.randn(1, 640, 5, 4)
    layer = QuantLayer.from_float(module, LayerPlan(8, 8, (320, 320), rotate=True))
    assert layer.rotation_0 is None and layer.describe()["hadamard"] == "small products"
    with torch.no_grad():
        assert (layer(x) - module(x)).norm() < 0.02 * module(x).norm()
        layer.freeze()
        facts, state = layer.describe(), layer.state()
        assert torch.equal(QuantLayer.from_state(layer.geometry, facts, state)(x), layer(x))
    del facts["hadamard"]
    with pytest.raises(ValueError, match="layer: its file was made with other Hadamard matrices for parts of \\(320, 320\\) channels"):
        QuantLayer.from_state(layer.geometry, facts, state)
