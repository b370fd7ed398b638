"""Narrowed activation ranges: chosen by error, cut where they say, stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from qvsr.quant import apply, clip
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer, halves


def layers(net: nn.Module, plan: LayerPlan) -> dict[str, QuantLayer]:
    found = apply.quantizable(net, ("time_embed.0", "head", "out"))
    return {
        name: QuantLayer.from_float(module, replace(plan, parts=halves(module.weight.shape[1])), name) for name, module in found.items()
    }


@pytest.mark.parametrize("granularity", ["tensor", "frame", "token"])
def test_a_narrowed_range_in_every_granularity(granularity: str) -> None:
    """The rounded input is the one rounded on the grid of ``factor * low … factor * high``, part by part."""
    torch.manual_seed(0)
    layer = QuantLayer.from_float(nn.Linear(8, 3), LayerPlan(8, 4, (4, 4), act_granularity=granularity))
    layer.set_activation_clip(torch.tensor([0.5, 1.0]))
    x = torch.randn(2, 6, 8)
    found = torch.cat(layer.rounded_parts(x), -1).reshape(2, 6, 8)
    axes = {"tensor": (0, 1, 2), "frame": (1, 2), "token": (2,)}[granularity]
    for part, factor in ((slice(0, 4), 0.5), (slice(4, 8), 1.0)):
        piece = x[..., part]
        low, high = piece.amin(axes, keepdim=True) * factor, piece.amax(axes, keepdim=True) * factor
        scale = (high - low) / 15
        zero = torch.round(-low / scale)
        torch.testing.assert_close(found[..., part], ((torch.round(piece / scale) + zero).clamp(0, 15) - zero) * scale)


def test_long_tails_are_cut_and_flat_values_are_not() -> None:
    """Of a flat distribution nothing is worth cutting; of normal values with one far out nearly all levels would be wasted."""
    torch.manual_seed(0)
    module = nn.Linear(8, 8)
    net = nn.Sequential(module)
    x = torch.cat([torch.rand(500, 4) * 2 - 1, torch.randn(500, 4)], 1)
    x[0, 6] = 30.0

    class Sequence:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> tiny.Call:
            return tiny.Call(x, torch.tensor([0]), x, {})

    net.forward = lambda x, *_: module(x)  # type: ignore[method-assign]
    layer = QuantLayer.from_float(module, LayerPlan(8, 4, (4, 4)))
    found = clip.search_clips(net, {"0": layer}, Sequence(), [4, 8], power=2.0)["0"]
    assert found[4][0] == 1 and found[4][1] <= 0.7
    assert found[8][1] > found[4][1], "with more levels less is worth cutting"


def test_the_factor_lowers_the_error_of_what_is_rounded() -> None:
    net = tiny.network()
    calls, made = tiny.calls(net), layers(net, LayerPlan(4, 4, rotate=True))
    found = clip.search_clips(net, made, calls, [4], power=2.0)
    seen: dict[str, torch.Tensor] = {}
    handle = net.down.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))
    tiny.run(net, calls[0])
    handle.remove()
    layer, wide = made["down"], layers(net, LayerPlan(4, 4, rotate=True))["down"]
    layer.set_activation_clip(found["down"][4])
    assert bool((found["down"][4] < 1).any())
    with torch.no_grad():
        target = torch.cat(layer.input_parts(seen["x"]), 1)
        errors = [float((torch.cat(one.rounded_parts(seen["x"]), 1) - target).pow(2).mean()) for one in (layer, wide)]
    assert errors[0] < errors[1]


def test_what_is_refused() -> None:
    layer = QuantLayer.from_float(nn.Linear(8, 3), LayerPlan(4, 4, (4, 4)), "body")
    with pytest.raises(QuantError, match=r"body: activation factors \[0.5\] are not one above 0 and up to 1 for each of 2 parts"):
        layer.set_activation_clip(torch.tensor([0.5]))
    layer.set_static_activations(torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(QuantError, match="body: its activation ranges are static"):
        layer.set_activation_clip(torch.tensor([0.5, 1.0]))
    net = tiny.network()
    net.unused = nn.Linear(16, 16)
    with pytest.raises(QuantError, match="unused: never ran on the 4 calibration samples"):
        clip.search_clips(net, layers(net, LayerPlan(4, 4)), tiny.calls(net), [4])
