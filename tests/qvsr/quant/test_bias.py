"""Measured biases, and a bias table by timestep."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from qvsr.quant import apply
from qvsr.quant.bias import channel_means, measure_bias
from qvsr.quant.cost import _fact
from qvsr.quant.layer import Geometry, LayerPlan, QuantError, QuantLayer

EXCLUDE = ("time_embed.0", "head", "out")
MODULES = {
    "linear": (lambda: nn.Linear(8, 6, bias=False), (2, 5, 8)),
    "conv": (lambda: nn.Conv2d(8, 6, 3, padding=1), (2, 8, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(8, 6, (3, 1, 1), padding=(1, 0, 0)), (1, 8, 5, 3, 3)),
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_table_folds_to_the_same_output_and_is_stored(kind: str) -> None:
    make, shape = MODULES[kind]
    torch.manual_seed(0)
    module, x = make().requires_grad_(False), torch.randn(shape)
    layer = QuantLayer.from_float(module, LayerPlan(4, 4), kind)
    table = layer.start_correction((100, 500))
    table.data = torch.randn(2, 6)
    layer.freeze()
    axis = -1 if kind == "linear" else 1
    plain = QuantLayer.from_float(module, LayerPlan(4, 4), kind)(x)

    def outputs(one: QuantLayer) -> list[torch.Tensor]:
        found = []
        for one.timestep.value in (0, 100, 101, 900):
            found.append(one(x))
        return found

    before = outputs(layer)
    for y, row in zip(before, (0, 0, 1, 1), strict=True):
        torch.testing.assert_close(channel_means(layer, y - plain), table.data[row], rtol=1e-5, atol=1e-5)
        assert ((y - plain).movedim(axis, 0).flatten(1).std(1) < 1e-5).all()
    layer.fold_correction()
    assert layer.correction is None and layer.bias is not None and layer.bias.shape == (2, 6)
    loaded = QuantLayer.from_state(Geometry.of(module), layer.describe(), layer.state(), kind)
    for one in (layer, loaded):
        for y, expected in zip(outputs(one), before, strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    fact = _fact(kind, layer, 10, 10)
    # a call adds one row; the other is storage
    assert fact.bias == 6 and fact.side_bits == _fact(kind, QuantLayer.from_float(module, LayerPlan(4, 4)), 10, 10).side_bits + 32 * 6


def test_a_network_with_a_table_follows_the_timestep() -> None:
    net = tiny.network()
    calls = tiny.calls(net)
    apply.quantize_layers(net, EXCLUDE, lambda name, module: QuantLayer.from_float(module, LayerPlan(8, 8), name))
    layer = apply.quant_layers(net)["body"]
    layer.start_correction((50, 300)).data[1] = 5.0
    with pytest.raises(QuantError, match="body: its bias depends on the timestep, and none was set"):
        tiny.run(net, calls[0])
    apply.follow_timesteps(net)
    errors = [tiny.relative_error(tiny.run(net, call), call.out) for call in calls[:2]]  # timesteps 0 and 100
    assert errors[0] < 0.01 < errors[1]


@pytest.mark.parametrize("bounds", [(), (50, 150, 250, 300)])
def test_the_measured_bias_takes_the_mean_error_away(bounds: tuple[int, ...]) -> None:
    net = tiny.network()
    calls = tiny.calls(net)
    modules = apply.quantizable(net, EXCLUDE)
    apply.quantize_layers(net, EXCLUDE, lambda name, module: QuantLayer.from_float(module, LayerPlan(3, 3), name))
    apply.freeze(net)

    def means() -> list[torch.Tensor]:
        return [(tiny.run(net, call) - call.out).transpose(0, 1).flatten(1).mean(1) for call in calls]

    before, errors = means(), [tiny.relative_error(tiny.run(net, call), call.out) for call in calls]
    for layer in apply.quant_layers(net).values():
        layer.start_correction(bounds)
    apply.follow_timesteps(net)
    measure_bias(net, modules, calls, bounds)
    apply.freeze(net)
    after = means()
    # with a row for each sample every layer's mean is that of full precision; what is left comes from the borders of the layer behind
    share = 0.05 if bounds else 0.5
    assert sum(float(mean.square().sum()) for mean in after) < share * sum(float(mean.square().sum()) for mean in before)
    assert sum(tiny.relative_error(tiny.run(net, call), call.out) for call in calls) < sum(errors)


def test_what_is_refused() -> None:
    layer = QuantLayer.from_float(nn.Linear(8, 3), LayerPlan(4, 4), "body")
    with pytest.raises(QuantError, match=r"body: a bias table's timesteps \[5, 5\] do not rise"):
        layer.start_correction((5, 5))
    net = tiny.network()
    calls, modules = tiny.calls(net), apply.quantizable(net, EXCLUDE)
    apply.quantize_layers(net, EXCLUDE, lambda name, module: QuantLayer.from_float(module, LayerPlan(4, 4), name))
    for quantized in apply.quant_layers(net).values():
        quantized.start_correction((300, 900))
    apply.follow_timesteps(net)
    with pytest.raises(QuantError, match=r"no calibration sample for row 1 of \[300, 900\]"):
        measure_bias(net, modules, calls, (300, 900))
