"""Trained rounding against its gradient written out, and adapted layers against the quantized layers that they hand over to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qvsr.quant import affine
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer
from qvsr.quant.qalora import AdaptedLayer, StepGrids, round_trained

MODULES = {
    "Linear": (lambda: nn.Linear(6, 5), (3, 7, 6)),
    "Conv1d": (lambda: nn.Conv1d(6, 5, 3, padding=1), (3, 6, 9)),
    "Conv2d": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (3, 6, 8, 8)),
    "Conv3d": (lambda: nn.Conv3d(6, 5, (3, 1, 1), padding=(1, 0, 0), bias=False), (1, 6, 5, 4, 4)),
}


def quant_layer(module: nn.Module, low: float = -1.0, high: float = 1.5, plan: LayerPlan | None = None) -> QuantLayer:
    layer = QuantLayer.from_float(module.requires_grad_(False), plan or LayerPlan(4, 4), "a")
    layer.set_static_activations(torch.tensor([[low]]), torch.tensor([[high]]))
    return layer


def adapted(module: nn.Module, bounds: tuple[int, ...] = (10, 20), rank: int = 3, rounded: bool = False) -> tuple[AdaptedLayer, StepGrids]:
    layer = quant_layer(module)
    grids = StepGrids({"a": layer}, bounds)
    return AdaptedLayer(module, layer, grids, "a", rank, rounded), grids


def written_out(x: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Elementwise derivatives after x, scale and zero point, in float64."""
    q = torch.round(x / scale) + zero.round()
    inside = (q >= 0) & (q <= top)
    by_scale = torch.where(inside, torch.round(x / scale) - x / scale, q.clamp(0, top) - zero.round())
    return inside.double(), by_scale, torch.where(inside, 0.0, -scale)


@pytest.mark.parametrize(("shape", "zero"), [((), 5.3), ((4, 1), -2.0), ((4, 1), 7.4)], ids=["tensor", "no zero inside", "channel"])
def test_rounding_and_its_gradients(shape: tuple[int, ...], zero: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(4, 300, generator=generator, dtype=torch.float64)
    scale, zero_point = (
        0.2 + 0.1 * torch.rand(shape, generator=generator, dtype=torch.float64),
        torch.full(shape, zero, dtype=torch.float64),
    )
    upstream = torch.randn(4, 300, generator=generator, dtype=torch.float64)
    leaves = [value.clone().requires_grad_(True) for value in (x, scale, zero_point)]
    out = round_trained(*leaves, 4)
    assert torch.equal(out, affine.fake_quantize(x, scale, zero_point.round(), 4))
    out.backward(upstream)
    for leaf, derivative in zip(leaves, written_out(x, scale, zero_point, 15), strict=True):
        expected = (upstream * derivative).sum_to_size(leaf.shape)
        assert torch.allclose(leaf.grad, expected, rtol=1e-12, atol=1e-12)
    assert leaves[2].grad.abs().min() > 0


def test_the_gradient_of_what_is_cut_off_is_the_true_derivative() -> None:
    """Beyond the range no rounding is passed straight through, so central differences must give the same."""
    x, zero, step = torch.tensor([-9.0, 9.0, 30.0], dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64), 1e-6
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    round_trained(x, scale, zero, 4).sum().backward()
    with torch.no_grad():
        up, down = (round_trained(x, scale + sign * step, zero, 4).sum() for sign in (1, -1))
    assert scale.grad.item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-6)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("rounded", [False, True])
def test_the_quantized_layer_computes_what_was_trained(kind: str, rounded: bool) -> None:
    torch.manual_seed(0)
    make, shape = MODULES[kind]
    module = make()
    layer, grids = adapted(module, rounded=rounded)
    layer.up.normal_(0, 0.1)
    layer.scale.mul_(0.9 + 0.2 * torch.rand_like(layer.scale))
    grids.scales[1].mul_(1.3)
    grids.zero_points[1].add_(1.6)
    x, expected = torch.randn(shape), {}
    with torch.no_grad():
        for row in range(2):
            grids.row = row
            expected[row] = layer(x)
    scale, zero = (value.double() for value in (layer.scale, layer.zero_point))
    base = module.weight.double()
    if rounded:
        start = layer.layer[0].weight_scale.view_as(zero).double()
        base = start * ((torch.round(base / start) + zero).clamp(0, 15) - zero)
    summed = base + (layer.up.double() @ layer.down.double().flatten(1)).view(base.shape)
    grids.give()
    layer.give()
    given = layer.layer[0]
    assert torch.equal(given.integers().double(), (torch.round(summed / scale) + zero).clamp(0, 15))
    assert not given.is_open and given.rank == 0 and given.act_zero_point.tolist()[1][0] == given.act_zero_point.tolist()[0][0] + 2
    for row, timestep in enumerate((10, 11)):
        given.timestep.value = timestep
        with torch.no_grad():
            assert torch.allclose(given(x), expected[row], atol=1e-5)  # the same sums in another order
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


