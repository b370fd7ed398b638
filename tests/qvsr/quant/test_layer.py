"""The quantized layer: exact without rounding, equal in all its forms, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvsr.quant import affine
from qvsr.quant.layer import Geometry, LayerPlan, QuantError, QuantLayer, Timestep, halves

MODULES = {
    "linear": (lambda: nn.Linear(24, 10), (3, 5, 24)),
    "linear_nobias": (lambda: nn.Linear(24, 10, bias=False), (7, 24)),
    "conv1d": (lambda: nn.Conv1d(24, 10, 3, stride=2, padding=2, dilation=2), (2, 24, 15)),
    "conv2d": (lambda: nn.Conv2d(24, 10, 3, padding=1), (2, 24, 6, 5)),
    "conv2d_1x1": (lambda: nn.Conv2d(24, 10, 1), (2, 24, 6, 5)),
    "conv2d_strided": (lambda: nn.Conv2d(24, 10, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 24, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(24, 10, (3, 1, 1), padding=(1, 0, 0)), (1, 24, 5, 3, 4)),
}
each_module = pytest.mark.parametrize("name", MODULES)


def module_and_input(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    return make().requires_grad_(False).to(dtype), torch.randn(shape, dtype=dtype)


def unrounded(layer: QuantLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the rounding off: what remains must be the original layer."""
    monkeypatch.setattr(affine, "round_to_grid", lambda x, *_a, **_k: x)
    monkeypatch.setattr(affine, "fake_quantize", lambda x, *_a: x)


