"""Training of a few parameters: the loss falls, nothing else moves, two runs agree."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch

from qvsr.quant import apply, refine
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer, halves
from qvsr.quant.refine import Curve, mean_loss, train


def quantized(width: int = 16) -> tuple[tiny.Net, list[tiny.Call]]:
    net = tiny.network(width)
    calls = tiny.calls(net, 4, width)
    apply.quantize_layers(
        net, ["time_embed.0", "head", "out"], lambda n, m: QuantLayer.from_float(m, LayerPlan(4, 8, halves(m.weight.shape[1]), True, 2), n)
    )
    return net, calls


def branches(net: tiny.Net) -> list[torch.nn.Parameter]:
    return [p for layer in apply.quant_layers(net).values() for p in (layer.up, layer.down)]


def fit(updates: int = 30, seed: int = 0) -> tuple[tiny.Net, list[tiny.Call], Curve]:
    net, calls = quantized()
    return net, calls, train(net, branches(net), calls, updates, 2, 1e-3, 0.01, seed)


def test_loss_falls_on_the_calibration_samples() -> None:
    net, calls, curve = fit()
    assert curve.after < curve.before and len(curve.updates) == 30
    assert curve.after == pytest.approx(mean_loss(net, calls, range(4)))


def test_only_the_parameters_move_and_gradients_are_off_again() -> None:
    before, _ = quantized()
    net, _, _ = fit()
    trained = {id(p) for p in branches(net)}
    for (name, old), new in zip(before.named_parameters(), net.parameters(), strict=True):
        assert torch.equal(old, new) != (id(new) in trained), name
        assert not new.requires_grad and new.grad is None
    for old, new in zip(apply.quant_layers(before).values(), apply.quant_layers(net).values(), strict=True):
        assert torch.equal(old.weight_scale, new.weight_scale), "ranges stay those of the first residual"


def test_two_runs_agree_and_the_seed_matters() -> None:
    assert fit(4)[2] == fit(4)[2]
    assert fit(4)[2].updates != fit(4, seed=1)[2].updates


def kept_for_backward(net: tiny.Net, call: tiny.Call) -> list[tuple[int, ...]]:
    """Shapes of what a call keeps until its backward pass."""
    shapes = []
    for parameter in branches(net):
        parameter.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: (shapes.append(tuple(saved.shape)), saved)[1], lambda saved: saved):
        refine.call(net, call)
    return shapes


def test_a_large_network_trains_the_same_without_keeping_rounded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    small = fit(3)[2]
    net, calls = quantized()
    weights = {tuple(layer.weight.shape) for layer in apply.quant_layers(net).values()}
    assert weights & set(kept_for_backward(net, calls[0]))
    monkeypatch.setattr(refine, "LARGE", 1)
    with refine.recomputed(net):
        assert not weights & set(kept_for_backward(net, calls[0]))
        mean_loss(net, calls, range(2))
        assert all(layer._cache is None and layer._grid is None for layer in apply.quant_layers(net).values())
    assert all("forward" not in vars(layer) for layer in apply.quant_layers(net).values())
    net, calls = quantized()
    with refine.recomputed(net):
        assert train(net, branches(net), calls, 3, 2, 1e-3, 0.01, 0) == small


def test_rate_falls_to_a_fifth_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (rates.append(self.param_groups[0]["lr"]), step(self, *a, **k))[1])
    fit(6)
    assert rates == pytest.approx([1e-3] * 3 + [2e-4] * 3)
    net, calls = quantized()
    rates.clear()
    train(net, branches(net), calls, 4, 1, 1e-3, 0.0, 0, factor=0.1)
    assert rates == pytest.approx([1e-3] * 2 + [1e-4] * 2)


def test_training_that_does_not_lower_the_loss_is_undone(caplog: pytest.LogCaptureFixture) -> None:
    net, calls = quantized()
    start = [parameter.clone() for parameter in branches(net)]
    with caplog.at_level(logging.INFO, logger="qvsr.quant.refine"):
        curve = train(net, branches(net), calls, 3, 1, 0.5, 0.0, 0)
    assert curve.after > curve.before and not curve.summary()["kept"]
    assert "did not fall, so the parameters stay as they were" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(start, branches(net), strict=True))
    assert mean_loss(net, calls, range(4)) == pytest.approx(curve.before)


def test_messages() -> None:
    net, calls = quantized()
    with pytest.raises(QuantError, match="refine: the calibration set is empty"):
        train(net, branches(net), [], 1, 1, 1e-3, 0.0, 0)
    calls[0].out = calls[0].out + float("nan")
    with pytest.raises(QuantError, match="the loss is nan at update 1 of 1; lower learning_rate"):
        train(net, branches(net), calls[:1], 1, 1, 1e-3, 0.0, 0)


def test_summary_is_short() -> None:
    summary = Curve(2.0, 1.0, tuple(float(k) for k in range(100))).summary(10)
    assert summary["updates"] == 100 and summary["curve"][:2] == [4.5, 14.5] and len(summary["curve"]) == 10