def test_an_adapted_layer_starts_as_the_rounded_one() -> None:
    module = nn.Conv2d(6, 5, 3, padding=1)
    for rank in (0, 3, 99):
        layer, _ = adapted(module, rank=rank)
        weight = layer.layer[0].quantized_weights()[0]
        assert torch.equal(layer.weight(), weight) and not torch.equal(weight, module.weight)
        assert layer.up.shape == (5, min(rank, 5)) and layer.down.shape == (min(rank, 5), 6, 3, 3)


def test_low_rank_start_depends_on_the_seed_and_the_name_alone() -> None:
    module = nn.Linear(6, 5)
    layer = quant_layer(module)
    grids = StepGrids({"a": layer, "b": layer}, (10,))
    first = AdaptedLayer(module, layer, grids, "a", 3, seed=1).down
    torch.rand(7)
    assert torch.equal(first, AdaptedLayer(module, layer, grids, "a", 3, seed=1).down)
    assert not torch.equal(first, AdaptedLayer(module, layer, grids, "b", 3, seed=1).down)
    assert not torch.equal(first, AdaptedLayer(module, layer, grids, "a", 3, seed=2).down)
    assert 0.2 < first.abs().max() <= 6**-0.5


class Network(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.a = layer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.a(x)


def test_a_call_trains_the_row_of_its_timestep() -> None:
    layer, grids = adapted(nn.Linear(6, 5), (100, 300, 500))
    for parameter in (*grids.scales, *grids.zero_points, layer.up, layer.scale):
        parameter.requires_grad_(True)
    network = Network(layer)
    with grids.follow(network):
        network(torch.randn(4, 6), torch.tensor([200])).square().sum().backward()
        assert grids.row == 1
        with pytest.raises(QuantError, match=r"one timestep a call, found \[1, 2\]"):
            network(torch.randn(4, 6), torch.tensor([1, 2]))
    assert [row.grad is not None for row in grids.scales] == [False, True, False]
    assert [row.grad is not None for row in grids.zero_points] == [False, True, False]
    assert layer.up.grad.abs().sum() > 0 and layer.scale.grad.abs().sum() > 0
    network(torch.randn(4, 6), torch.tensor([400]))
    assert grids.row == 1, "the hook is gone"


def test_scales_stay_above_the_smallest() -> None:
    module = nn.Linear(6, 5)
    layer = quant_layer(module, plan=LayerPlan(4, 4, scale_floor=0.01))
    grids = StepGrids({"a": layer}, (1, 2))
    trained = AdaptedLayer(module, layer, grids, "a", 2)
    grids.scales[0].fill_(-3.0)
    trained.scale.fill_(-3.0)
    assert grids.of("a")[0].item() == pytest.approx(0.01)
    grids.give()
    trained.give()
    assert layer.act_scale[0].item() == pytest.approx(0.01) and layer.act_scale[1].item() == pytest.approx(2.5 / 15)
    assert layer.weight_scale.unique().tolist() == [pytest.approx(0.01)]


def test_layers_that_cannot_be_adapted_are_refused() -> None:
    module = nn.Linear(6, 5)
    layer = QuantLayer.from_float(module, LayerPlan(4, 4), "a.b")
    with pytest.raises(QuantError, match=r"a\.b: grids by timestep start from one static range of one part; set it first"):
        StepGrids({"a.b": layer}, (1,))
    layer = quant_layer(module)
    grids = StepGrids({"a": layer}, (1,))
    with pytest.raises(QuantError, match=r"bounds \[5, 3\] do not rise"):
        StepGrids({"a": layer}, (5, 3))
    rotated = QuantLayer.from_float(nn.Linear(8, 8), LayerPlan(4, 4, rotate=True), "r")
    with pytest.raises(QuantError, match="r: a layer that is smoothed, shifted, rotated or has a branch"):
        AdaptedLayer(module, rotated, grids, "a", 2)
    layer.freeze()
    with pytest.raises(QuantError, match="a: B and A are trained beside the floating-point weight of one part; this layer is frozen"):
        AdaptedLayer(module, layer, grids, "a", 2)
