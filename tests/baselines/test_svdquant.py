"""SVDQuant against a search written out in NumPy float64, what each search lowers, and its file."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import baselines.svdquant as method
from qvsr.quant import affine, apply, checkpoint
from qvsr.quant.layer import LayerPlan, QuantError
from qvsr.quant.observe import observe_inputs
from qvsr.quant.smoothing import input_amax

HEADER = {"method": "svdquant", "bits": "W4A4", "backbone": "tiny"}
RANK = 4


def uneven() -> tiny.Net:
    """A network with channels of very different size in front of most layers."""
    net = tiny.network(32)
    spread = torch.logspace(-1, 1, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    net.body.weight.mul_(spread.view(-1, 1, 1, 1))
    net.down.weight.mul_(spread.repeat(2).view(-1, 1, 1, 1))
    return net


def quantized(**settings: object) -> tuple[tiny.Net, list[tiny.Call]]:
    net = uneven()
    calls = tiny.calls(net, 3, 32)
    return method.svdquant(net, calls, tiny.spec("svdquant", 4, 4, **{"rank": RANK, **settings})), calls


def searched(net: tiny.Net) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = apply.record(net)["searched"]
    return found


def recorded(net: tiny.Net, calls: list[tiny.Call], name: str) -> list[Tensor]:
    inputs: list[Tensor] = []
    with observe_inputs({name: net.get_submodule(name)}, lambda _name, x: inputs.append(x)):
        for one in calls:
            tiny.run(net, one)
    return inputs


def grid(x: np.ndarray, axis: int | None, bits: int = 4) -> np.ndarray:
    """Nearest of 2^bits levels between minimum and maximum along an axis; 0 is one of them where it lies between."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    step = (high - low) / (2**bits - 1)
    lowest = np.round(low / step)
    return np.clip(np.round(x / step), lowest, lowest + 2**bits - 1) * step


def by_hand(xs: list[np.ndarray], weight: np.ndarray, smooth: np.ndarray, left_over: np.ndarray | None = None) -> tuple[float, np.ndarray]:
    """Output error of a linear layer with these factors, and its rounded residual; the branch is the SVD of what is given."""
    smoothed = weight * smooth
    u, s, vt = np.linalg.svd(smoothed if left_over is None else left_over, full_matrices=False)
    branch = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
    residual = grid(smoothed - branch, 1)
    outputs = [x / smooth @ branch.T + grid(x / smooth, None) @ residual.T for x in xs]
    return sum(((y - x @ weight.T) ** 2).sum() for x, y in zip(xs, outputs, strict=True)), residual


def test_the_candidates_are_the_published_39() -> None:
    assert len(set(method.CANDIDATES)) == 39 and method.CANDIDATES[0] == (0, 0)
    assert {round(b, 9) for a, b in method.CANDIDATES[1:]} == {0.0} | {round(1 - k / 20, 9) for k in range(1, 20)}
    assert all(0 < a < 1 and (b == 0 or a + b == 1) for a, b in method.CANDIDATES[1:])


def test_one_layer_by_hand() -> None:
    """All 39 errors of the linear layer, then the rounds of its branch, in float64 with NumPy's SVD."""
    net = uneven()
    calls, weight = tiny.calls(net, 3, 32), net.tokens.weight.double().numpy()
    xs = [x.double().numpy().reshape(-1, 64) for x in recorded(net, calls, "tokens")]
    amax, wmax = np.abs(np.stack(xs)).max((0, 1)), np.abs(weight).max(0)
    errors = {}
    for alpha, beta in method.CANDIDATES:
        smooth = amax**alpha / wmax**beta
        errors[alpha, beta] = by_hand(xs, weight, smooth)[0]
    found, _ = quantized(iterations=0)
    chosen = searched(found)["tokens"]
    pair = (chosen["alpha"], chosen["beta"])
    power = sum(((x @ weight.T) ** 2).sum() for x in xs)
    # float32 rounds values near a half the other way, so two candidates of nearly the same error may change places
    assert chosen["error"] == pytest.approx(errors[pair] / power, rel=0.02)
    assert errors[pair] <= 1.02 * min(errors.values()) < errors[0, 0]

    smooth = amax ** pair[0] / wmax ** pair[1]
    best, residual = by_hand(xs, weight, smooth)
    for _ in range(100):
        error, new = by_hand(xs, weight, smooth, weight * smooth - residual)
        if error >= best:
            break
        best, residual = error, new
    found, _ = quantized(iterations=100)
    assert searched(found)["tokens"]["error"] == pytest.approx(best / power, rel=0.05)  # a round more or less


