"""MaxMin against rounding written out by hand, dynamic and static."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F

import baselines
from qvsr.quant import apply
from qvsr.quant.layer import QuantError
from qvsr.quant.observe import observe_inputs
from qvsr.registry import BASELINES


def rounded(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounding to nearest on 2^bits levels between low and high, in float64 and without a zero point."""
    x, low, high = x.double(), low.double(), high.double()
    step = (high - low) / (2**bits - 1)
    offset = torch.round(low / step) * step  # 0 is kept as 0: the grid passes through it
    return (offset + torch.round((x - offset) / step).clamp(0, 2**bits - 1) * step).float()


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_one_layer_by_hand(bits: int) -> None:
    net = tiny.network()
    seen: dict[str, torch.Tensor] = {}
    call = tiny.calls(net, 1)[0]
    with observe_inputs({"body": net.body}, seen.__setitem__):
        tiny.run(net, call)
    x, weight, bias = seen["body"], net.body.weight, net.body.bias
    expected = F.conv2d(
        rounded(x, x.min(), x.max(), bits),
        rounded(weight, weight.amin((1, 2, 3), True), weight.amax((1, 2, 3), True), bits),
        bias,
        padding=1,
    )
    quantized = BASELINES["maxmin"](net, [], tiny.spec("maxmin", bits, bits))
    with torch.no_grad():
        found = quantized.body(x)
    assert ((found - expected).abs() > 1e-4).float().mean() < 0.02  # a value within float rounding of a half may round either way
    assert tiny.relative_error(found, expected) < 1e-4


def test_fewer_bits_are_further_and_eight_are_close() -> None:
    errors = []
    for bits in (8, 6, 4, 2):
        net = tiny.network()
        call = tiny.calls(net, 1)[0]
        errors.append(tiny.relative_error(tiny.run(BASELINES["maxmin"](net, [], tiny.spec("maxmin", bits, bits)), call), call.out))
    assert errors == sorted(errors) and errors[0] < 1e-3


def test_static_ranges_are_a_moving_average() -> None:
    net = tiny.network()
    calls = tiny.calls(net)
    inputs: deque[torch.Tensor] = deque()
    with observe_inputs({"body": net.body}, lambda _name, x: inputs.append(x)):
        for call in calls:
            tiny.run(net, call)
    low, high = inputs[0].min().item(), inputs[0].max().item()
    for x in list(inputs)[1:]:
        low, high = 0.9 * low + 0.1 * x.min().item(), 0.9 * high + 0.1 * x.max().item()
    layer = apply.quant_layers(BASELINES["maxmin"](net, calls, tiny.spec("maxmin", activations="static", ema=0.9)))["body"]
    assert layer.act_scale.item() == pytest.approx((high - low) / 15, rel=1e-5)
    assert layer.act_zero_point.item() == round(-low / ((high - low) / 15))


def test_channel_split_and_exclusions() -> None:
    net = tiny.network()
    quantized = BASELINES["maxmin"](net, [], tiny.spec("maxmin", channel_split=True))
    assert {len(layer.parts) for layer in apply.quant_layers(quantized).values()} == {2}
    assert isinstance(net.head, torch.nn.Conv2d)


def test_static_needs_samples() -> None:
    with pytest.raises(QuantError, match="static activation ranges need calibration samples"):
        BASELINES["maxmin"](tiny.network(), [], tiny.spec("maxmin", activations="static"))


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="activatons"):
        BASELINES["maxmin"](tiny.network(), [], tiny.spec("maxmin", activatons="static"))


def test_registered_methods() -> None:
    """Every file of the package is imported by itself and registers the method that it is called by."""
    files = {file.stem for file in Path(baselines.__file__).parent.glob("*.py")} - {"__init__"}
    assert {"full_precision", "maxmin", "quarot"} <= files and files | {"quantvsr"} <= set(BASELINES)
