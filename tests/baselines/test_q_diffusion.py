"""Q-Diffusion: where shortcuts are split, and that each stage lowers the error it is there for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from baselines import q_diffusion
from qvsr.config import UNetSettings, load
from qvsr.method_settings import QDiffusionSettings
from qvsr.models.layers import GroupNorm32
from qvsr.models.unet import InflatedUNet
from qvsr.provenance import ROOT
from qvsr.quant import apply, checkpoint
from qvsr.quant.layer import QuantError
from qvsr.quant.observe import observe_inputs
from qvsr.quant.reconstruct import units
from qvsr.registry import BASELINES

SMALL = {"samples": 3, "range_samples": 3, "batch": 1, "round_updates": 40, "round_learning_rate": 0.03, "step_updates": 20}


def quantize(net: nn.Module, calls: list[tiny.Call], **settings: Any) -> nn.Module:
    return BASELINES["q_diffusion"](net, calls, tiny.spec("q_diffusion", **{**SMALL, **settings}))


def observed_parts(unet: InflatedUNet, call: tiny.Call) -> dict[str, tuple[int, int]]:
    """Channels of the decoder's map and of the encoder's, seen in a call: what went into each block less what the block before returned."""
    before: list[int] = []
    parts: dict[str, tuple[int, int]] = {}
    blocks = [unet.middle_block, *unet.output_blocks]
    handles = [block.register_forward_hook(lambda _m, _a, out: before.append(out.shape[1])) for block in blocks]

    def see(name: str, x: Tensor) -> None:
        parts[name] = (before[-1], x.shape[1] - before[-1])

    skips = {f"output_blocks.{k}.0.skip_connection": block[0].skip_connection for k, block in enumerate(unet.output_blocks)}
    with observe_inputs({name: skip for name, skip in skips.items() if isinstance(skip, nn.Conv2d)}, see):
        tiny.run(unet, call)
    for handle in handles:
        handle.remove()
    return parts


def test_split_of_the_default_network_is_what_its_forward_concatenates() -> None:
    settings = load(ROOT / "config" / "default.yaml").backbone.unet
    unet = tiny.initialised(settings)
    struct = {str(size): torch.zeros(5, settings.semb_channels, size, size) for size in (8, 4, 2)}
    call = tiny.Call(torch.zeros(5, settings.in_channels, 8, 8), torch.tensor([5]), torch.zeros(1, 2, settings.context_dim), struct)
    found = q_diffusion.skip_parts(unet)
    assert found == observed_parts(unet, call) and len(found) == 9
    assert set(found.values()) == {(64, 64)}


def test_split_of_a_network_of_unequal_widths() -> None:
    unet, calls = tiny.unet()
    assert q_diffusion.skip_parts(unet) == observed_parts(unet, calls[0])
    assert set(q_diffusion.skip_parts(unet).values()) == {(64, 64), (64, 32), (32, 32)}
    assert q_diffusion.skip_parts(tiny.network()) == {}


def test_split_of_the_published_network() -> None:
    """Twelve decoder blocks of 320 to 1280 channels; the numbers are those of Stable Diffusion 2.1's U-Net."""
    with torch.device("meta"):
        found = q_diffusion.skip_parts(InflatedUNet(UNetSettings()))
    expected = [(1280, 1280)] * 5 + [(1280, 640), (1280, 640), (640, 640), (640, 320), (640, 320), (320, 320), (320, 320)]
    assert list(found.values()) == expected


def test_a_unit_gets_quantized_inputs_and_full_precision_targets() -> None:
    unet, calls = tiny.unet()
    modules = apply.quantizable(unet, tiny.UNET_EXCLUDE)
    network = q_diffusion.Emulated(unet, modules)
    first = "input_blocks.1.0.in_layers.2"
    network.weights[first] = modules[first].weight * 0.5
    unit = next(unit for unit in units(unet, modules) if unit.name == "input_blocks.2.0.op")
    captured = network.calls_of(unit, calls[:1])[0]
    seen: dict[str, Tensor] = {}
    with observe_inputs({"unit": unit.module}, seen.__setitem__):
        tiny.run(unet, calls[0])
        assert torch.equal(unit.module(seen["unit"]), captured.target)
        assert not torch.equal(seen["unit"], captured.args[0])
        kept = modules[first].weight.clone()
        modules[first].weight.mul_(0.5)
        tiny.run(unet, calls[0])
        assert torch.equal(seen["unit"], captured.args[0])
        modules[first].weight.copy_(kept)
    assert not unit.module._forward_hooks and len(unit.module._forward_pre_hooks) == 0


