"""QuaRot: rotations exact without rounding, one layer by the paper's formula in float64, GPTQ against nearest, files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from baselines.quarot import open_layers, quarot
from qvsr.method_settings import QuaRotSettings
from qvsr.quant import affine, apply, checkpoint, cost
from qvsr.quant.layer import QuantError
from qvsr.quant.observe import observe_inputs

HEADER = {"method": "quarot", "bits": "W4A4", "backbone": "tiny"}
EXCLUDE = ("time_embed.0", "head", "out")


def quantized(weight_bits: int = 4, act_bits: int = 4, **settings: object) -> tuple[nn.Module, list[tiny.Call]]:
    net = tiny.network()
    calls = tiny.calls(net)
    return quarot(net, calls, tiny.spec("quarot", weight_bits, act_bits, **settings)), calls


def inputs_of(net: tiny.Net, call: tiny.Call) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    with observe_inputs(apply.quantizable(net, EXCLUDE), lambda name, x: seen.setdefault(name, x)):
        tiny.run(net, call)
    return seen


@pytest.mark.parametrize("granularity", ["shared", "native"])
def test_rotation_is_exact_in_float64(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.network()
    seen = inputs_of(net, tiny.calls(net, 1)[0])
    net.double()
    modules = {name: copy.deepcopy(module) for name, module in apply.quantizable(net, EXCLUDE).items()}
    layers = open_layers(net, tiny.spec("quarot"), QuaRotSettings(granularity=granularity))
    monkeypatch.setattr(affine, "round_to_grid", lambda x, *_a, **_k: x)
    monkeypatch.setattr(affine, "fake_quantize", lambda x, *_a: x)
    for name, layer in layers.items():
        assert all(layer.rotated)
        x = seen[name].double()
        with torch.no_grad():
            assert (layer(x) - modules[name](x)).abs().max() < 1e-13, name
            assert (layer.rounding()[0] - modules[name].weight.flatten(1)).abs().max() > 0.01, "it is rotated"


@pytest.mark.parametrize("granularity", ["shared", "native"])
def test_one_layer_by_the_formula(granularity: str) -> None:
    """Signed integers -8 … 7, weights absmax/7 by output channel, activations absmax/7 by token or tensor, in float64 with the dense rotation."""
    net = tiny.network()
    weight, x = net.tokens.weight.double(), inputs_of(net, tiny.calls(net, 1)[0])["tokens"].double()
    layer = apply.quant_layers(quarot(net, [], tiny.spec("quarot", granularity=granularity)))["tokens"]
    rotation = layer.rotation_0.double()
    assert torch.allclose(rotation.abs(), torch.full_like(rotation, 32**-0.5)) and torch.allclose(
        rotation @ rotation.T, torch.eye(32).double(), atol=1e-6
    )

    def rounded(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        scale = largest / 7
        return torch.clamp(torch.round(values / scale), -8, 7) * scale

    w, a = weight @ rotation, x @ rotation
    largest = a.abs().amax(-1, True) if granularity == "native" else a.abs().max()
    expected = rounded(a, largest) @ rounded(w, w.abs().amax(1, True)).T
    with torch.no_grad():
        found = layer(x.float()).double()
    assert tiny.relative_error(found, expected) < 1e-4  # a value within float rounding of a half may round either way
    assert ((found - expected).abs() > 1e-4).double().mean() < 0.02


def test_granularity_by_layer() -> None:
    used = {name: layer.act_granularity_used for name, layer in apply.quant_layers(quantized(granularity="native")[0]).items()}
    assert used["tokens"] == used["time_embed.2"] == "token" and {used[name] for name in ("body", "temporal_conv", "line")} == {"frame"}
    assert {layer.act_granularity_used for layer in apply.quant_layers(quantized()[0]).values()} == {"tensor"}


@pytest.mark.parametrize("granularity", ["shared", "native"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_lowers_the_error_on_the_calibration_calls(granularity: str, symmetric: bool) -> None:
    """Of the network's output; the layers' own errors are in the test below."""
    settings = {"granularity": granularity, "symmetric": symmetric}
    for bits in ((4, 4), (3, 8)):
        errors = {}
        for weights in ("rtn", "gptq"):
            net, calls = quantized(*bits, weights=weights, **settings)
            errors[weights] = sum(tiny.relative_error(tiny.run(net, call), call.out) for call in calls)
        assert errors["gptq"] < 0.9 * errors["rtn"], bits


def test_noted_losses_are_the_layers_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all input vectors and unrounded inputs, the noted loss is the mean squared error of the layer's output."""
    original = tiny.network()
    for weights, place in (("rtn", 0), ("gptq", 1)):
        noted = apply.record(quantized(3, 8, weights="gptq", gptq_rows=0)[0])["gptq"]
        net, calls = quantized(3, 8, weights=weights)
        layers = apply.quant_layers(net)
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(affine, "round_to_grid", lambda x, *_a, **_k: x)
            for name, module in apply.quantizable(original, EXCLUDE).items():
                seen = [inputs_of(original, call)[name] for call in calls]
                layer = layers[name].double()  # computes with rounded values, not with whole numbers
                error = sum(F.mse_loss(layer(x.double()).float(), module(x)).item() for x in seen) / len(seen)
                assert error == pytest.approx(noted[name][place], rel=1e-3), name
        assert all(one[1] < one[0] for one in noted.values())


