"""Channel statistics against loops, factors against their formula, and layers that are exact in float64 without rounding."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from qvsr.quant import affine, apply
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer
from qvsr.quant.observe import observe_inputs
from qvsr.quant.smoothing import channel_amax, factors, input_amax, weight_amax

EXCLUDE = ("time_embed.0", "head", "out")


def test_channel_statistics_by_loops() -> None:
    torch.manual_seed(0)
    weight, maps, tokens = torch.randn(5, 3, 2, 2), torch.randn(2, 3, 4, 4), torch.randn(2, 7, 3)
    for k in range(3):
        assert weight_amax(weight)[k] == max(abs(float(v)) for v in weight[:, k].flatten())
        for b in range(2):
            assert channel_amax(maps, linear=False)[b, k] == np.abs(maps[b, k].numpy()).max()
            assert channel_amax(tokens, linear=True)[b, k] == np.abs(tokens[b, :, k].numpy()).max()
    assert torch.equal(channel_amax(torch.tensor([[1.0, -2.0]]), linear=True), torch.tensor([[1.0, 2.0]]))


def recorded(net: tiny.Net, calls: list[tiny.Call], name: str) -> list[Tensor]:
    inputs: list[Tensor] = []
    with observe_inputs({name: net.get_submodule(name)}, lambda _name, x: inputs.append(x)):
        for one in calls:
            tiny.run(net, one)
    return inputs


def test_largest_and_moving_average_by_timestep() -> None:
    """The tiny network's calls are at timesteps 0, 100, 200, 300."""
    net = tiny.network()
    calls = tiny.calls(net)
    layers = apply.quantizable(net, EXCLUDE)
    largest, averaged = input_amax(net, layers, calls), input_amax(net, layers, calls, (100, 999), ema=0.9)
    assert list(largest) == list(layers)
    inputs = [x.double().numpy() for x in recorded(net, calls, "body")]
    np.testing.assert_allclose(largest["body"].numpy(), np.abs(np.stack(inputs)).max((0, 1, 3, 4))[None], rtol=1e-6)
    means = [np.abs(x).max((2, 3)).mean(0) for x in inputs]
    expected = [0.9 * means[0] + 0.1 * means[1], 0.9 * means[2] + 0.1 * means[3]]
    np.testing.assert_allclose(averaged["body"].numpy(), expected, rtol=1e-6)
    tokens = np.stack([np.abs(x.numpy()).max((0, 1)) for x in recorded(net, calls, "tokens")]).max(0)
    np.testing.assert_allclose(largest["tokens"][0].numpy(), tokens, rtol=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.0), (0.25, 0.75), (1.0, 1.0)])
def test_factors_are_the_formula_up_to_a_common_factor(alpha: float, beta: float) -> None:
    rng = np.random.default_rng(0)
    amax, wmax = rng.uniform(0.1, 9, 12), rng.uniform(0.01, 2, 12)
    found = factors(torch.tensor(amax), torch.tensor(wmax), alpha, beta).numpy()
    ratio = found / (amax**alpha / wmax**beta)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)
    assert np.log(found).mean() == pytest.approx(0, abs=1e-12)


def test_dead_channels_and_no_exponents_keep_one() -> None:
    amax, wmax = torch.tensor([0.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 2.0])
    assert factors(amax, wmax, 0.5, 0.5).tolist() == [1, 1, 1]
    assert factors(torch.zeros(3), torch.zeros(3), 0.5, 0.5).tolist() == [1, 1, 1]
    assert factors(torch.rand(9), torch.rand(9), 0, 0).tolist() == [1] * 9


@pytest.mark.parametrize("name", ["tokens", "line", "body", "down", "temporal_conv"])
@pytest.mark.parametrize(("rotate", "rank"), [(False, 0), (True, 3)])
def test_smoothing_is_exact_in_float64(name: str, rotate: bool, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.network()
    x = recorded(net, tiny.calls(net, 1), name)[0].double()
    module: nn.Module = net.get_submodule(name).double()
    smooth = factors(channel_amax(x, isinstance(module, nn.Linear)).amax(0), weight_amax(module.weight), 0.6, 0.4)
    assert smooth.max() > 1.05 * smooth.min()
    layer = QuantLayer.from_float(module, LayerPlan(4, 4, rotate=rotate, rank=rank), name, smooth=smooth)
    monkeypatch.setattr(affine, "round_to_grid", lambda x, *_a, **_k: x)
    monkeypatch.setattr(affine, "fake_quantize", lambda x, *_a: x)
    with torch.no_grad():
        assert (layer(x) - module(x)).abs().max() < 1e-13


def test_refusals_name_what_is_missing() -> None:
    net = tiny.network()
    calls, layers = tiny.calls(net), apply.quantizable(net, EXCLUDE)
    with pytest.raises(QuantError, match="smoothing: the calibration set is empty"):
        input_amax(net, layers, [])
    with pytest.raises(
        QuantError, match=r"no calibration sample in the timestep group up to 1000 of \[500, 1000\]; raise calibration.steps"
    ):
        input_amax(net, layers, calls, (500, 1000))
    with pytest.raises(QuantError, match="idle: did not run in the calibration samples"):
        input_amax(net, {"idle": nn.Linear(2, 2)}, calls)