@each_module
@pytest.mark.parametrize("parts", [(), (12, 12), (8, 16)])
def test_transforms_and_branch_are_exact_in_float64(name: str, parts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = module_and_input(name, torch.float64)
    smooth = torch.rand(24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    layer = QuantLayer.from_float(module, LayerPlan(4, 4, parts, rotate=True, rank=3), name, smooth=smooth)
    unrounded(layer, monkeypatch)
    with torch.no_grad():
        assert (layer(x) - module(x)).abs().max() < 1e-13


@each_module
def test_against_a_dense_formula(name: str) -> None:
    """The definition written out with dense weights: round rotated halves, one layer with L1 L2, one with the residual."""
    module, x = module_and_input(name)
    layer = QuantLayer.from_float(module, LayerPlan(4, 5, halves(24), rotate=True, rank=4), name)
    linear, weight = isinstance(module, nn.Linear), module.weight
    low = (layer.up @ layer.down.flatten(1)).view(weight.shape).detach()
    xs, ws = [], []
    for part in range(2):
        rot = getattr(layer, f"rotation_{part}")
        w, a = (weight - low).split(12, 1)[part], x.split(12, -1 if linear else 1)[part]
        w = torch.einsum("nk...,kj->nj..." if linear else "nk...,jk->nj...", w, rot)
        a = a @ rot if linear else torch.einsum("bk...,jk->bj...", a, rot)
        ws.append(affine.fake_quantize(w, *affine.qparams(*affine.channel_range(w), 4), 4))
        xs.append(affine.fake_quantize(a, *affine.qparams(*affine.tensor_range(a), 5), 5))
    xq, wq = torch.cat(xs, -1 if linear else 1), torch.cat(ws, 1)
    operate = F.linear if linear else {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[weight.dim() - 2]
    how = () if linear else (module.stride, module.padding, module.dilation)
    expected = operate(xq, wq, module.bias, *how) + operate(x, low, None, *how)
    with torch.no_grad():
        found = layer(x)
    off = (found - expected).abs() > 1e-4  # a value within float rounding of a half may round either way
    assert off.float().mean() < 0.02 and (found - expected).pow(2).mean() < 1e-3 * expected.pow(2).mean()


@each_module
def test_open_training_and_frozen_forms_agree(name: str) -> None:
    module, x = module_and_input(name)
    layer = QuantLayer.from_float(module, LayerPlan(4, 4, halves(24), rotate=True, rank=3), name)
    with torch.no_grad():
        open_form = layer(x)
    layer.up.requires_grad_(True)
    training = layer(x)
    training.sum().backward()
    assert layer.up.grad is not None and layer.is_open
    layer.freeze()
    assert not layer.is_open and layer.weight is None and layer.weight_q.dtype == torch.uint8
    with torch.no_grad():
        frozen = layer(x)
    # open: products of rounded values; frozen: sums of whole numbers, scaled afterwards
    assert torch.allclose(open_form, frozen, atol=1e-5)
    # the branch is added by another operation while gradients are recorded
    assert torch.allclose(training.detach(), frozen, atol=1e-5)


@each_module
@pytest.mark.parametrize("plan", [LayerPlan(4, 4), LayerPlan(4, 4, (8, 16), rotate=True, rank=3)], ids=["plain", "all"])
def test_an_offset_is_exact_in_float64_also_at_the_border(name: str, plan: LayerPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = module_and_input(name, torch.float64)
    generator = torch.Generator().manual_seed(1)
    offset, smooth = (
        5 * torch.randn(24, dtype=torch.float64, generator=generator),
        torch.rand(24, dtype=torch.float64, generator=generator) + 0.5,
    )
    layer = QuantLayer.from_float(module, plan, name, offset=offset, smooth=smooth)
    unrounded(layer, monkeypatch)
    with torch.no_grad():
        assert (layer(x) - module(x)).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_an_offset_centres_the_input_before_it_is_divided_and_rounded(name: str) -> None:
    """Channels a thousand times farther from 0 than they are wide: nothing is left of them at 8 bits, unless the offset takes the distance away."""
    module, x = module_and_input(name)
    along = (-1,) if name == "linear" else (1, -1, 1, 1)
    offset, smooth = 1000 * torch.randn(24, generator=torch.Generator().manual_seed(1)), torch.linspace(1, 2, 24)
    x, expected = x + offset.view(along), x / smooth.view(along)
    layer = QuantLayer.from_float(module, LayerPlan(8, 8, halves(24)), name, offset=offset, smooth=smooth)
    assert torch.allclose(torch.cat(layer.input_parts(x), -1 if name == "linear" else 1), expected, atol=1e-3)  # of float32 numbers of 1000
    with torch.no_grad():
        dense = copy.deepcopy(module).double()
        error = (layer(x) - dense(x.double())).pow(2).mean().sqrt()
        assert (
            error
            < 0.02
            < (QuantLayer.from_float(module, LayerPlan(8, 8, halves(24)), name)(x) - dense(x.double())).pow(2).mean().sqrt() / 50
        )
        layer.freeze()
        again = QuantLayer.from_state(layer.geometry, layer.describe(), layer.state(), name)
        assert torch.equal(again(x), layer(x)) and again.describe() == layer.describe() and layer.describe()["offset"]


def test_a_changed_branch_is_seen() -> None:
    """The rounded weight of an open layer is kept only as long as L1 and L2 stay."""
    module, _ = module_and_input("conv2d")
    layer = QuantLayer.from_float(module, LayerPlan(4, 4, rank=3))
    with torch.no_grad():
        before = layer.quantized_weights()[0]
        layer.up.add_(0.05)
        assert not torch.equal(before, layer.quantized_weights()[0])


def test_more_bits_and_more_rank_are_closer() -> None:
    module, x = module_and_input("conv2d")
    errors = {}
    for bits, rank in ((2, 0), (4, 0), (8, 0), (4, 8)):
        layer = QuantLayer.from_float(module, LayerPlan(bits, 8, halves(24), rotate=True, rank=rank))
        with torch.no_grad():
            errors[bits, rank] = (layer(x) - module(x)).pow(2).mean().item()
    assert errors[2, 0] > errors[4, 0] > errors[8, 0] and errors[4, 8] < errors[4, 0]


def test_padding_is_exactly_zero() -> None:
    """An input far from 0 has a zero point outside its integers; the border must still see zeros."""
    module = nn.Conv2d(4, 3, 3, padding=1).requires_grad_(False)
    x = torch.rand(1, 4, 5, 5, generator=torch.Generator().manual_seed(0)) + 100
    layer = QuantLayer.from_float(module, LayerPlan(8, 8))
    with torch.no_grad():
        assert (layer(x) - module(x)).abs().max() < 0.02 * module(x).abs().max()


def test_static_ranges_follow_the_timestep() -> None:
    module, x = module_and_input("linear")
    layer = QuantLayer.from_float(module, LayerPlan(8, 8))
    layer.set_static_activations(torch.tensor([[-0.1], [-10.0]]), torch.tensor([[0.1], [10.0]]), timesteps=[100, 999])
    layer.timestep = Timestep(50)
    with torch.no_grad():
        assert layer.quantized_inputs(x)[0].abs().max() <= 0.11
        layer.timestep.value = 101
        assert layer.quantized_inputs(x)[0].abs().max() > 1
        layer.timestep.value = 2000  # beyond the table: its last row
        assert layer.quantized_inputs(x)[0].abs().max() > 1
    layer.timestep = Timestep()
    with pytest.raises(QuantError, match="ranges depend on the timestep, and none was set"), torch.no_grad():
        layer(x)


def grid_by_hand(x: Tensor, axes: tuple[int, ...], bits: int, symmetric: bool) -> Tensor:
    """Rounding in float64 with one range over `axes`, as a table of levels from which the nearest is taken."""
    x = x.double()
    low, high = x.amin(axes, True), x.amax(axes, True)
    if symmetric:
        step = torch.maximum(high, -low) / (2 ** (bits - 1) - 1)
        first = torch.full_like(step, -(2 ** (bits - 1)))
    else:
        step = (high - low) / (2**bits - 1)
        first = torch.round(low / step)
    levels = (first[..., None] + torch.arange(2**bits)) * step[..., None]
    return levels.expand(*x.shape, -1).gather(-1, (levels - x[..., None]).abs().argmin(-1, True))[..., 0]


@each_module
@pytest.mark.parametrize("granularity", ["tensor", "frame", "token"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_activation_ranges_by_granularity(name: str, granularity: str, symmetric: bool) -> None:
    """Three parts of 8 channels, each with ranges of its own, against levels written out in float64; rows differ a hundredfold in size."""
    module, x = module_and_input(name)
    x = (
        x
        * torch.logspace(-1, 1, x.shape[0]).view(-1, *(1,) * (x.dim() - 1))
        * torch.logspace(0, 1, 3).repeat_interleave(8).view((-1,) if isinstance(module, nn.Linear) else (-1, *(1,) * (x.dim() - 2)))
    )
    layer = QuantLayer.from_float(module, LayerPlan(4, 4, (8, 8, 8), act_granularity=granularity, act_symmetric=symmetric), name)
    channel = x.dim() - 1 if isinstance(module, nn.Linear) else 1
    used = "frame" if granularity == "token" and name not in ("linear", "linear_nobias", "conv2d_1x1") else granularity
    axes = {"tensor": tuple(range(x.dim())), "frame": tuple(range(1, x.dim())), "token": (channel,)}[used]
    assert layer.describe()["act_granularity"] == granularity and layer.describe()["act_granularity_used"] == used
    found = layer.quantized_inputs(x)
    for part, piece in enumerate(x.split(8, channel)):
        expected = grid_by_hand(piece, axes, 4, symmetric)
        off = (found[part] - expected).abs() > 1e-4 * piece.abs().max()
        assert off.float().mean() < 0.01  # a value within float rounding of a half may round either way
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(layer.quantized_inputs(x), found, strict=True)), "with and without gradients alike"
        dense = copy.deepcopy(module)
        dense.weight.copy_(torch.cat(layer.quantized_weights(), 1))
        assert torch.allclose(layer(x), dense(torch.cat(found, channel)), atol=1e-5 * x.abs().max())


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d_1x1"])
def test_finer_ranges_are_closer_and_all_forms_agree(name: str) -> None:
    module, x = module_and_input(name)
    x = x * torch.logspace(-1, 1, x.shape[0]).view(-1, *(1,) * (x.dim() - 1))
    errors = []
    for granularity in ("tensor", "frame", "token"):
        layer = QuantLayer.from_float(module, LayerPlan(8, 4, rotate=True, rank=2, act_granularity=granularity), name)
        with torch.no_grad():
            errors.append(((layer(x) - module(x)) / x.flatten(1).std(1).view(-1, *(1,) * (x.dim() - 1))).pow(2).mean().item())
        open_form = layer(x.requires_grad_(True))
        (gradient,) = torch.autograd.grad(layer.quantized_inputs(x)[0].sum(), x)
        assert gradient.abs().sum() > 0
        layer.freeze()
        x = x.detach()
        with torch.no_grad():
            assert torch.allclose(layer(x), open_form, atol=1e-4 * open_form.abs().max().item())
    assert errors[0] > 2 * errors[1] and errors[1] >= errors[2]


def test_symmetric_weights_are_those_of_a_signed_quantizer() -> None:
    """Signed integers -8 … 7 times absmax/7, as QuaRot writes it, in float64."""
    module, _ = module_and_input("conv2d")
    layer = QuantLayer.from_float(module, LayerPlan(4, 4, (8, 16), weight_symmetric=True))
    assert (layer.weight_zero_point == 8).all()
    for part, weight in zip(layer.quantized_weights()[0].split((8, 16), 1), module.weight.double().split((8, 16), 1), strict=True):
        scale = weight.abs().amax((1, 2, 3), True) / 7
        expected = torch.clamp(torch.round(weight / scale), -8, 7) * scale
        assert ((part - expected).abs() > 1e-6).float().mean() < 0.002  # a tie within float rounding


def test_given_integers_are_the_weight() -> None:
    module, _ = module_and_input("conv2d")
    layer = QuantLayer.from_float(module, LayerPlan(3, 8, halves(24)))
    weight, scale, zero_point = layer.rounding()
    nearest = layer.integers()
    chosen = torch.randint(0, 8, nearest.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(affine.quantize(weight, scale, zero_point, 3).view_as(nearest), nearest)
    layer.set_integers(chosen)
    layer.freeze()
    assert torch.equal(layer.integers(), chosen) and not layer.is_open
    with torch.no_grad():
        assert torch.equal(layer.quantized_weights()[0].flatten(1), (chosen.flatten(1).float() - zero_point) * scale)
    with pytest.raises(QuantError, match="layer: it is frozen, its floating-point weight is gone"):
        layer.rounding()
    with pytest.raises(QuantError, match="layer: integer 9 is beyond 3 bits"):
        layer.set_integers(torch.full_like(chosen, 9))
    with pytest.raises(QuantError, match=r"integers are torch.uint8 \(10, 24\), uint8 \(10, 24, 3, 3\) is needed"):
        layer.set_integers(chosen[..., 0, 0])


def test_static_ranges_are_per_tensor_and_granularities_are_known() -> None:
    layer = QuantLayer.from_float(nn.Linear(4, 4), LayerPlan(8, 8, act_granularity="token"), "a.b")
    with pytest.raises(QuantError, match=r"a\.b: static activation ranges are per tensor, its plan says per token"):
        layer.set_static_activations(torch.zeros(1, 1), torch.ones(1, 1))
    with pytest.raises(QuantError, match="no act_granularity 'tokens'; did you mean token"):
        QuantLayer.from_float(nn.Linear(4, 4), LayerPlan(8, 8, act_granularity="tokens"))


def test_correction_is_folded_into_the_bias() -> None:
    for name in ("linear", "linear_nobias", "conv2d"):
        module, x = module_and_input(name)
        layer = QuantLayer.from_float(module, LayerPlan(4, 4))
        with torch.no_grad():
            plain = layer(x)
            layer.correction = nn.Parameter(torch.arange(10.0))
            corrected = layer(x)
            layer.fold_correction()
            assert layer.correction is None and torch.allclose(layer(x), corrected, atol=1e-5)  # one addition fewer
            shift = torch.arange(10.0).view(-1) if name.startswith("linear") else torch.arange(10.0).view(1, -1, 1, 1)
            assert torch.allclose(corrected - plain, shift.expand_as(plain), atol=1e-5)


def test_constant_and_empty_inputs() -> None:
    module, _ = module_and_input("linear")
    layer = QuantLayer.from_float(module, LayerPlan(4, 4, rank=2))
    with torch.no_grad():
        for x in (torch.zeros(3, 24), torch.full((3, 24), 5.0)):
            assert torch.isfinite(layer(x)).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: QuantLayer.from_float(nn.Linear(8, 4), LayerPlan(4, 4, rank=5), "a.b"), r"a\.b: rank 5 is not between 1 and 4"),
        (
            lambda: QuantLayer.from_float(nn.Linear(8, 4), LayerPlan(4, 4, (3, 4)), "a.b"),
            r"a\.b: parts \(3, 4\) do not add up to its 8 input channels",
        ),
        (lambda: QuantLayer.from_float(nn.Linear(8, 4), LayerPlan(1, 4)), "1 bits cannot be quantized to"),
        (lambda: Geometry.of(nn.Conv2d(8, 8, 3, groups=2), "c"), "c: groups=2"),
        (lambda: Geometry.of(nn.Conv2d(8, 8, 3, padding="same"), "c"), "c: groups=1, padding='same'"),
        (lambda: Geometry.of(nn.ReLU(), "r"), "r: ReLU cannot be quantized; Linear, Conv1d, Conv2d, Conv3d can"),
        (
            lambda: QuantLayer.from_float(nn.Linear(8, 4), LayerPlan(4, 4), "q", rotations=[torch.eye(4)]),
            r"q: rotations \[\(4, 4\)\] do not fit parts \(8,\)",
        ),
    ],
)
def test_messages(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_chosen_integers_survive(name: str) -> None:
    module, x = module_and_input(name)
    layer = QuantLayer.from_float(module, LayerPlan(4, 4, halves(24)), name)
    with torch.no_grad():
        layer(x)  # the weight rounded to nearest is kept from call to call, and must go
        chosen = (layer.integers() + 1).clamp(max=15)
        layer.set_integers(chosen)
        out = layer(x)
        scale, zero = (
            v.repeat_interleave(12, 1).view(10, 24, *(1,) * (chosen.dim() - 2)) for v in (layer.weight_scale, layer.weight_zero_point)
        )
        assert torch.equal(torch.cat(layer.quantized_weights(), 1), (chosen - zero) * scale)
        layer.freeze()
        assert torch.equal(layer.integers(), chosen) and torch.equal(layer(x), out)
        again = QuantLayer.from_state(layer.geometry, layer.describe(), layer.state(), name)
        assert torch.equal(again(x), out)
