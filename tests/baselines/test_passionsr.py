"""PassionSR: layers in training against the quantized layers made of them, each stage by the error that it lowers, and the starting values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from baselines import passionsr
from qvsr.method_settings import PassionSRSettings
from qvsr.quant import apply, checkpoint
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer, halves
from qvsr.quant.observe import observe_inputs
from qvsr.registry import BASELINES

SMALL = {"transform_epochs": 8, "bounds_epochs": 8, "relative": True, "transform_learning_rate": 3e-3, "bounds_learning_rate": 3e-3}
OFF = {"transform_epochs": 0, "bounds_epochs": 0}


def quantize(net: nn.Module, calls: list[tiny.Call], bits: int = 4, **settings: Any) -> nn.Module:
    return BASELINES["passionsr"](net, calls, tiny.spec("passionsr", bits, bits, **{**SMALL, **settings}))


def error(net: nn.Module, calls: list[tiny.Call]) -> float:
    return sum(tiny.relative_error(tiny.run(net, call), call.out) for call in calls)


MODULES = {
    "linear": (lambda: nn.Linear(24, 10), (3, 5, 24)),
    "linear_nobias": (lambda: nn.Linear(24, 10, bias=False), (7, 24)),
    "conv2d_strided": (lambda: nn.Conv2d(24, 10, 3, stride=2, padding=1), (2, 24, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(24, 10, (3, 1, 1), padding=(1, 0, 0)), (1, 24, 5, 3, 4)),
}


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_layer_in_training_is_the_layer_that_comes_of_it(name: str, transform: bool, relative: bool) -> None:
    """In float64, where no value is so near a half that the two orders of operations round it differently."""
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module, x = make().double().requires_grad_(False), torch.randn(shape, dtype=torch.float64)
    layer = QuantLayer.from_float(module, LayerPlan(4, 5, halves(24)), name, smooth=torch.rand(24) + 0.5 if transform else None)
    layer.set_static_activations(torch.tensor([[-1.5, -2.0]]).double(), torch.tensor([[2.0, 1.8]]).double())
    one = passionsr.Learned(module, layer, relative)
    with torch.no_grad():
        assert torch.allclose(one(x), layer(x), atol=1e-12), "the start"
        for parameter in one.transform():
            parameter.add_(0.3 * torch.rand_like(parameter))
        one.fix_weight_bounds()
        follows = one(x)
        for parameter in one.bounds():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
        made = one.quant_layer()
        assert torch.allclose(one(x), made(x), atol=1e-12) and not torch.allclose(made(x), follows, atol=1e-3)
        made.freeze()
        assert torch.allclose(one(x), made(x), atol=1e-12)
    assert (made.smooth is not None) == (made.offset is not None) == transform and len(one.transform()) == 2 * transform


@pytest.mark.parametrize("name", MODULES)
def test_every_trained_number_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module, x = make().requires_grad_(False), torch.randn(shape)
    layer = QuantLayer.from_float(module, LayerPlan(4, 4, halves(24)), name, smooth=torch.rand(24) + 0.5)
    layer.set_static_activations(torch.tensor([[-1.5, -2.0]]), torch.tensor([[2.0, 1.8]]))
    one = passionsr.Learned(module, layer, False)
    for parameters in (one.transform, one.bounds):
        trained = [parameter.requires_grad_(True) for parameter in parameters()]
        ((one(x) - module(x)).pow(2).mean()).backward()
        assert all(parameter.grad is not None and (parameter.grad != 0).all() for parameter in trained)
        for parameter in trained:
            parameter.requires_grad_(False)
        one.fix_weight_bounds()


def test_start_is_the_formula_and_the_moving_average() -> None:
    """Factors up to a common one; activation ranges of the inputs divided by them, with the first call's as the start of the average."""
    net = tiny.network()
    calls = tiny.calls(net, 3)
    inputs: list[Any] = []
    with observe_inputs({"body": net.body}, lambda _name, x: inputs.append(x.double().numpy())):
        for call in calls:
            tiny.run(net, call)
    weight = net.body.weight.double().numpy()
    layer = apply.quant_layers(quantize(net, calls, **OFF))["body"]
    assert layer.parts == (8, 8) and (layer.offset == 0).all() and (layer.offset_taps == 0).all()
    amax, wmax = np.abs(np.stack(inputs)).max((0, 1, 3, 4)), np.abs(weight).max((0, 2, 3))
    smooth = layer.smooth.double().numpy()
    ratio = smooth / (amax / wmax) ** 0.3
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    for part in range(2):
        of = slice(8 * part, 8 * part + 8)
        high, low = (None, None)
        for x in inputs:
            scaled = x[:, of] / smooth[None, of, None, None]
            high = scaled.max() if high is None else 0.95 * high + 0.05 * scaled.max()
            low = scaled.min() if low is None else 0.95 * low + 0.05 * scaled.min()
        assert layer.act_scale[0, part].item() == pytest.approx((high - low) / 15, rel=1e-4)
        rows = (weight * smooth[None, :, None, None])[:, of].reshape(16, -1)
        np.testing.assert_allclose(layer.weight_scale[:, part].numpy(), (rows.max(1) - rows.min(1)) / 15, rtol=1e-4)


