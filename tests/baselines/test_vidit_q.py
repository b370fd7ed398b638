"""ViDiT-Q against its formula in NumPy float64, what each part brings, and its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import baselines  # noqa: F401  (registers the methods)
from qvsr.quant import apply, checkpoint
from qvsr.quant.by_timestep import ByTimestep
from qvsr.quant.layer import QuantError
from qvsr.quant.observe import observe_inputs
from qvsr.registry import BASELINES

HEADER = {"method": "vidit_q", "bits": "W4A4", "backbone": "tiny"}


def uneven() -> tiny.Net:
    """A network with channels of very different size in front of most layers."""
    net = tiny.network(32)
    spread = torch.logspace(-1, 1, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    net.body.weight.mul_(spread.view(-1, 1, 1, 1))
    net.down.weight.mul_(spread.repeat(2).view(-1, 1, 1, 1))
    return net


def error(bits: int = 4, **settings: object) -> float:
    net = uneven()
    calls = tiny.calls(net, 4, 32)
    quantized = BASELINES["vidit_q"](net, calls, tiny.spec("vidit_q", bits, bits, **settings))
    return sum(tiny.relative_error(tiny.run(quantized, one), one.out) for one in calls)


def grid(x: np.ndarray, axis: int, bits: int) -> np.ndarray:
    """Nearest of 2^bits levels between minimum and maximum along an axis; 0 is one of them where it lies between."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    step = (high - low) / (2**bits - 1)
    lowest = np.round(low / step)
    return np.clip(np.round(x / step), lowest, lowest + 2**bits - 1) * step


def test_one_layer_by_hand() -> None:
    """Tokens with a range each: y = Q(x m H) Q(W / m H)^T with the paper's m."""
    net = uneven()
    calls, weight = tiny.calls(net, 3, 32), net.tokens.weight.double().numpy()
    inputs: list[Tensor] = []
    with observe_inputs({"tokens": net.tokens}, lambda _name, x: inputs.append(x)):
        for one in calls:
            tiny.run(net, one)
    quantized = BASELINES["vidit_q"](net, calls, tiny.spec("vidit_q", 4, 4, granularity="native", alpha=0.3, ema=0.8))
    means = [np.abs(x.double().numpy()).max(1).mean(0) for x in inputs]
    amax = 0.8 * (0.8 * means[0] + 0.2 * means[1]) + 0.2 * means[2]
    m = np.abs(weight).max(0) ** 0.3 / amax**0.7
    rotation = quantized.tokens.rotation_0.double().numpy()
    x = inputs[0].double().numpy()
    expected = grid(x * m @ rotation, -1, 4) @ grid(weight / m @ rotation, 1, 4).T
    with torch.no_grad():
        found = quantized.tokens(inputs[0]).double().numpy()
    assert np.mean((found - expected) ** 2) < 1e-4 * np.mean(expected**2)  # values within float32 rounding of a half may round either way
    assert np.median(np.abs(found - expected)) < 1e-5 * np.abs(expected).max()


def test_balance_and_rotation_each_lower_the_error() -> None:
    plain = error(balance=False, rotation=False)
    balance, rotation = error(rotation=False), error(balance=False)
    assert balance < 0.8 * plain and rotation < 0.95 * plain
    assert error() < plain


def test_finer_ranges_are_closer() -> None:
    shared, frame, token = error(), error(granularity="native", native_activations="frame"), error(granularity="native")
    assert token < frame < shared
    assert error(8) < 0.05 * shared


def test_granularity_of_each_layer() -> None:
    net = tiny.network()
    layers = apply.quant_layers(BASELINES["vidit_q"](net, tiny.calls(net), tiny.spec("vidit_q", granularity="native")))
    assert layers["tokens"].act_granularity_used == "token"
    assert {layers[name].act_granularity_used for name in ("body", "line", "temporal_conv")} == {"frame"}
    assert all(layer.smooth is not None and all(layer.rotated) for layer in layers.values())
    assert not hasattr(net.body, "rows")


def test_groups_of_timesteps_have_a_balance_of_their_own(tmp_path: Path) -> None:
    """The tiny network's calls are at timesteps 0, 100, 200, 300."""
    settings = tiny.spec("vidit_q", timestep_bounds=(150, 1000))
    net = uneven()
    calls = tiny.calls(net, 4, 32)
    quantized = BASELINES["vidit_q"](net, calls, settings)
    forms = quantized.body
    assert isinstance(forms, ByTimestep) and not torch.equal(forms.rows[0].smooth, forms.rows[1].smooth)
    early = uneven()
    BASELINES["vidit_q"](early, calls[:2], tiny.spec("vidit_q"))
    assert torch.equal(forms.rows[0].smooth, early.body.smooth) and torch.equal(forms.rows[0].integers(), early.body.integers())
    for one in calls[:2]:
        assert torch.equal(tiny.run(quantized, one), tiny.run(early, one))
    assert not torch.equal(tiny.run(quantized, calls[2]), tiny.run(early, calls[2]))
    checkpoint.save(quantized, tmp_path / "q", HEADER)
    loaded = checkpoint.load(tmp_path / "q", uneven())
    assert all(torch.equal(tiny.run(loaded, one), tiny.run(quantized, one)) for one in calls)


def test_a_single_bound_is_no_group() -> None:
    net = tiny.network()
    assert not any(
        isinstance(m, ByTimestep)
        for m in BASELINES["vidit_q"](net, tiny.calls(net), tiny.spec("vidit_q", timestep_bounds=(1000,))).modules()
    )


@pytest.mark.parametrize("granularity", ["shared", "native"])
def test_two_runs_give_the_same_file_and_it_comes_back(tmp_path: Path, granularity: str) -> None:
    for name in ("a", "b"):
        net = tiny.network()
        calls = tiny.calls(net)
        checkpoint.save(BASELINES["vidit_q"](net, calls, tiny.spec("vidit_q", granularity=granularity)), tmp_path / name, HEADER)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = checkpoint.load(tmp_path / "a", tiny.network())
    assert all(torch.equal(tiny.run(loaded, one), tiny.run(net, one)) for one in calls)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timestep_bounds": (500, 100)}, r"timestep_bounds \[500, 100\] do not rise"),
        ({"timestep_bounds": (500, 1000), "balance": False}, "timestep_bounds are those of the channel balance, and balance is false"),
        ({"timestep_bounds": (500, 1000)}, r"no calibration sample in the timestep group up to 1000"),
        ({"beta": 1}, "beta"),
    ],
)
def test_refusals(settings: dict[str, object], message: str) -> None:
    net = tiny.network()
    with pytest.raises(ValueError, match=message):
        BASELINES["vidit_q"](net, tiny.calls(net), tiny.spec("vidit_q", **settings))


def test_without_balance_no_samples_are_needed() -> None:
    with pytest.raises(QuantError, match="the calibration set is empty"):
        BASELINES["vidit_q"](tiny.network(), [], tiny.spec("vidit_q"))
    assert apply.quant_layers(BASELINES["vidit_q"](tiny.network(), [], tiny.spec("vidit_q", balance=False)))