def test_each_search_lowers_the_error_it_searches_for() -> None:
    plain, smoothed, whole = (
        searched(quantized(**settings)[0]) for settings in ({"smooth": False, "iterations": 0}, {"iterations": 0}, {"iterations": 100})
    )
    for name in plain:
        assert whole[name]["error"] <= smoothed[name]["error"] <= plain[name]["error"]
        assert (whole[name]["error"] < smoothed[name]["error"]) == (whole[name]["rounds"] > 0)
    assert sum(smoothed[name]["error"] < 0.9 * plain[name]["error"] for name in plain) >= 3
    assert sum(one["rounds"] > 0 for one in whole.values()) >= 3
    assert all(one["alpha"] == one["beta"] == 0 for one in plain.values())


def test_the_error_noted_is_that_of_the_layer_that_is_left() -> None:
    net, calls = quantized()
    reference = uneven()
    for name in ("tokens", "down", "temporal_conv"):
        inputs = recorded(reference, calls, name)
        with torch.no_grad():
            targets = [reference.get_submodule(name)(x) for x in inputs]
            outputs = [net.get_submodule(name)(x) for x in inputs]
        error = sum(float((y - t).double().pow(2).sum()) for y, t in zip(outputs, targets, strict=True))
        power = sum(float(t.double().pow(2).sum()) for t in targets)
        assert searched(net)[name]["error"] == pytest.approx(error / power, rel=1e-4)


@pytest.mark.parametrize("name", ["tokens", "line", "body", "down", "temporal_conv"])
def test_exact_in_float64_without_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = uneven()
    calls = tiny.calls(net, 2, 32)
    amax = input_amax(net, {name: net.get_submodule(name)}, calls)[name][0].double()
    inputs, module = [x.double() for x in recorded(net, calls, name)], net.get_submodule(name).double()
    monkeypatch.setattr(affine, "round_to_grid", lambda x, *_a, **_k: x)
    monkeypatch.setattr(affine, "fake_quantize", lambda x, *_a: x)
    with torch.no_grad():
        search = method.LayerSearch(module, LayerPlan(4, 4, rank=RANK), name, inputs)
        assert search.search_smoothing(amax, method.CANDIDATES[5:6]) == method.CANDIDATES[5]
        assert search.layer.smooth is not None and search.layer.smooth.max() > 1.05 * search.layer.smooth.min()
        for x in inputs:
            assert (search.layer(x) - module(x)).abs().max() < 1e-12 * module(x).abs().max()


def test_native_granularity() -> None:
    net, _ = quantized(granularity="native", group_size=24)
    layers = apply.quant_layers(net)
    assert layers["tokens"].parts == (24, 24, 16) and layers["tokens"].act_granularity_used == "token"
    assert layers["down"].parts == (24, 8) and layers["down"].act_granularity_used == "frame"
    assert all((layer.weight_zero_point == 8).all() for layer in layers.values())  # symmetric: the middle of 16 levels
    shared, _ = quantized()
    assert len(apply.quant_layers(shared)["tokens"].parts) == 1
    assert searched(net)["tokens"]["error"] < searched(shared)["tokens"]["error"]


