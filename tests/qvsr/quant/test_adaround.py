"""Learned rounding against all roundings of layers so small that these can be counted out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from qvsr.quant.adaround import Rounding, beta_at, learn_rounding, rectified_sigmoid
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer
from qvsr.quant.reconstruct import Unit, UnitCall

TOP = 15


def problem(inputs: int, seed: int) -> tuple[nn.Linear, QuantLayer, Tensor]:
    """A layer of one output and inputs that vary together, where the nearest integers are often not the best."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(inputs, 1, bias=False).requires_grad_(False)
    module.weight.copy_(torch.rand(1, inputs, generator=generator) * 2 - 1)
    layer = QuantLayer.from_float(module, LayerPlan(4, 8), "layer")
    layer.set_weight_ranges([(torch.full((1, 1), -1.5), torch.full((1, 1), 1.5))])
    return module, layer, torch.randn(32, inputs, generator=generator) + 2 * torch.randn(32, 1, generator=generator)


def errors(module: nn.Linear, layer: QuantLayer, x: Tensor) -> dict[tuple[int, ...], float]:
    """Squared output error of every choice of the integers below and above the weights, in float64."""
    w, x = module.weight[0].double(), x.double()
    scale, zero = layer.weight_scale.double().item(), layer.weight_zero_point.double().item()
    found = {}
    for up in itertools.product((0, 1), repeat=len(w)):
        q = (torch.floor(w / scale) + torch.tensor(up) + zero).clamp(0, TOP)
        found[tuple(q.int().tolist())] = (x @ ((q - zero) * scale - w)).pow(2).mean().item()
    return found


def learned(module: nn.Linear, layer: QuantLayer, x: Tensor, updates: int = 300) -> tuple[tuple[int, ...], Rounding]:
    rounding = Rounding(layer)
    unit = Unit("layer", module, ("layer",))
    learn_rounding(unit, {"layer": rounding}, [UnitCall((x,), module(x))], updates, 1, 0.1, 0.1, 0.2, 0)
    return tuple(rounding.integers()[0].tolist()), rounding


@pytest.mark.parametrize(("inputs", "seed"), [(2, 1), (2, 6), (2, 20), (3, 1), (3, 4), (3, 6), (3, 8), (3, 17)])
def test_finds_the_best_of_all_roundings_where_the_nearest_is_not(inputs: int, seed: int) -> None:
    module, layer, x = problem(inputs, seed)
    counted = errors(module, layer, x)
    best = min(counted, key=counted.__getitem__)
    assert tuple(layer.integers()[0].tolist()) != best
    found, rounding = learned(module, layer, x)
    assert found == best
    h = rectified_sigmoid(rounding.v)
    assert ((h < 1e-3) | (h > 1 - 1e-3)).all(), "decided at the end"


@pytest.mark.parametrize("inputs", [2, 3])
def test_mostly_the_best_and_never_worse_than_the_nearest(inputs: int) -> None:
    """The loss has local minima, so not every layer ends at the best rounding."""
    hits = nearest_hits = 0
    for seed in range(12):
        module, layer, x = problem(inputs, seed)
        counted = errors(module, layer, x)
        nearest, (found, _) = tuple(layer.integers()[0].tolist()), learned(module, layer, x)
        assert counted[found] <= counted[nearest] * (1 + 1e-5)  # float32 decides, float64 counts
        hits += counted[found] == min(counted.values())
        nearest_hits += counted[nearest] == min(counted.values())
    assert hits >= 9 and hits > nearest_hits


def test_starts_at_the_weight_itself_and_at_the_nearest_integers() -> None:
    torch.manual_seed(0)
    layer = QuantLayer.from_float(nn.Conv2d(6, 5, 3), LayerPlan(4, 8, (2, 4)), "c")
    wide = torch.ones(5, 1, 1, 1)
    layer.set_weight_ranges([(-wide, wide), (-2 * wide, wide)])  # nothing is cut off
    rounding = Rounding(layer)
    assert torch.allclose(rounding.soft(), layer.weight, atol=1e-6)
    assert torch.equal(rounding.integers(), layer.integers())
    assert torch.equal(rounding.hard(), torch.cat(layer.quantized_weights(), 1))


def test_beta_falls_from_20_to_2_after_the_warmup() -> None:
    betas = [beta_at(update, 100, 0.2) for update in range(100)]
    assert betas[:20] == [None] * 20 and betas[20] == 20 and betas[99] == pytest.approx(2 + 18 / 80)
    assert {round(a - b, 9) for a, b in itertools.pairwise(betas[20:])} == {18 / 80}
    assert beta_at(0, 10, 0.0) == 20


def test_regulariser_by_hand() -> None:
    rounding = Rounding(problem(3, 0)[1])
    rounding.v.data = torch.tensor([[0.0, 50.0, -50.0]])
    assert rounding.indecision(2.0).item() == pytest.approx(1.0)  # 1 of the undecided one, 0 of the others
    rounding.v.data = torch.full((1, 3), torch.logit(torch.tensor((0.75 + 0.1) / 1.2)).item())
    assert rounding.indecision(4.0).item() == pytest.approx(3 * (1 - 0.5**4), rel=1e-5)


def test_layers_that_cannot_stand_in_are_refused() -> None:
    layer = QuantLayer.from_float(nn.Linear(8, 8), LayerPlan(4, 4, rotate=True), "x.y")
    with pytest.raises(QuantError, match=r"x\.y: a layer that is smoothed, shifted, rotated or has a branch cannot be reconstructed"):
        Rounding(layer)
    with pytest.raises(QuantError, match=r"x\.z: a layer that is smoothed, shifted,"):
        Rounding(QuantLayer.from_float(nn.Linear(8, 8), LayerPlan(4, 4), "x.z", offset=torch.ones(8)))
