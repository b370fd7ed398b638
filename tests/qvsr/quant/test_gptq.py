"""GPTQ against enumeration on two and three weights, against conditional least squares, and its Hessian against unfolded patches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvsr.quant import affine, apply
from qvsr.quant import gptq as module
from qvsr.quant.gptq import gptq, hessians, input_rows, quadratic_loss, round_layer, round_layers
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer, halves
from qvsr.quant.observe import observe_inputs

EXCLUDE = ("time_embed.0", "head", "out")


def problem(
    seed: int, count: int, outputs: int = 8, bits: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight, the grid of its own min/max ranges, and the Hessian of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, count, generator=generator).to(dtype)
    scale, zero_point = (v.expand_as(weight) for v in affine.qparams(*affine.channel_range(weight), bits))
    mixing = torch.randn(count, count, generator=generator) + 2 * torch.rand(1, generator=generator)
    x = torch.randn(64, count, generator=generator) @ mixing
    return weight, scale, zero_point, (x.T @ x).double() / 64


def loss(weight: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor, hessian: Tensor) -> Tensor:
    return quadratic_loss(weight, affine.dequantize(q, scale, zero_point), hessian)


def enumerated(weight: Tensor, scale: Tensor, zero_point: Tensor, hessian: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The best integers of each row and their loss, by trying all of them, in float64."""
    candidates = np.array(list(itertools.product(range(2**bits), repeat=weight.shape[1])))
    values = (candidates[None] - zero_point.double().numpy()[:, None]) * scale.double().numpy()[:, None]
    errors = weight.double().numpy()[:, None] - values
    losses = np.einsum("nci,ij,ncj->nc", errors, hessian.numpy(), errors)
    return candidates[losses.argmin(1)], losses.min(1)


def certified(weight: np.ndarray, q: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, hessian: np.ndarray) -> bool:
    """Whether theory says that no other integers are better than those of GPTQ, for one row.

    The loss is a sum of squares: term i is d_i r_i^2, where r_i is the distance of weight i, moved to its optimum given the weights before it,
    to its integer, and d_i = H_ii less what the later weights can make up for (a Schur complement). Integers that first differ at i have the same
    terms before i and at least d_i (s_i - |r_i|)^2 there. So if the loss is not above any of these bounds, it is the least.
    """
    error = weight - (q - zero_point) * scale
    terms, bounds = [], []
    for i in range(len(weight)):
        later, before = slice(i + 1, None), slice(None, i)
        schur = hessian[i, i] - hessian[i, later] @ np.linalg.solve(hessian[later, later], hessian[later, i])
        # the optimum of weights i and later, given those before
        moved = np.linalg.solve(hessian[i:, i:], hessian[i:, before] @ error[before])[0] if i else 0.0
        r = error[i] + moved
        bounds.append(sum(terms) + schur * (scale[i] - abs(r)) ** 2)
        terms.append(schur * r**2)
    assert np.isclose(sum(terms), error @ hessian @ error)
    return sum(terms) <= min(bounds)


@pytest.mark.parametrize("count", [2, 3])
def test_the_enumerated_optimum_where_theory_says_so(count: int) -> None:
    """No damping. See `certified` for the theory; it covers a good part of the rows, some of which nearest rounding gets wrong."""
    rows, improved = 0, 0
    for seed in range(60):
        weight, scale, zero_point, hessian = problem(seed, count)
        q = gptq(weight, scale, zero_point, 2, hessian, damp=0)
        best, least = enumerated(weight, scale, zero_point, hessian, 2)
        nearest = affine.quantize(weight, scale, zero_point, 2)
        for n in range(len(weight)):
            if certified(*(v[n].double().numpy() for v in (weight, q, scale, zero_point)), hessian.numpy()):
                found = loss(weight, q, scale, zero_point, hessian)[n].item()
                assert found == pytest.approx(least[n], rel=1e-9, abs=1e-12)
                rows += 1
                improved += bool((nearest[n].numpy() != best[n]).any())
    assert rows > 0.2 * 60 * 8 and improved > 10, (rows, improved)