def test_asymmetric_grids_use_more_levels() -> None:
    layers = [apply.quant_layers(quantized(symmetric=symmetric)[0])["body"] for symmetric in (True, False)]
    assert (layers[0].weight_zero_point == 8).all() and not (layers[1].weight_zero_point == 8).all()
    assert (layers[1].weight_scale < layers[0].weight_scale).all()


@pytest.mark.parametrize("settings", [{}, {"weights": "gptq", "granularity": "native"}, {"symmetric": False, "rotation": False}], ids=str)
def test_same_bytes_twice_and_the_same_output_from_the_file(tmp_path: Path, settings: dict[str, object]) -> None:
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        net, calls = quantized(**settings)
        checkpoint.save(net, tmp_path / name, HEADER)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = checkpoint.load(tmp_path / "a", tiny.network())
    assert all(torch.equal(tiny.run(loaded, call), tiny.run(net, call)) for call in calls)
    assert {layer.describe()["act_granularity"] for layer in apply.quant_layers(loaded).values()} == {
        "token" if settings.get("granularity") == "native" else "tensor"
    }


def test_the_seed_draws_the_signs() -> None:
    signs = []
    for seed in (1, 2):
        spec = tiny.spec("quarot").model_copy(update={"seed": seed})
        signs.append(apply.quant_layers(quarot(tiny.network(), [], spec))["body"].signs)
    assert not torch.equal(*signs)


def test_it_costs_what_was_planned() -> None:
    net = tiny.network()
    call = tiny.calls(net, 1)[0]
    inputs = (call.x, call.t, call.context, call.struct)
    planned = cost.plan(cost.count(net, *inputs), 4, 4, EXCLUDE, rotate=True)
    assert cost.count(quarot(net, [], tiny.spec("quarot")), *inputs) == planned
    assert cost.cost(planned, "quarot", "W4A4").rotation_macs_g > 0


def test_what_is_refused() -> None:
    with pytest.raises(QuantError, match="GPTQ needs calibration samples, the set is empty"):
        quarot(tiny.network(), [], tiny.spec("quarot", weights="gptq"))
    with pytest.raises(ValueError, match="'rtn' or 'gptq'"):
        quarot(tiny.network(), [], tiny.spec("quarot", weights="nearest"))
    with pytest.raises(ValueError, match="clip_ratio"):
        quarot(tiny.network(), [], tiny.spec("quarot", clip_ratio=0.9))
