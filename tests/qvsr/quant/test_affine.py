"""Quantizers against PyTorch's own fake quantization and against arithmetic in float64."""

from __future__ import annotations

import pytest
import torch

from qvsr.quant import affine


@pytest.mark.parametrize("bits", range(2, 9))
def test_per_channel_equals_torch(bits: int) -> None:
    """With 0 inside the range the zero point is an integer of the quantizer, and PyTorch's operator does the same."""
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(bits))
    scale, zero_point = affine.qparams(*affine.channel_range(x), bits, clamp_zero_point=True)
    expected = torch.fake_quantize_per_channel_affine(x, scale.flatten(), zero_point.flatten().int(), 0, 0, 2**bits - 1)
    found = affine.fake_quantize(x, scale, zero_point, bits)
    # PyTorch multiplies by 1/scale: a value within float rounding of a half may go the other way
    assert ((found - expected).abs() > 1e-6).float().mean() < 0.01
    assert torch.allclose(found, expected, atol=float(scale.max()) * 1.001)


@pytest.mark.parametrize("bits", range(2, 9))
def test_error_is_at_most_half_a_step_in_float64(bits: int) -> None:
    x = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    scale, zero_point = affine.qparams(*affine.channel_range(x), bits)
    q = affine.quantize(x, scale, zero_point, bits)
    assert q.dtype == torch.uint8 and int(q.max()) <= 2**bits - 1
    # the zero point is rounded too, so the outermost values can be clamped by half a step more
    assert ((affine.dequantize(q, scale, zero_point) - x).abs() <= scale * (1 + 1e-9)).all()
    assert torch.equal(affine.dequantize(q, scale, zero_point), affine.fake_quantize(x, scale, zero_point, bits))


def test_zero_point_is_not_clamped_unless_asked() -> None:
    low, high = torch.tensor(3.0), torch.tensor(4.5)
    scale, zero_point = affine.qparams(low, high, 4)
    assert scale.item() == pytest.approx(0.1) and zero_point.item() == -30
    scale, zero_point = affine.qparams(low, high, 4, clamp_zero_point=True)
    assert scale.item() == pytest.approx(0.3) and zero_point.item() == 0


def test_scale_floor() -> None:
    scale, _ = affine.qparams(torch.tensor(0.0), torch.tensor(1e-6), 8)
    assert scale.item() == pytest.approx(1e-4)
    scale, _ = affine.qparams(torch.tensor(0.0), torch.tensor(1e-6), 8, floor=1e-12)
    assert scale.item() == pytest.approx(1e-6 / 255)


@pytest.mark.parametrize("shape", [(5, 7), (1,), (2, 3, 4, 5)])
def test_fast_form_equals_the_differentiable_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 5 + 7
    scale, zero_point = affine.qparams(*affine.tensor_range(x), 4)
    expected = affine.fake_quantize(x, scale, zero_point, 4)
    assert torch.equal(affine.round_to_grid(x, scale, zero_point, 4), expected)
    assert torch.equal(affine.round_to_grid(x.clone(), scale, zero_point, 4, overwrite=True), expected)


def test_gradient_passes_inside_only_and_not_to_scale() -> None:
    x = torch.tensor([-100.0, -0.5, 0.0, 0.5, 100.0], requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    affine.fake_quantize(x, scale, torch.tensor(7.0), 4).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]
    assert scale.grad is None


def test_sixteen_bits_have_the_published_floor_of_the_range_not_of_the_step() -> None:
    """1e-4 is a smallest step of 8 bits and fewer; at 16 it would be coarser than the range over the levels asks for."""
    low, high = torch.tensor([0.0, -0.01]), torch.tensor([6.0, 0.01])
    assert torch.equal(affine.qparams(low, high, 8)[0], torch.tensor([6 / 255, 1e-4]))
    assert torch.allclose(affine.qparams(low, high, 16)[0], torch.tensor([6 / 65535, 1e-4 / 257]))  # 65535 = 257 * 255
    x = torch.linspace(0, 6, 1001)
    assert (affine.round_to_grid(x, *affine.qparams(x.min(), x.max(), 16), 16) - x).abs().max() < 0.51 * 6 / 65535
    assert affine.quantize(x, *affine.qparams(x.min(), x.max(), 16), 16).max() == 65535


@pytest.mark.parametrize("bits", [1, 9, 15, 17])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits cannot be quantized to: 2 to 8 can"):
        affine.qparams(torch.zeros(1), torch.ones(1), bits)
