"""The range search against a search written in numpy, value by value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from qvsr.quant import search
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer


def brute_force(x: np.ndarray, bits: int) -> tuple[float, float]:
    """Range of the smallest mean |x - xq|^2.4 among 80, in float64."""
    low, high, top = x.min(), x.max(), 2**bits - 1
    results = []
    for k in range(80):
        lo, hi = low * (1 - 0.01 * k), high * (1 - 0.01 * k)
        scale = max((hi - lo) / top, 1e-4)
        zero = np.round(-lo / scale)
        xq = (np.clip(np.round(x / scale) + zero, 0, top) - zero) * scale
        results.append((np.mean(np.abs(x - xq) ** 2.4), k))
    k = min(results)[1]
    return low * (1 - 0.01 * k), high * (1 - 0.01 * k)


def heavy_tailed(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values with a few outliers, which a range is better off without."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x * x.abs()


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", [(6, 40), (5, 7, 3, 3)])
def test_weight_ranges_per_channel(bits: int, shape: tuple[int, ...]) -> None:
    weight = heavy_tailed(*shape)
    low, high = search.weight_range(weight, bits)
    assert low.shape == high.shape == (shape[0], *(1,) * (len(shape) - 1))
    expected = [brute_force(channel.double().numpy().ravel(), bits) for channel in weight]
    # float32 may break a near tie between neighbouring factors the other way; such a tie costs nothing
    assert torch.allclose(low.flatten(), torch.tensor([e[0] for e in expected]).float(), rtol=1e-5)
    assert torch.allclose(high.flatten(), torch.tensor([e[1] for e in expected]).float(), rtol=1e-5)
    if bits == 3:
        assert (high < weight.amax(tuple(range(1, weight.dim())), keepdim=True)).any(), "few levels: outliers are cut off"


def test_a_large_weight_is_searched_in_blocks_with_the_same_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 6, 3, 3, generator=torch.Generator().manual_seed(4))
    whole = search.weight_range(weight, 4)
    calls = []
    once = search.weight_range
    monkeypatch.setattr(search, "BLOCK", 120)  # two channels of 54 weights
    monkeypatch.setattr(search, "weight_range", lambda block, *rest: (calls.append(len(block)), once(block, *rest))[1])
    blocks = search.weight_range(weight, 4)
    assert calls == [7, 2, 2, 2, 1]
    assert all(torch.equal(one, other) for one, other in zip(whole, blocks, strict=True))


def test_weight_ranges_of_what_does_not_vary() -> None:
    for value in (0.0, 2.0):
        low, high = search.weight_range(torch.full((2, 5), value), 4)
        assert torch.isfinite(low).all() and torch.isfinite(high).all()


def test_activation_ranges_over_all_calls_and_parts() -> None:
    modules = {"a": nn.Linear(12, 3), "b": nn.Conv2d(4, 2, 1)}
    layers = {
        "a": QuantLayer.from_float(modules["a"], LayerPlan(4, 4, (8, 4)), "a"),
        "b": QuantLayer.from_float(modules["b"], LayerPlan(4, 3), "b"),
    }
    tokens = [heavy_tailed(2, 9, 12, seed=k) * (1 + k) + 0.3 for k in range(3)]
    maps = [heavy_tailed(2, 4, 5, 5, seed=k + 10).relu() for k in range(3)]

    def run() -> None:
        for x, y in zip(tokens, maps, strict=True):
            modules["a"](x), modules["b"](y)

    found = search.activation_ranges(modules, layers, run)
    for part, piece in enumerate((slice(0, 8), slice(8, 12))):
        pooled = np.concatenate([x[..., piece].double().numpy().ravel() for x in tokens])
        assert [end[part].item() for end in found["a"]] == pytest.approx(brute_force(pooled, 4), rel=1e-5)
    pooled = np.concatenate([y.double().numpy().ravel() for y in maps])
    assert [end.item() for end in found["b"]] == pytest.approx(brute_force(pooled, 3), rel=1e-5)


def test_drawn_values_come_close_and_depend_on_the_seed_alone() -> None:
    module = {"a": nn.Linear(16, 2)}
    layers = {"a": QuantLayer.from_float(module["a"], LayerPlan(4, 4), "a")}
    x = heavy_tailed(500, 16)

    def search_with(values: int | None, seed: int = 0) -> float:
        return search.activation_ranges(module, layers, lambda: module["a"](x), values, seed)["a"][1].item()

    assert search_with(2000) == search_with(2000) and search_with(10**6) == search_with(None)
    assert search_with(2000) == pytest.approx(search_with(None), rel=0.15)  # a quarter of the values score, outliers weigh much
    assert len({search_with(20, seed) for seed in range(5)}) > 1


def test_a_layer_that_never_ran() -> None:
    module = {"a.b": nn.Linear(4, 2)}
    with pytest.raises(QuantError, match=r"a\.b: never ran on the calibration samples"):
        search.activation_ranges(module, {"a.b": QuantLayer.from_float(module["a.b"], LayerPlan(4, 4), "a.b")}, lambda: None)
