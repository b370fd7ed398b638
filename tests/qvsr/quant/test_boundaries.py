"""The quantizer with trained bounds: forward as the plain quantizer, gradients against autograd through straight-through rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qvsr.quant import affine
from qvsr.quant.boundaries import Trained, bounded_quantize


def straight_through(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


def by_autograd(x: Tensor, low: Tensor, high: Tensor, bits: int, floor: float) -> Tensor:
    """The definition, each rounding straight through; what is cut off is replaced by the bound, so it passes nothing to x."""
    top = 2**bits - 1
    scale = torch.where((high - low) / top > floor, (high - low) / top, torch.full_like(low, floor))
    zero = straight_through(-low / scale)
    q = straight_through(x / scale) + zero
    q = torch.where(q < 0, torch.zeros_like(q), torch.where(q > top, torch.full_like(q, top), q))
    return (q - zero) * scale


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(), (6, 1, 1), (1, 5, 1)], ids=["tensor", "rows", "columns"])
def test_gradients_are_those_of_straight_through_rounding(bits: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = 2 * torch.randn(6, 5, 40, dtype=torch.float64, generator=generator)
    low = -0.5 - torch.rand(shape, dtype=torch.float64, generator=generator)
    high = 0.5 + 2 * torch.rand(shape, dtype=torch.float64, generator=generator)
    weight = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    found, expected = [], []
    for quantize, gradients in ((bounded_quantize, found), (by_autograd, expected)):
        inputs = [tensor.clone().requires_grad_(True) for tensor in (x, low, high)]
        y = quantize(*inputs, bits, 1e-4)
        gradients += [y.detach(), *torch.autograd.grad((y * weight).sum(), inputs)]
    assert (found[0] == found[0].amin()).any() and (x > found[0].amax()).any(), "some are cut off on either side"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_cut_off_value_moves_its_own_bound_by_one() -> None:
    """Bounds on the grid, so that nothing is lost by rounding the zero point: the derivative of clip itself."""
    low, high = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-3.0, 12.0))
    for value, expected in ((20.0, (0.0, 1.0)), (-9.0, (1.0, 0.0))):
        gradients = torch.autograd.grad(bounded_quantize(torch.tensor(value, dtype=torch.float64), low, high, 4), (low, high))
        assert tuple(gradient.item() for gradient in gradients) == expected


def test_forward_is_the_plain_quantizer() -> None:
    x = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    low, high = affine.channel_range(x)
    low = 0.7 * low
    assert torch.equal(bounded_quantize(x, low, high, 4), affine.fake_quantize(x, *affine.qparams(low, high, 4), 4))


def test_at_the_floor_of_the_scale_only_the_zero_point_moves() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    low, high = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-0.01, 0.01))
    gradients = torch.autograd.grad(bounded_quantize(x, low, high, 4, floor=0.5).sum(), (low, high))
    assert [gradient.item() for gradient in gradients] == [
        1.0,
        0.0,
    ]  # of the levels 0, 0.5 … 7.5 only the -1, cut off, tells `low` anything
    assert bounded_quantize(x, low, high, 4, floor=0.5).tolist() == [0.0, 0.0, 1.0]


def test_bounds_that_are_three_times_too_wide_close_in() -> None:
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    bounds = [Trained(torch.tensor(value), torch.tensor(6.0)) for value in (-3.0, 3.0)]
    parameters = [bound.parameter.requires_grad_(True) for bound in bounds]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        (bounded_quantize(x, bounds[0](), bounds[1](), 4) - x).pow(2).mean().backward()
        optimizer.step()
    error = (bounded_quantize(x, bounds[0](), bounds[1](), 4) - x).pow(2).mean().item()
    assert error < 1.2 * (2 / 15) ** 2 / 12  # a uniform distribution's, with bounds at its ends
    assert bounds[0]().item() == pytest.approx(-1, abs=0.1) and bounds[1]().item() == pytest.approx(1, abs=0.1)


def test_a_unit_scales_the_step_and_not_the_value() -> None:
    value, unit = torch.tensor([0.1, 10.0]), torch.tensor([0.1, 10.0])
    for trained, steps in ((Trained(value), torch.tensor([0.01, 0.01])), (Trained(value, unit), 0.01 * unit)):
        assert torch.equal(trained(), value)
        parameter = trained.parameter.requires_grad_(True)
        optimizer = torch.optim.Adam([parameter], lr=0.01)
        trained().sum().backward()
        optimizer.step()
        torch.testing.assert_close(value - trained(), steps, rtol=1e-3, atol=1e-6)
