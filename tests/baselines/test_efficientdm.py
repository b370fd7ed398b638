"""EfficientDM: the walk, what is trained when, and that training brings the output closer than the searched ranges."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from baselines import efficientdm
from qvsr.method_settings import EfficientDMSettings
from qvsr.quant import apply, checkpoint
from qvsr.quant.layer import QuantError
from qvsr.registry import BASELINES

SMALL = {"rank": 4, "updates": 60, "lora_learning_rate": 0.1, "act_learning_rate": 1e-3, "zero_point_learning_rate": 0.01}
PUBLISHED_UPDATES = 160 * 100


def clip_calls(net: nn.Module, clips: str = "ab", steps: int = 3) -> list[tiny.Call]:
    """`steps` calls of each clip, at timesteps 0, 100, …, lowest first."""
    made = []
    for seed, clip in enumerate(clips):
        made += [replace(call, clip=clip) for call in tiny.calls(net, steps, seed=seed + 1)]
    return made


def quantize(net: nn.Module, calls: list[tiny.Call], **settings: Any) -> nn.Module:
    return BASELINES["efficientdm"](net, calls, tiny.spec("efficientdm", **{**SMALL, **settings}))


def error(net: nn.Module, calls: list[tiny.Call]) -> float:
    return sum(tiny.relative_error(tiny.run(net, call), call.out) for call in calls)


def states(net: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.{role}": value for name, layer in apply.quant_layers(net).items() for role, value in layer.state().items()}


def test_trajectories_fall_from_the_highest_timestep() -> None:
    calls = [("b", 100), ("a", 200), ("b", 0), ("a", 100), ("b", 200), ("a", 0)]
    order = efficientdm.trajectories(calls)
    assert order == [[1, 3, 5], [4, 0, 2]]
    walk = list(islice(efficientdm.walked(order, 3), 12))
    assert sorted([walk[:3], walk[3:6]]) == sorted([walk[6:9], walk[9:]]) == order
    assert efficientdm.trajectories([*calls, ("b", 100)]) == [[1, 3, 5], [4, 0, 6, 2]], "a second tile is walked beside the first"


def test_a_few_samples_are_of_all_timesteps() -> None:
    """Evenly spaced indices would not be: of six clips' five calls, every tenth is of the first or the last step."""
    calls = [(clip, t) for clip in "abcdef" for t in range(5)]
    found = efficientdm.spread(calls, 12, seed=1)
    assert len(set(found)) == 12 and sorted(Counter(calls[index][1] for index in found).values()) == [2, 2, 2, 3, 3]
    assert len({calls[index][0] for index in found}) > 3
    assert sorted(efficientdm.spread(calls, 99, seed=1)) == list(range(30))


def test_an_unrecorded_timestep_takes_the_nearest_recorded_one() -> None:
    net = tiny.network()
    quantized = quantize(net, clip_calls(net), updates=0)
    layer = quantized.body
    assert layer.act_timesteps == (50, 150, 200)
    layer.act_scale = torch.tensor([[1.0], [2.0], [3.0]])
    used = []
    for t in (0, 50, 51, 149, 150, 151, 200, 999):
        layer.timestep.value = t
        used.append(layer._act_qparams(torch.zeros(1), 0)[0].item())
    nearest = [min((abs(t - recorded), row) for recorded, row in ((0, 1.0), (100, 2.0), (200, 3.0)))[1] for t in (0, 50, 51, 149, 150, 151)]
    assert used == [*nearest, 3.0, 3.0]


def test_without_updates_ranges_are_as_searched_and_weights_as_rounded_to_nearest() -> None:
    net = tiny.network()
    modules = dict(net.named_modules())
    quantized = quantize(net, clip_calls(net), updates=0)
    assert apply.record(quantized)["losses"] == {} and apply.record(quantized)["trained_params"] == 0
    for name, layer in apply.quant_layers(quantized).items():
        scale, zero = layer._weight_grid()
        assert torch.equal(layer.integers(), (torch.round(modules[name].weight / scale) + zero).clamp(0, 15).to(torch.uint8))
        assert layer.act_scale.shape == (3, 1) and len(layer.act_scale.unique()) == 1 and not layer.is_open
    assert isinstance(net.head, nn.Conv2d)


@pytest.mark.parametrize("base", ["float", "rounded"])
def test_training_brings_the_output_closer(base: str) -> None:
    net = tiny.network()
    calls = clip_calls(net)
    searched = error(quantize(net, calls, updates=0), calls)
    net = tiny.network()
    quantized = quantize(net, calls, base=base)
    losses = apply.record(quantized)["losses"]["finetune"]
    assert losses["kept"] and losses["after"] < 0.9 * losses["before"] and losses["updates"] == 60
    assert error(quantized, calls) < 0.9 * searched
    for layer in apply.quant_layers(quantized).values():
        assert torch.equal(layer.act_zero_point, layer.act_zero_point.round()) and len(layer.act_scale.unique()) == 3