def test_without_training_and_transform_it_is_static_maxmin() -> None:
    """But for a grid that is the bounds' own: the scale is found again from the bounds."""
    outs = []
    for method, settings in (
        ("passionsr", {**SMALL, **OFF, "transform": False}),
        ("maxmin", {"activations": "static", "channel_split": True}),
    ):
        net = tiny.network()
        calls = tiny.calls(net)
        outs.append(tiny.run(BASELINES[method](net, calls, tiny.spec(method, **settings)), calls[0]))
    assert tiny.relative_error(outs[0], outs[1]) < 1e-6


def test_each_stage_lowers_the_error() -> None:
    errors = {}
    for key, change in {"none": OFF, "transform": {"bounds_epochs": 0}, "bounds": {"transform_epochs": 0}, "both": {}}.items():
        net = tiny.network()
        calls = tiny.calls(net)
        quantized = quantize(net, calls, 3, **change)
        errors[key] = error(quantized, calls)
        losses = apply.record(quantized)["losses"]
        assert list(losses) == {"none": [], "both": ["train_transform", "train_bounds"]}.get(key, [f"train_{key}"])
        assert all(loss["kept"] and loss["updates"] == 32 for loss in losses.values())
    assert errors["both"] < min(errors["transform"], errors["bounds"]) and max(errors["transform"], errors["bounds"]) < errors["none"]


def test_trained_parameters_are_counted() -> None:
    """2 a channel for the transform; 2 an output and half for the weights' bounds and 2 a half for the activations'."""
    net = tiny.network()
    layers = apply.quantizable(net, ("time_embed.0", "head", "out"))
    transform = 2 * sum(layer.weight.shape[1] for layer in layers.values())
    bounds = sum(2 * 2 * layer.weight.shape[0] + 2 * 2 for layer in layers.values())
    expected = {"both": transform + bounds, "bounds_epochs": transform, "transform_epochs": bounds}
    for key, count in expected.items():
        net = tiny.network()
        change = {} if key == "both" else {key: 0}
        quantized = quantize(net, tiny.calls(net), **{"transform_epochs": 0.5, "bounds_epochs": 0.5, **change})
        assert apply.record(quantized)["trained_params"] == count


def test_a_stage_that_does_harm_is_undone(caplog: pytest.LogCaptureFixture) -> None:
    start, net = tiny.network(), tiny.network()
    calls = tiny.calls(net)
    wild = {"transform_epochs": 1, "bounds_epochs": 1, "transform_learning_rate": 30.0, "bounds_learning_rate": 30.0}
    outs = [tiny.run(quantize(one, calls, **settings), calls[0]) for one, settings in ((start, OFF), (net, wild))]
    assert not any(loss["kept"] for loss in apply.record(net)["losses"].values())
    assert "train bounds: loss" in caplog.text and "did not fall, so the parameters stay as they were" in caplog.text
    assert torch.equal(outs[0], outs[1])


def test_in_a_unet_training_brings_the_output_closer() -> None:
    errors = []
    for change in (OFF, {}):
        unet, calls = tiny.unet()
        spec = tiny.spec("passionsr", 4, 6, **{**SMALL, "transform_epochs": 4, "bounds_epochs": 4, **change})
        quantized = BASELINES["passionsr"](unet, calls, spec.model_copy(update={"exclude": tiny.UNET_EXCLUDE}))
        assert not [module for module in quantized.modules() if isinstance(module, passionsr.Learned)]
        errors.append(error(quantized, calls))
    assert errors[1] < 0.9 * errors[0]


def test_checkpoint_round_trip_and_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(len(name))
        net = tiny.network()
        calls = tiny.calls(net)
        quantized = quantize(net, calls, transform_epochs=1, bounds_epochs=1)
        assert all(not layer.is_open and (layer.offset != 0).any() for layer in apply.quant_layers(quantized).values())
        checkpoint.save(quantized, tmp_path / name, {"method": "passionsr", "bits": "W4A4", "backbone": "tiny"})
        loaded = checkpoint.load(tmp_path / name, tiny.network())
        assert torch.equal(tiny.run(loaded, calls[0]), tiny.run(quantized, calls[0]))
        torch.rand(3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_refusals_and_published_counts() -> None:
    net = tiny.network()
    with pytest.raises(QuantError, match="passionsr: the calibration set is empty"):
        quantize(net, [])
    with pytest.raises(ValueError, match="bound_epochs\n"):
        quantize(net, tiny.calls(net), bound_epochs=3)
    settings = PassionSRSettings()
    assert (settings.transform_epochs, settings.bounds_epochs, settings.alpha, settings.ema) == (2, 2, 0.3, 0.95)
    assert settings.transform_learning_rate == settings.bounds_learning_rate == 1e-5 and not settings.relative