def test_gptq_rounds_the_residual_with_less_output_error() -> None:
    """What GPTQ minimises is the error of rounding the weight alone, so that is what is compared: inputs are not rounded here."""
    reference, (nearest, calls), (found, _) = uneven(), quantized(), quantized(weights="gptq", gptq_rows=0)
    better = 0
    for name, layer in apply.quant_layers(found).items():
        other = apply.quant_layers(nearest)[name]
        assert torch.equal(layer.weight_scale, other.weight_scale) and torch.equal(layer.up, other.up)
        errors = []
        for form in (layer, other):
            weight = torch.cat([part.double() for part in form.quantized_weights()], 1) + (form.up @ form.down.flatten(1)).view(
                form.geometry.weight_shape
            )
            module = reference.get_submodule(name)
            plain, rounded = copy.deepcopy(module).double(), copy.deepcopy(module).double()
            rounded.weight.copy_(
                weight / form.smooth.double().view(1, -1, *(1,) * (weight.dim() - 2)) if form.smooth is not None else weight
            )
            errors.append(sum(float((plain(x.double()) - rounded(x.double())).pow(2).sum()) for x in recorded(reference, calls, name)))
        assert errors[0] <= 1.001 * errors[1]  # float32 branch and weight
        better += errors[0] < 0.9 * errors[1]
    assert better >= 3


def test_the_rank_is_limited_by_the_layer_and_counted() -> None:
    net, _ = quantized(rank=33, limit_ranks=True, smooth=False, iterations=0)
    layers = apply.quant_layers(net)
    assert layers["body"].rank == layers["line"].rank == 32 and layers["tokens"].rank == 33
    assert apply.record(net)["ranks_limited"] == sum(layer.rank == 32 for layer in layers.values())
    # a branch of full rank is the whole layer
    assert searched(net)["body"]["error"] < 1e-6 < searched(net)["tokens"]["error"]


def test_inputs_come_in_batches_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    net = uneven()
    calls, layers = tiny.calls(net, 4, 32), apply.quantizable(net, ("time_embed.0", "head", "out"))
    whole = list(method.recorded_inputs(net, layers, calls, 2))
    assert len(whole) == 1 and list(whole[0]) == list(layers)
    assert all(torch.equal(x, y) for x, y in zip(whole[0]["body"], recorded(net, [calls[0], calls[3]], "body"), strict=True))
    monkeypatch.setattr(method, "MEMORY", 2 * 4 * 5 * 32 * 8 * 8)  # two inputs of `body`
    batches = list(method.recorded_inputs(net, layers, calls, 2))
    assert len(batches) > 2 and [name for batch in batches for name in batch] == list(layers)
    assert all(torch.equal(x, y) for batch in batches for name in batch for x, y in zip(batch[name], whole[0][name], strict=True))
    assert [len(inputs) for inputs in next(method.recorded_inputs(net, layers, calls, 99)).values()] == [4]


@pytest.mark.parametrize(("granularity", "weights"), [("shared", "rtn"), ("native", "rtn"), ("native", "gptq")])
def test_two_runs_give_the_same_file_and_it_comes_back(tmp_path: Path, granularity: str, weights: str) -> None:
    for name in ("a", "b"):
        net, calls = quantized(granularity=granularity, group_size=24, weights=weights, gptq_rows=50)
        checkpoint.save(net, tmp_path / name, HEADER)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = checkpoint.load(tmp_path / "a", uneven())
    assert all(torch.equal(tiny.run(loaded, one), tiny.run(net, one)) for one in calls)
    assert apply.record(loaded)["searched"] == searched(net)


def test_refusals() -> None:
    with pytest.raises(QuantError, match="the calibration set is empty"):
        method.svdquant(tiny.network(), [], tiny.spec("svdquant", rank=RANK))
    with pytest.raises(ValueError, match="ranks"):
        method.svdquant(tiny.network(), [], tiny.spec("svdquant", ranks=3))
    message = r"svdquant: time_embed.2 cannot have rank 33: the limit of its weight \(32, 32\) is 32; lower method.svdquant.rank to 32, or set limit_ranks"
    with pytest.raises(QuantError, match=message):
        quantized(rank=33)