def test_the_network_left_behind_has_the_loss_that_training_saw() -> None:
    net = tiny.network()
    calls = clip_calls(net, "ab", 4)  # 8 calls: all of them are probed
    quantized = quantize(net, calls, updates=20)
    mean = sum((tiny.run(quantized, call) - call.out).square().mean().item() for call in calls) / 8
    assert mean == pytest.approx(apply.record(quantized)["losses"]["finetune"]["after"], rel=1e-4)


def test_each_update_trains_the_ranges_of_its_own_step() -> None:
    """Two updates of a walk from the highest timestep: the lowest of three rows is as searched."""
    net = tiny.network()
    calls = clip_calls(net)
    searched = quantize(net, calls, updates=0).body.act_scale[0].item()
    quantized = quantize(tiny.network(), calls, updates=2)
    assert apply.record(quantized)["losses"]["finetune"]["kept"]
    scales = [row.item() for row in quantized.body.act_scale]
    assert scales[0] == searched and searched not in scales[1:]


def test_one_range_for_all_steps_on_request() -> None:
    net = tiny.network()
    quantized = quantize(net, clip_calls(net), by_step=False)
    assert all(layer.act_scale.shape == (1, 1) for layer in apply.quant_layers(quantized).values())
    assert tiny.run(quantized, clip_calls(net)[0]).isfinite().all()


def test_training_that_does_not_help_is_undone(caplog: pytest.LogCaptureFixture) -> None:
    net = tiny.network()
    calls = clip_calls(net)
    searched = states(quantize(net, calls, updates=0))
    quantized = quantize(tiny.network(), calls, updates=3, act_learning_rate=5.0)
    assert "it did not fall, so the parameters stay as they were" in caplog.text
    assert not apply.record(quantized)["losses"]["finetune"]["kept"]
    found = states(quantized)
    assert found.keys() == searched.keys() and all(torch.equal(found[key], searched[key]) for key in searched)


def test_trained_parameters_are_counted() -> None:
    """By hand, for the tiny network: (outputs, inputs·taps) of its six layers, rank 4 each, three rows."""
    net = tiny.network()
    shapes = [(16, 16), (16, 16 * 9), (32, 16 * 9), (32, 32 * 3), (32, 32), (16, 32 * 3)]
    expected = sum(4 * (outputs + inputs) + outputs for outputs, inputs in shapes) + 3 * 2 * len(shapes)
    quantized = quantize(net, clip_calls(net), updates=1)
    assert apply.record(quantized)["trained_params"] == expected
    without = quantize(tiny.network(), clip_calls(net), updates=1, rank=0)
    assert apply.record(without)["trained_params"] == sum(outputs for outputs, _ in shapes) + 3 * 2 * len(shapes)


def test_unets_of_all_kinds_of_blocks() -> None:
    unet, calls = tiny.unet()
    spec = tiny.spec("efficientdm", **{**SMALL, "updates": 15}).model_copy(update={"exclude": tiny.UNET_EXCLUDE})
    quantized = BASELINES["efficientdm"](unet, calls, spec)
    losses = apply.record(quantized)["losses"]["finetune"]
    assert losses["after"] < losses["before"]
    assert {layer.geometry.kind for layer in apply.quant_layers(quantized).values()} == {"Linear", "Conv2d", "Conv3d"}
    assert len(apply.quant_layers(quantized)) == len(apply.quantizable(tiny.unet()[0], tiny.UNET_EXCLUDE))


def test_checkpoint_round_trip_and_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(len(name))
        net = tiny.network()
        calls = clip_calls(net)
        quantized = quantize(net, calls, updates=4)
        checkpoint.save(quantized, tmp_path / name, {"method": "efficientdm", "bits": "W4A4", "backbone": "tiny"})
        loaded = checkpoint.load(tmp_path / name, tiny.network())
        assert all(torch.equal(tiny.run(loaded, call), tiny.run(quantized, call)) for call in calls)
        torch.rand(3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_refusals() -> None:
    net = tiny.network()
    with pytest.raises(QuantError, match="efficientdm: the calibration set is empty"):
        quantize(net, [])
    with pytest.raises(ValueError, match="update\n"):
        quantize(net, clip_calls(net), update=3)
    calls = clip_calls(net)
    calls[0].out = calls[0].out * float("nan")
    with pytest.raises(QuantError, match="efficientdm: the loss is nan at update [1-6] of 6; lower the learning rates"):
        quantize(net, calls, updates=6)


def test_defaults_are_the_published_ones() -> None:
    settings = EfficientDMSettings()
    assert settings.updates == PUBLISHED_UPDATES and settings.lora_learning_rate == 1 / 2500
    assert (settings.weight_learning_rate, settings.act_learning_rate, settings.rank) == (1e-6, 5e-4, 32)
