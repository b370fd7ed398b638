"""Trainable input steps against the quantized layer and against the gradient written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer
from qvsr.quant.lsq import InputStep, learn_steps, rounded_inputs
from qvsr.quant.reconstruct import Unit, UnitCall


def test_input_steps_round_as_the_layer_does() -> None:
    """And their gradient is that of the formula in float64."""
    module = nn.Conv2d(6, 4, 3, padding=1).requires_grad_(False)
    layer = QuantLayer.from_float(module, LayerPlan(8, 4, (2, 4)), "c")
    layer.set_static_activations(torch.tensor([[-1.0, -0.5]]), torch.tensor([[1.5, 2.0]]))
    step = InputStep(layer)
    x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(step(x), torch.cat(layer.quantized_inputs(x), 1))
        with rounded_inputs({"c": module}, {"c": step}):
            out = module(x)
        assert torch.allclose(out, nn.functional.conv2d(step(x), module.weight, module.bias, padding=1))
        assert not torch.allclose(out, module(x), atol=1e-3)
    step.step.requires_grad_(True)
    step(x).sum().backward()
    for part, piece in enumerate(x.double().split((2, 4), 1)):
        s, z = layer.act_scale[0, part].double(), layer.act_zero_point[0, part].double()
        q = torch.round(piece / s) + z
        inside = (q >= 0) & (q <= 15)
        expected = torch.where(inside, torch.round(piece / s) - piece / s, q.clamp(0, 15) - z).sum()
        assert step.step.grad[part].item() == pytest.approx(expected.item(), rel=1e-4)


def test_steps_stay_above_the_smallest_scale() -> None:
    layer = QuantLayer.from_float(nn.Linear(4, 4), LayerPlan(4, 4, scale_floor=0.01), "a")
    layer.set_static_activations(torch.tensor([[-1.0]]), torch.tensor([[1.0]]))
    step = InputStep(layer)
    step.step.data.fill_(-3.0)
    step.give()
    assert layer.act_scale.tolist() == [[pytest.approx(0.01)]]


def learned(learning_rate: float) -> tuple[InputStep, float, float]:
    """A layer whose range is three times too wide, trained on its own full-precision output."""
    torch.manual_seed(0)
    module = nn.Linear(8, 4).requires_grad_(False)
    layer = QuantLayer.from_float(module, LayerPlan(8, 4), "a")
    layer.set_static_activations(torch.tensor([[-10.0]]), torch.tensor([[10.0]]))
    step, x = InputStep(layer), torch.randn(200, 8)
    curve = learn_steps(
        Unit("a", module, ("a",)), {"a": module}, {"a": step}, {"a": module.weight}, [UnitCall((x,), module(x))], 200, 1, learning_rate, 0
    )
    return step, curve.before, curve.after


def test_a_step_that_is_too_wide_shrinks() -> None:
    step, before, after = learned(0.02)
    assert after < 0.3 * before and step.step.item() < 0.7 * step.layer.act_scale.item()
    step.give()
    assert step.layer.act_scale.item() == step.step.item()


def test_steps_that_do_not_help_are_put_back() -> None:
    step, before, after = learned(100.0)
    assert after >= before and step.step.item() == step.layer.act_scale.item()


def test_layers_that_have_no_single_static_range_are_refused() -> None:
    layer = QuantLayer.from_float(nn.Linear(4, 4), LayerPlan(4, 4), "a.b")
    with pytest.raises(QuantError, match=r"a\.b: steps are learned from one static range a part; set it first"):
        InputStep(layer)
    layer.set_static_activations(torch.zeros(2, 1), torch.ones(2, 1), [10, 20])
    with pytest.raises(QuantError, match=r"a\.b: steps are learned from one static range"):
        InputStep(layer)