def test_a_unit_that_never_runs_is_named() -> None:
    net = tiny.network()
    net.unused = nn.Linear(4, 4)
    with pytest.raises(QuantError, match="unused: never ran on a calibration sample"):
        quantize(net, tiny.calls(net))


def test_each_stage_lowers_its_error_in_the_tiny_network() -> None:
    net = tiny.network()
    noted = apply.record(quantize(net, tiny.calls(net), round_updates=150, step_updates=60))
    losses = noted["losses"]
    weights = 16 * 16 + 16 * 16 * 9 + 32 * 16 * 9 + 32 * 32 * 3 + 32 * 32 + 16 * 32 * 3
    assert noted["trained_params"] == weights + 6  # the rounding of every weight, and a step a layer
    for stage in ("round_weights", "train_steps"):
        assert losses[stage]["after"] < losses[stage]["before"] and losses[stage]["units"] == 6
    assert losses["round_weights"]["units_lowered"] >= 5


def test_stages_of_a_unet_bring_its_output_closer() -> None:
    """With blocks as units; the output is what no stage looks at."""
    found = []
    for change in ({"round_updates": 0, "step_updates": 0}, {}):
        unet, calls = tiny.unet()
        spec = tiny.spec("q_diffusion", 3, 6, **{**SMALL, "round_updates": 20, "step_updates": 8, **change}).model_copy(
            update={"exclude": tiny.UNET_EXCLUDE}
        )
        quantized = BASELINES["q_diffusion"](unet, calls, spec)
        assert apply.quant_layers(quantized)["output_blocks.0.0.skip_connection"].parts == (64, 64)
        losses = apply.record(quantized)["losses"]
        assert all(stage["after"] < stage["before"] for stage in losses.values())
        found.append(sum(tiny.relative_error(tiny.run(quantized, call), call.out) for call in calls))
    assert found[1] < found[0]


def test_static_searched_and_frozen() -> None:
    net = tiny.network()
    layers = apply.quant_layers(quantize(net, tiny.calls(net)))
    assert not any(layer.is_open for layer in layers.values())
    assert all(layer.describe()["activations"] == "static" and layer.act_scale.shape == (1, 1) for layer in layers.values())
    assert isinstance(net.head, nn.Conv2d)


def test_rounding_to_nearest_and_searched_steps_without_updates() -> None:
    net = tiny.network()
    modules = dict(net.named_modules())
    quantized = quantize(net, tiny.calls(net), round_updates=0, step_updates=0)
    assert apply.record(quantized)["losses"] == {} and apply.record(quantized)["trained_params"] == 0
    for name, layer in apply.quant_layers(quantized).items():
        scale, zero = layer._weight_grid()
        assert torch.equal(layer.integers(), (torch.round(modules[name].weight / scale) + zero).clamp(0, 15).to(torch.uint8))


def test_checkpoint_round_trip_and_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(len(name))
        net = tiny.network()
        calls = tiny.calls(net)
        quantized = quantize(net, calls)
        checkpoint.save(quantized, tmp_path / name, {"method": "q_diffusion", "bits": "W4A4", "backbone": "tiny"})
        loaded = checkpoint.load(tmp_path / name, tiny.network())
        assert torch.equal(tiny.run(loaded, calls[0]), tiny.run(quantized, calls[0]))
        torch.rand(3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_kept_outputs_change_nothing_but_the_time(tmp_path: Path) -> None:
    runs = []
    for keep in (False, True):
        unet, calls = tiny.unet()
        settings = {**SMALL, "samples": 2, "round_updates": 2, "step_updates": 2, "keep_outputs": keep}
        spec = tiny.spec("q_diffusion", **settings).model_copy(update={"exclude": tiny.UNET_EXCLUDE})
        blocks = [*unet.input_blocks, unet.middle_block]
        ran: list[int] = []
        for norm in (module for block in blocks for module in block.modules() if isinstance(module, GroupNorm32)):
            norm.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        quantized = BASELINES["q_diffusion"](unet, calls, spec)
        checkpoint.save(quantized, tmp_path / str(keep), {"method": "q_diffusion", "bits": "W4A4", "backbone": "tiny"})
        runs.append(len(ran))
        assert not any("forward" in vars(module) for module in unet.modules())
    assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()
    assert runs[1] < runs[0] / 2


def test_refusals() -> None:
    net = tiny.network()
    with pytest.raises(QuantError, match="q_diffusion: the calibration set is empty"):
        quantize(net, [])
    with pytest.raises(ValueError, match="round_update\n"):
        quantize(net, tiny.calls(net), round_update=3)
    assert QDiffusionSettings().round_updates == 20000 and QDiffusionSettings().step_updates == 5000
