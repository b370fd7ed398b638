"""Which layers are quantized, by name; putting them in place; timesteps; execution."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from qvsr.kernels import cpu
from qvsr.quant import apply
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer
from qvsr.quant.observe import observe_inputs


def test_prefixes_end_at_a_dot() -> None:
    net = nn.ModuleDict(
        {"time_embed": nn.ModuleDict({"0": nn.Linear(4, 4), "01": nn.Linear(4, 4)}), "out": nn.Conv2d(4, 4, 1), "norm": nn.GroupNorm(1, 4)}
    )
    assert list(apply.quantizable(net, ["time_embed.0"])) == ["time_embed.01", "out"]
    assert list(apply.quantizable(net, ["time_embed"])) == ["out"]


def test_a_typo_is_named() -> None:
    with pytest.raises(QuantError, match="no layer 'time_embd.0'; did you mean time_embed.0"):
        apply.quantizable(tiny.network(), ["time_embd.0"])
    with pytest.raises(QuantError, match="no layer is left to quantize"):
        apply.quantizable(nn.Sequential(nn.Linear(2, 2)), ["0"])


def quantized(net: nn.Module) -> dict[str, QuantLayer]:
    return apply.quantize_layers(net, ["head"], lambda name, module: QuantLayer.from_float(module, LayerPlan(8, 8), name))


def test_layers_are_replaced_in_order() -> None:
    net = tiny.network()
    expected = list(apply.quantizable(net, ["head"]))
    assert list(quantized(net)) == expected == list(apply.quant_layers(net))
    assert isinstance(net.head, nn.Conv2d) and isinstance(net.body, QuantLayer)


def test_observed_inputs_are_those_of_the_layers() -> None:
    net, seen = tiny.network(), {}
    (call,) = tiny.calls(net, 1)
    with observe_inputs(apply.quantizable(net), lambda name, x: seen.setdefault(name, x)):
        tiny.run(net, call)
    assert torch.equal(seen["head"], call.x) and next(iter(seen)) == "time_embed.0" and len(seen) == 9
    count = len(seen)
    seen.clear()
    tiny.run(net, call)
    assert not seen and count == 9, "hooks are removed"


def test_tables_by_timestep_get_it_from_the_call() -> None:
    net = tiny.network()
    calls = tiny.calls(net, 2)
    layers = quantized(net)
    layers["body"].set_static_activations(torch.full((2, 1), -1.0), torch.full((2, 1), 1.0), timesteps=[50, 999])
    apply.follow_timesteps(net)
    for call in calls:
        tiny.run(net, call)
        assert layers["body"].timestep.value == int(call.t)
    mixed = calls[0]
    mixed.t = torch.tensor([0, 1, 2, 3, 4])
    with pytest.raises(QuantError, match="need one timestep a call"):
        tiny.run(net, mixed)


def test_unknown_execution() -> None:
    net = tiny.network()
    quantized(net)
    apply.set_execution(net, "simulated")
    with pytest.raises(QuantError, match="no execution 'packd'"):
        apply.set_execution(net, "packd")


def test_digest_sees_names_values_and_shapes() -> None:
    first, second = tiny.network(), tiny.network()
    assert apply.weights_digest(first) == apply.weights_digest(second)
    second.head.weight.data[0, 0, 0, 0] += 1e-7 + second.head.weight.data[0, 0, 0, 0].abs() * 1e-6
    assert apply.weights_digest(first) != apply.weights_digest(second)


def test_auto_is_packed_where_there_are_integer_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason, expected in ((None, "packed"), ("this CPU has none", "simulated")):
        monkeypatch.setattr(cpu, "missing", lambda reason=reason: reason)
        assert apply.choose_execution("auto", "cpu") == expected
        assert apply.choose_execution("packed", "cpu") == "packed" and apply.choose_execution("simulated", "cpu") == "simulated"
    with pytest.raises(QuantError, match="no execution 'atuo'; did you mean auto"):
        apply.choose_execution("atuo", "cpu")
