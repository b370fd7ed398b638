"""Quantized Linear and convolutions against the reference: quant_layers_w4a4, _w6a6, _w8a8.

Inputs, weights, rotations, branches and ranges are stored in the w4a4 set only. The sets ask for about 1e-4 and allow a few elements that
differ by a step, because a value within float rounding of a half may round either way: `doubtful` says which.
"""

from __future__ import annotations

import math
from typing import Any

import golden
import pytest
import torch
from torch import Tensor, nn

from qvsr.quant.layer import LayerPlan, QuantLayer, halves

SETS = ("quant_layers_w4a4", "quant_layers_w6a6", "quant_layers_w8a8")
TOLERANCE = 1e-4  # as the sets say
TIE = 1e-4  # of a step: a value nearer to a half than this (float32 sums over hundreds of values) may round either way


def float_module(case: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    weight = tensors[f"{case['case']}.weight"]
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in case["conv"].items()}
    kernel = {} if weight.dim() == 2 else {"kernel_size": tuple(weight.shape[2:])}
    module = getattr(nn, case["kind"])(weight.shape[1], weight.shape[0], bias=case["bias"], **kernel, **options)
    module.weight.data = weight
    if case["bias"]:
        module.bias.data = tensors[f"{case['case']}.bias"]
    return module


def build(case: dict[str, Any], bits: int, split: bool, tensors: dict[str, Tensor], stage: str) -> QuantLayer:
    name, module = case["case"], float_module(case, tensors)
    parts = halves(module.weight.shape[1]) if split else (module.weight.shape[1],)
    rotations = [tensors[f"{name}.rot{part or ''}"] for part in range(len(parts))]
    l2 = tensors[f"{name}.{stage}.L2"]
    branch = (tensors[f"{name}.{stage}.L1"], l2.view(-1, *module.weight.shape[1:]))
    layer = QuantLayer.from_float(module, LayerPlan(bits, bits, parts, rank=l2.shape[0]), name, rotations=rotations, branch=branch)
    layer.set_weight_ranges(
        [(tensors[f"{name}.init.wq{p or ''}.x_min"], tensors[f"{name}.init.wq{p or ''}.x_max"]) for p in range(len(parts))]
    )
    if f"{name}.{stage}.lba" in tensors:
        layer.correction = nn.Parameter(tensors[f"{name}.{stage}.lba"].reshape(-1).clone())
    return layer


def ties(values: Tensor, scale: Tensor) -> Tensor:
    """Where a value lies about half way between two steps."""
    steps = values / scale
    return ((steps - steps.floor()) - 0.5).abs() < TIE