def test_two_weights_are_never_worse_than_nearest() -> None:
    """Theory, without damping: both round the first weight alike, and GPTQ's second is the best there is given the first."""
    better = 0
    for seed in range(200):
        weight, scale, zero_point, hessian = problem(seed, 2)
        found, nearest = (
            loss(weight, q, scale, zero_point, hessian)
            for q in (gptq(weight, scale, zero_point, 2, hessian, damp=0), affine.quantize(weight, scale, zero_point, 2))
        )
        assert (found <= nearest * (1 + 1e-9)).all()
        better += int((found < 0.99 * nearest).sum())
    assert better > 100


@pytest.mark.parametrize("act_order", [False, True])
def test_three_weights_are_never_worse_than_nearest(act_order: bool) -> None:
    """Three weights can be unlucky with GPTQ's order, damped ones with the problem: `round_layer` then keeps the nearest."""
    kept = 0
    for seed in range(60):
        weight, _, _, hessian = problem(seed, 3)
        linear = nn.Linear(3, 8, bias=False).double().requires_grad_(False)
        linear.weight.copy_(weight)
        layer, nearest = (QuantLayer.from_float(linear, LayerPlan(2, 8)) for _ in range(2))
        _, scale, zero_point = layer.rounding()
        done = round_layer(layer, hessian, act_order=act_order)
        found, plain = (loss(weight, x.integers(), scale, zero_point, hessian) for x in (layer, nearest))
        least = enumerated(weight, scale, zero_point, hessian, 2)[1]
        assert (found <= plain).all() and (found.numpy() >= least * (1 - 1e-9)).all()
        assert done.chosen == pytest.approx(found.mean().item()) and done.nearest == pytest.approx(plain.mean().item())
        kept += done.kept_nearest
    assert kept > 0, "the case exists"


@pytest.mark.parametrize("diagonal", [torch.ones(40), torch.logspace(-3, 3, 40)], ids=["identity", "diagonal"])
@pytest.mark.parametrize("act_order", [False, True])
def test_uncorrelated_inputs_give_nearest_exactly(diagonal: Tensor, act_order: bool) -> None:
    weight, scale, zero_point, _ = problem(0, 40, bits=4, dtype=torch.float32)
    q = gptq(weight, scale, zero_point, 4, diagonal.diag(), block=16, act_order=act_order)
    assert torch.equal(q, affine.quantize(weight, scale, zero_point, 4))


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("act_order", [False, True])
def test_against_conditional_least_squares(block: int, act_order: bool) -> None:
    """After each column the rest is solved for anew, with numpy, instead of updated by factors of the inverse."""
    weight, scale, zero_point, hessian = problem(1, 20, bits=4)
    w0, s, z, h = (v.double().numpy() for v in (weight, scale, zero_point, hessian))
    damped = h + 0.01 * np.diag(h).mean() * np.eye(20)
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(20)
    expected = np.zeros_like(w0)
    for n in range(len(w0)):
        error = np.zeros(20)
        for place, column in enumerate(order):
            done, rest = order[:place], order[place:]
            moved = w0[n, rest] + np.linalg.solve(damped[np.ix_(rest, rest)], damped[np.ix_(rest, done)] @ error[done])
            q = np.clip(np.round(moved[0] / s[n, column]) + z[n, column], 0, 15)
            expected[n, column], error[column] = q, w0[n, column] - (q - z[n, column]) * s[n, column]
    found = gptq(weight, scale, zero_point, 4, hessian, block=block, act_order=act_order)
    assert np.array_equal(found.numpy(), expected)


def test_inputs_never_seen_and_a_singular_hessian() -> None:
    weight, scale, zero_point, hessian = problem(2, 6, bits=4)
    hessian[3], hessian[:, 3] = 0, 0
    q = gptq(weight, scale, zero_point, 4, hessian)
    assert torch.equal(q[:, 3], affine.quantize(weight, scale, zero_point, 4)[:, 3])
    with pytest.raises(QuantError, match=r"the Hessian \(6, 6\) is not positive with damping 0; raise it"):
        gptq(weight, scale, zero_point, 4, torch.ones(6, 6), damp=0)
    assert gptq(weight, scale, zero_point, 4, torch.ones(6, 6)).shape == (8, 6)


