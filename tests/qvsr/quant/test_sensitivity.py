"""Sensitivity by back-propagated signs against rounding one layer alone and running the network."""

from __future__ import annotations

import pytest
import tiny
import torch

from qvsr.quant import apply, sensitivity
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer, halves

EXCLUDE = ("time_embed.0", "head", "out")


def made(net: torch.nn.Module, weight_bits: int, act_bits: int) -> dict[str, QuantLayer]:
    found = apply.quantizable(net, EXCLUDE)
    plan = (weight_bits, act_bits)
    return {n: QuantLayer.from_float(m, LayerPlan(*plan, halves(m.weight.shape[1]), True, rank=2), n) for n, m in found.items()}


@pytest.mark.parametrize("bits", [4, 6])
def test_against_rounding_one_layer_alone(bits: int) -> None:
    """Each layer within a factor of four of the error that the network's output really has, all together within 1.5: contributions are not
    quite independent, and three layers see a handful of positions."""
    net = tiny.network()
    calls = tiny.calls(net, 6)
    found = sensitivity.measure(net, made(net, bits, bits), calls, [3, bits, 8], probes=8)
    for kind, table, plan in (("weights", found.weights_LB, (bits, 8)), ("inputs", found.inputs_LB, (8, bits))):
        real_sum, found_sum = 0.0, 0.0
        for row, name in enumerate(found.names):
            layer = made(net, *plan)[name]
            with apply.exchanged(net, {name: layer}):
                real = sum(float((tiny.run(net, call) - call.out).square().mean()) for call in calls) / len(calls)
            if name != "time_embed.2":  # one row a call: no independent positions to average over
                assert real / 4 < float(table[row, 1]) < real * 4, f"{kind} of {name}"
                real_sum, found_sum = real_sum + real, found_sum + float(table[row, 1])
            assert table[row, 0] > table[row, 1] > table[row, 2]
        assert real_sum / 1.5 < found_sum < real_sum * 1.5, kind


def test_positions_weights_and_a_layer_without_effect() -> None:
    net = tiny.network()
    net.line.weight.zero_()
    calls = tiny.calls(net)
    layers = made(net, 4, 4)
    one = sensitivity.measure(net, layers, calls, [4])
    places = dict(zip(one.names, one.positions_L.tolist(), strict=True))
    assert places["body"] == 5 * 64 and places["down"] == 5 * 16 and places["time_embed.2"] == 1
    row = one.names.index("tokens")
    assert one.weights_LB[row] == 0 == one.inputs_LB[row] and one.weights_LB[one.names.index("body")] > 0
    doubled = sensitivity.measure(net, layers, calls, [4], weights=[2.0] * 4)
    torch.testing.assert_close(doubled.weights_LB, 2 * one.weights_LB)
    torch.testing.assert_close(doubled.inputs_LB, 2 * one.inputs_LB)
    assert isinstance(net.body, torch.nn.Conv2d), "the network is as it was"


def test_unrounded_layers_are_the_network() -> None:
    net = tiny.network()
    (call,) = tiny.calls(net, 1)
    with apply.exchanged(net, {name: sensitivity.Unrounded(layer) for name, layer in made(net, 4, 4).items()}):
        torch.testing.assert_close(tiny.run(net, call), call.out, rtol=1e-4, atol=1e-5)


def test_an_empty_set_is_refused() -> None:
    net = tiny.network()
    with pytest.raises(QuantError, match="sensitivity needs calibration samples, the set is empty"):
        sensitivity.measure(net, made(net, 4, 4), [], [4])