@torch.no_grad()
def doubtful(case: dict[str, Any], layer: QuantLayer, x: Tensor, tensors: dict[str, Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """What ties touch: elements of each part of the input, of the weight, and of the output (an open layer is needed)."""
    inputs = [ties(piece, layer._act_qparams(piece, part)[0]) for part, piece in enumerate(layer.input_parts(x))]
    weight = ties(layer._residual(), layer._weight_grid()[0])
    spread = float_module(case, tensors)
    spread.weight.data = torch.ones_like(spread.weight)
    spread.bias = None
    channels = weight.flatten(1).any(1)
    touched = spread(torch.cat(inputs, -1 if layer.is_linear else 1).float()) > 0
    return inputs, weight, touched | (channels if layer.is_linear else channels.view(-1, *(1,) * (x.dim() - 2)))


def assert_close_but_for_ties(actual: Tensor, expected: Tensor, doubt: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    assert doubt.float().mean() < 0.5, f"{what}: most of it depends on ties"
    off = (actual - expected).abs() > TOLERANCE
    wrong = int((off & ~doubt).sum())
    assert not wrong, f"{what}: {wrong} of {off.numel()} elements differ by more than {TOLERANCE}, and by no tie in rounding"
    assert (actual - expected).pow(2).mean() <= 1e-3 * expected.pow(2).mean(), f"{what}: not just single steps"


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("frozen", [False, True], ids=["open", "frozen"])
@pytest.mark.parametrize("stage", ["init", "trained"])
def test_output(name: str, stage: str, frozen: bool) -> None:
    meta, expected = golden.load(name)
    inputs = golden.load(SETS[0])[1]
    assert {case["case"] for case in meta["layers"]} == {case for (case,) in golden.matching(expected, rf"(.+)\.{stage}\.out")}
    for case in meta["layers"]:
        layer, x = build(case, meta["bits"], meta["channel_split"], inputs, stage), inputs[f"{case['case']}.x"]
        doubt = doubtful(case, layer, x, inputs)[2]
        if frozen:
            layer.freeze()
        with torch.no_grad():
            out = layer(x)
        assert_close_but_for_ties(out, expected[f"{case['case']}.{stage}.out"], doubt, f"{name} {case['case']} {stage}")
        reference = inputs[f"{case['case']}.fp_out"]
        error = float((out - reference).pow(2).mean() / reference.pow(2).mean())
        assert math.isclose(error, case["relative_mse"][stage], rel_tol=0.05), f"{case['case']} {stage}: relative error {error}"


@pytest.mark.parametrize("name", SETS)
def test_rounded_weight_of_the_first_part(name: str) -> None:
    meta, expected = golden.load(name)
    inputs = golden.load(SETS[0])[1]
    for case in meta["layers"]:
        layer, x = build(case, meta["bits"], meta["channel_split"], inputs, "trained"), inputs[f"{case['case']}.x"]
        doubt_inputs, doubt_weight, _ = doubtful(case, layer, x, inputs)
        first = slice(layer.parts[0])
        weight = torch.cat(layer.quantized_weights(), 1)[:, first]
        assert_close_but_for_ties(
            weight, expected[f"{case['case']}.trained.w0_dq"], doubt_weight[:, first], f"{name} {case['case']} weight"
        )
        if f"{case['case']}.trained.x0_dq" in expected:
            with torch.no_grad():
                rounded = layer.quantized_inputs(x)[0]
            assert_close_but_for_ties(rounded, expected[f"{case['case']}.trained.x0_dq"], doubt_inputs[0], f"{name} {case['case']} input")


def test_branch_and_ranges_at_the_start() -> None:
    """L1 L2 from the SVD (their signs are free, the product is not) and the ranges of the rotated residual."""
    meta, tensors = golden.load(SETS[0])
    for case in meta["layers"]:
        name = case["case"]
        given = build(case, meta["bits"], meta["channel_split"], tensors, "init")
        own = QuantLayer.from_float(
            float_module(case, tensors),
            LayerPlan(meta["bits"], meta["bits"], given.parts, rank=given.rank),
            name,
            rotations=[tensors[f"{name}.rot{part or ''}"] for part in range(len(given.parts))],
        )
        product = own.up @ own.down.flatten(1)
        golden.assert_close(product.detach(), tensors[f"{name}.init.L1"] @ tensors[f"{name}.init.L2"], meta, f"{name} L1 L2", TOLERANCE)
        golden.assert_close(own.weight_scale, given.weight_scale, meta, f"{name} scales", TOLERANCE)


def test_gradients() -> None:
    """Straight-through gradients of the branch, the bias correction and the input."""
    meta, tensors = golden.load(SETS[0])
    for case in meta["layers"]:
        name = case["case"]
        layer = build(case, meta["bits"], meta["channel_split"], tensors, "trained")
        for parameter in (layer.up, layer.down, layer.correction):
            parameter.requires_grad_(True)
        x = tensors[f"{name}.x"].clone().requires_grad_(True)
        loss = (layer(x) - tensors[f"{name}.fp_out"]).pow(2).mean()
        loss.backward()
        assert math.isclose(loss.item(), tensors[f"{name}.trained.loss"].item(), rel_tol=0.02)
        found = {"L1": layer.up.grad, "L2": layer.down.grad.flatten(1), "lba": layer.correction.grad, "x": x.grad}
        for key, gradient in found.items():
            expected = tensors[f"{name}.trained.grad_{key}"].reshape(gradient.shape)
            error = (gradient - expected).norm() / expected.norm()
            assert error < 0.02, f"{name} gradient of {key}: relative error {error:.3g}"  # a flipped rounding step moves single entries