MODULES = {
    "linear": (lambda: nn.Linear(8, 6), (3, 5, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, stride=2, padding=2, dilation=2), (2, 8, 15)),
    "conv2d": (lambda: nn.Conv2d(8, 6, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 8, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(8, 6, (3, 1, 1), padding=(1, 0, 0)), (1, 8, 5, 3, 4)),
}


@pytest.mark.parametrize("name", MODULES)
def test_rows_times_the_weight_matrix_are_the_layer(name: str) -> None:
    """Transformed inputs and weights: their product must be the full-precision layer, position by position, in float64."""
    make, shape = MODULES[name]
    torch.manual_seed(0)
    original, x = make().double().requires_grad_(False), torch.randn(shape, dtype=torch.float64)
    smooth = torch.rand(8, dtype=torch.float64) + 0.5
    layer = QuantLayer.from_float(original, LayerPlan(4, 4, halves(8), rotate=True), name, smooth=smooth)
    rows, weight = input_rows(layer, x), layer.rounding()[0]
    expected = original(x) if name == "linear" else original(x).movedim(1, -1)
    assert torch.allclose(rows @ weight.T + original.bias, expected.reshape(-1, 6), atol=1e-12)
    if name == "conv2d":
        unfolded = F.unfold(torch.cat(layer.input_parts(x), 1), (3, 5), padding=(1, 2), stride=(2, 1)).transpose(1, 2).flatten(0, 1)
        assert torch.equal(rows, unfolded)
    some = input_rows(layer, x, 4, torch.Generator().manual_seed(3))
    assert some.shape == (4, rows.shape[1])
    matches = (some[:, None] == rows[None]).all(-1)
    assert (matches.sum(1) >= 1).all() and len(matches.float().argmax(1).unique()) == 4, "different rows of the whole"


def layers_of(net: tiny.Net, bits: int = 3) -> dict[str, QuantLayer]:
    return {
        name: QuantLayer.from_float(layer, LayerPlan(bits, 8, rotate=True), name) for name, layer in apply.quantizable(net, EXCLUDE).items()
    }


def test_the_hessian_is_that_of_all_calls() -> None:
    net = tiny.network()
    calls, layers = tiny.calls(net, 3), layers_of(net)
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    with observe_inputs(apply.quantizable(net, EXCLUDE), lambda name, x: seen[name].append(input_rows(layers[name], x))):
        for call in calls:
            tiny.run(net, call)
    found = hessians(net, layers, calls)
    for name in layers:
        rows = torch.cat(seen[name]).double()
        assert torch.allclose(found[name], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5 * found[name].abs().max().item()), name
    some = hessians(net, layers, calls, limit=50, seed=1)
    assert all(torch.equal(some[name], one) for name, one in hessians(net, {"body": layers["body"]}, calls, limit=50, seed=1).items())
    assert not torch.equal(some["body"], hessians(net, layers, calls, limit=50, seed=2)["body"])


def test_all_layers_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.network()
    calls = tiny.calls(net, 3)
    together = layers_of(net)
    done = round_layers(net, together, calls)
    assert all(not layer.is_open for layer in together.values()) and list(done) == list(together)
    assert all(one.chosen < one.nearest for one in done.values())
    monkeypatch.setattr(module, "HESSIAN_BYTES", 1)  # every layer in a pass of its own
    apart = layers_of(net)
    round_layers(net, apart, calls)
    assert all(torch.equal(together[name].integers(), apart[name].integers()) for name in together)
    with pytest.raises(QuantError, match="GPTQ needs calibration samples, the set is empty"):
        round_layers(net, layers_of(net), [])


def test_a_layer_that_never_ran_is_named() -> None:
    net = tiny.network()
    net.spare = nn.Linear(4, 4)
    with pytest.raises(QuantError, match="spare: never ran on the 1 calibration samples"):
        hessians(net, {"spare": QuantLayer.from_float(net.spare, LayerPlan(4, 4), "spare")}, tiny.calls(net, 1))
