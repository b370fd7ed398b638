"""Training that is interrupted ends in the same weights."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from qvsr.config import TrainingStage
from qvsr.training.loop import Loss, OutOfTime, fit, learning_rate

STAGE = TrainingStage(steps=30, batch=4, learning_rate=0.05, ema=0.9, log_every=5, save_every=7)


def draw(rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    return (torch.randn(8, 3, generator=rng),)


def problem() -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss(x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value = (model(x) - x.sum(1, keepdim=True)).square().mean()
        return value, {"bias": model.bias.detach().sum()}

    return model, loss


def test_it_learns(tmp_path: Path) -> None:
    model, loss = problem()
    fit(model, draw, loss, TrainingStage(steps=300, batch=4, learning_rate=0.05, ema=0.9), "toy", tmp_path, seed=1)
    assert torch.allclose(model.weight, torch.ones(1, 3), atol=0.05)  # least squares with the answer in reach


def test_interrupted_equals_uninterrupted(tmp_path: Path) -> None:
    whole, loss = problem()
    fit(whole, draw, loss, STAGE, "toy", tmp_path / "whole", seed=1)
    for _ in range(40):
        parts, loss = problem()
        try:
            # A deadline in the past stops after one step: the hardest interruption there is.
            fit(parts, draw, loss, STAGE, "toy", tmp_path / "parts", seed=1, deadline=time.monotonic() - 1)
            break
        except OutOfTime as stop:
            assert "the same command goes on" in str(stop)
    assert torch.equal(whole.weight, parts.weight)
    assert torch.equal(whole.bias, parts.bias)
    assert (tmp_path / "whole" / "toy.csv").read_text() == (tmp_path / "parts" / "toy.csv").read_text()


def test_not_finite_loss_is_named(tmp_path: Path) -> None:
    model, _ = problem()
    with pytest.raises(ValueError, match=r"toy: the loss is nan at step 5; lower training\.toy\.learning_rate"):
        fit(model, draw, lambda x: (model.weight.sum() * float("nan"), {}), STAGE, "toy", tmp_path, seed=1)


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model, loss = problem()
    fit(model, draw, loss, STAGE, "toy", tmp_path, seed=1)
    other = nn.Linear(4, 1)
    with pytest.raises(ValueError, match=r"toy\.state\.safetensors is of another configuration: weight .*delete it to train anew"):
        fit(other, draw, lambda x: (other.weight.sum(), {}), STAGE, "toy", tmp_path, seed=1)


def test_learning_rate_warms_up_and_falls() -> None:
    stage = TrainingStage(steps=1000, batch=1, learning_rate=1.0)
    rates = [learning_rate(step, stage) for step in range(1000)]
    assert rates[0] == pytest.approx(0.05)  # a twentieth: 2 % of 1000 steps are the warm-up
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01, abs=1e-4)
    assert all(a >= b for a, b in pairwise(rates[20:]))
