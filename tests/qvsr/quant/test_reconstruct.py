"""Units of a network, what they learn from, and the loop that they learn in."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from qvsr.quant import apply
from qvsr.quant.layer import QuantError
from qvsr.quant.reconstruct import Unit, UnitCall, capture, fit, units


def test_units_follow_the_network_and_hold_every_layer_once() -> None:
    unet, calls = tiny.unet()
    layers = apply.quantizable(unet, tiny.UNET_EXCLUDE)
    found = units(unet, layers)
    assert sorted(name for unit in found for name in unit.layers) == sorted(layers)
    by_name = {unit.name: unit for unit in found}
    assert "output_blocks.0.0.spade.mlp_gamma" in by_name["output_blocks.0.0"].layers
    assert "output_blocks.0.0.skip_connection" in by_name["output_blocks.0.0"].layers
    assert len(by_name["middle_block.2.transformer_blocks.0"].layers) == 10
    assert by_name["middle_block.1"].layers == ("middle_block.1.temporal_conv",)
    assert len(by_name["middle_block.3"].layers) == 4
    assert by_name["middle_block.2.proj_in"].layers == ("middle_block.2.proj_in",)
    ran: list[str] = []
    handles = [unit.module.register_forward_pre_hook(lambda _m, _a, name=unit.name: ran.append(name)) for unit in found]
    tiny.run(unet, calls[0])
    for handle in handles:
        handle.remove()
    assert ran == [unit.name for unit in found]


def test_a_unit_gets_what_the_quantized_network_gives_and_should_return_the_full_precision() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 9)).requires_grad_(False)
    x, reached = torch.randn(4, 3), []
    net[2].register_forward_pre_hook(lambda _module, _args: reached.append(True))

    def quantized() -> None:
        rounder = net[1].register_forward_pre_hook(lambda _module, args: (args[0].round(),))
        try:
            net(2 * x)
        finally:
            rounder.remove()

    seen = capture(Unit("1", net[1], ("1",)), lambda: net(x), quantized)
    assert torch.equal(seen.target, net[1](net[0](x)))
    assert torch.equal(seen.args[0], net[0](2 * x)), "not rounded yet: how it is rounded is learned"
    assert not reached, "the calls end at the unit"
    assert not net[1]._forward_hooks and not net[1]._forward_pre_hooks


def test_error_sums_channels_and_averages_the_rest() -> None:
    out, target = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    expected = (out - target).abs().double().pow(2.4)
    assert Unit("a", nn.Conv2d(5, 5, 1), ()).error(out, target, 2.4).item() == pytest.approx(expected.sum(1).mean().item(), rel=1e-5)
    assert Unit("a", nn.Linear(4, 4), ()).error(out, target, 2.4).item() == pytest.approx(expected.sum(-1).mean().item(), rel=1e-5)


def calls_of(value: float, count: int = 4) -> list[UnitCall]:
    return [UnitCall((), torch.full((1,), value)) for _ in range(count)]


def test_fit_reaches_a_known_minimum_and_turns_gradients_off() -> None:
    x = nn.Parameter(torch.zeros(1), requires_grad=False)
    losses = fit([x], calls_of(3.0), lambda call: (x - call.target).pow(2).sum(), 300, 2, 0.1, 0, "x")
    assert x.item() == pytest.approx(3, abs=1e-2) and len(losses) == 300 and not x.requires_grad
    y = nn.Parameter(torch.zeros(1), requires_grad=False)
    fit([y], calls_of(3.0), lambda call: (y - call.target).pow(2).sum(), 600, 2, 0.1, 0, "y", lambda _update: y.pow(2).sum())
    assert y.item() == pytest.approx(1.5, abs=1e-2), "the penalty weighs as much as the loss"


def test_fit_along_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a, **k: (rates.append(self.param_groups[0]["lr"]), step(self, *a, **k))[1])
    x = nn.Parameter(torch.zeros(1))
    fit([x], calls_of(1.0), lambda call: (x - call.target).pow(2).sum(), 4, 1, 0.1, 0, "x", cosine=True)
    assert rates == pytest.approx([0.1, 0.1 * (1 + 0.5**0.5) / 2, 0.05, 0.1 * (1 - 0.5**0.5) / 2])


def test_fit_refuses() -> None:
    x = nn.Parameter(torch.zeros(1))
    with pytest.raises(QuantError, match="steps of a: the calibration set is empty"):
        fit([x], [], lambda _call: x.sum(), 1, 1, 0.1, 0, "steps of a")
    with pytest.raises(QuantError, match="steps of a: the loss is nan at update 1 of 2; lower its learning rate"):
        fit([x], calls_of(float("nan")), lambda call: (x - call.target).sum(), 2, 1, 0.1, 0, "steps of a")
