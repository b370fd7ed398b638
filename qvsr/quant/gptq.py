"""GPTQ rounding: each column's rounding error is made up for by the columns not yet rounded (arXiv 2210.17323).

A layer's weight is a matrix ``(N, K·taps)`` that multiplies input vectors; for a convolution these are its unfolded patches. Rounding changes
the output, over all inputs seen, by ``(w - w_q) H (w - w_q)^T`` for each output channel w, with the Hessian ``H = mean(x x^T)``. GPTQ rounds
column after column to the nearest level of the layer's own grid and moves the remaining columns to where this loss is then least.
Output channels do not influence each other.

Inputs are those of the full-precision network, after the layer's smoothing and rotation; so all layers are rounded independently of each
other, in any number of passes over the samples (the published code goes block by block and feeds each from the rounded ones before it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvsr.progress import progress
from qvsr.quant import affine
from qvsr.quant.layer import QuantError, QuantLayer
from qvsr.quant.observe import observe_inputs
from qvsr.quant.refine import Samples, call

HESSIAN_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Rounded:
    """What rounding one layer did: mean squared output error of nearest rounding and of the integers chosen, and how many output
    channels kept the nearest because it was the better of the two."""

    nearest: float
    chosen: float
    kept_nearest: int


def input_rows(layer: QuantLayer, x: Tensor, limit: int = 0, generator: torch.Generator | None = None, rounded: bool = False) -> Tensor:
    """The vectors that the layer's weight matrix multiplies.

    Args:
        x: the layer's input: ``(…, K)`` for Linear, ``(B, K, …)`` for convolutions.
        limit: take at most this many vectors, drawn without repetition from `generator`; 0: all.
        rounded: as the layer's activation quantizer rounds them; else before rounding.
    Returns:
        ``(rows, K·taps)``: smoothed, rotated, and with the convolution's zero padding where a patch crosses the border.
    """
    parts, geometry = layer.rounded_parts(x) if rounded else layer.input_parts(x), layer.geometry
    if layer.is_linear:
        rows = torch.cat(parts, -1).reshape(-1, geometry.in_channels)
        return rows[_drawn(rows.shape[0], limit, generator).to(x.device)]
    maps = torch.cat(parts, 1)
    maps = F.pad(maps, [side for padding in reversed(geometry.padding) for side in (padding, padding)]).contiguous()
    steps = maps.stride()[2:]
    reach = [dilation * (kernel - 1) for dilation, kernel in zip(geometry.dilation, geometry.kernel, strict=True)]
    places = [(size - far - 1) // stride + 1 for size, far, stride in zip(maps.shape[2:], reach, geometry.stride, strict=True)]
    # a view (B, K, *places, *kernel) that copies nothing: only the patches drawn are ever written out
    view = maps.as_strided(
        (*maps.shape[:2], *places, *geometry.kernel),
        (
            *maps.stride()[:2],
            *(step * stride for step, stride in zip(steps, geometry.stride, strict=True)),
            *(step * dilation for step, dilation in zip(steps, geometry.dilation, strict=True)),
        ),
    ).movedim(1, len(places) + 1)
    index = _drawn(maps.shape[0] * math.prod(places), limit, generator).to(x.device)
    return view[torch.unravel_index(index, (maps.shape[0], *places))].flatten(1)


def _drawn(count: int, limit: int, generator: torch.Generator | None) -> Tensor:
    if not limit or count <= limit:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:limit]


@torch.no_grad()
def hessians(
    network: nn.Module,
    layers: Mapping[str, QuantLayer],
    samples: Samples,
    limit: int = 0,
    seed: int = 0,
    report: Callable[[int, int], None] | None = None,
    rounded: bool = False,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Mean of ``x x^T`` over the inputs that a network gives its layers, float64 ``(K·taps, K·taps)`` each.

    Args:
        network: runs as it is; the inputs of its modules of the layers' names are taken, whatever these modules are.
        layers: quantized layers by name, which say how an input is transformed; they need not be in the network yet.
        limit: input vectors of each call of a layer that are used, drawn by `seed` and the layer's place; 0: all.
        rounded: inputs as the layer's activation quantizer rounds them.
        weights: of each sample's inputs, by sample; None: all 1.
    Raises:
        QuantError: a layer that never ran.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = dict.fromkeys(layers, 0)
    # one stream a layer: what one draws does not depend on which others are observed in the same pass
    weight = 1.0
    streams = {name: torch.Generator().manual_seed(seed) for name in layers}

    def see(name: str, x: Tensor) -> None:
        seen = input_rows(layers[name], x, limit, streams[name], rounded)
        product = (seen.T @ seen).double() if weight == 1 else (seen.T @ seen).double().mul_(weight)
        sums[name] = sums[name].add_(product) if name in sums else product
        rows[name] += seen.shape[0]

    with observe_inputs({name: network.get_submodule(name) for name in layers}, see):
        for index in range(len(samples)):
            weight = 1.0 if weights is None else weights[index]
            call(network, samples[index])
            if report is not None:
                report(index + 1, len(samples))
    for name in layers:
        if not rows[name]:
            raise QuantError(f"{name}: never ran on the {len(samples)} calibration samples, so GPTQ knows nothing of its inputs")
    return {name: total.div_(rows[name]) for name, total in sums.items()}


def gptq(
    weight_NK: Tensor,
    scale_NK: Tensor,
    zero_point_NK: Tensor,
    bits: int,
    hessian_KK: Tensor,
    damp: float = 0.01,
    block: int = 128,
    act_order: bool = False,
) -> Tensor:
    """Round a weight matrix column by column, each error spread over the columns that follow.

    Args:
        weight_NK: N output channels, K summed inputs (channels times taps).
        scale_NK, zero_point_NK: its grid, given in advance; it does not move with the weights.
        hessian_KK: symmetric, not negative; any factor.
        damp: share of the mean diagonal that is added to the diagonal.
        block: columns whose updates of later columns are applied at once; does not change the result but for float rounding.
        act_order: round the columns with the largest diagonal first, instead of from the first to the last.
    Returns:
        integers ``(N, K)``. Inputs that were never seen (a zero on the diagonal) are rounded to nearest; the published code sets them to 0.
    Raises:
        QuantError: a Hessian that is not positive even with damping.

    >>> weight, one = torch.tensor([[0.4, 0.4]]), torch.ones(1, 2)
    >>> correlated = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> gptq(weight, one, 0 * one, 4, torch.eye(2)).tolist(), gptq(weight, one, 0 * one, 4, correlated).tolist()
    ([[0, 0]], [[0, 1]])
    """
    count = weight_NK.shape[1]
    hessian = hessian_KK.double().clone()
    diagonal = hessian.diagonal()
    damping = damp * diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(count, device=hessian.device)
    diagonal += damping
    root, failed = torch.linalg.cholesky_ex(hessian[order][:, order])
    if int(failed):
        raise QuantError(f"GPTQ: the Hessian {tuple(hessian.shape)} is not positive with damping {damp}; raise it")
    # row i of the upper factor of the inverse: by how much each later column makes up for column i
    spread = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
    weight, scale, zero_point = weight_NK.double()[:, order], scale_NK[:, order], zero_point_NK[:, order]
    integers = torch.empty(weight.shape, dtype=affine.storage(bits), device=weight.device)
    for start in range(0, count, block):
        end = min(start + block, count)
        errors = torch.empty_like(weight[:, start:end])
        for column in range(start, end):
            place = slice(column, column + 1)
            # in the grid's own precision: a column that nothing has moved is rounded exactly as QuantLayer rounds it
            q = affine.quantize(weight[:, place].to(scale.dtype), scale[:, place], zero_point[:, place], bits)
            error = (weight[:, place] - affine.dequantize(q, scale[:, place], zero_point[:, place])) / spread[column, column]
            weight[:, column + 1 : end] -= error * spread[column, column + 1 : end]
            integers[:, place], errors[:, column - start : column - start + 1] = q, error
        weight[:, end:] -= errors @ spread[start:end, end:]
    back = torch.empty_like(integers)
    back[:, order] = integers
    return back


@torch.no_grad()
def round_layer(layer: QuantLayer, hessian_KK: Tensor, damp: float = 0.01, block: int = 128, act_order: bool = False) -> Rounded:
    """Round an open layer by :func:`gptq` and freeze it with these integers.

    An output channel for which rounding to nearest has the smaller loss keeps it (with three and more columns the greedy order can be
    unlucky; with damping it solves a neighbouring problem), so no channel is ever worse than nearest. The published code has no such choice.

    Returns:
        both losses, mean over output channels, in squared units of the output at one position.
    """
    weight, scale, zero_point = layer.rounding()
    nearest = affine.quantize(weight, scale, zero_point, layer.weight_bits)
    found = gptq(weight, scale, zero_point, layer.weight_bits, hessian_KK, damp, block, act_order)
    losses = [quadratic_loss(weight, affine.dequantize(q, scale, zero_point), hessian_KK) for q in (nearest, found)]
    worse = losses[1] > losses[0]
    layer.set_integers(torch.where(worse[:, None], nearest, found).view(layer.geometry.weight_shape))
    return Rounded(float(losses[0].mean()), float(torch.minimum(*losses).mean()), int(worse.sum()))


def quadratic_loss(weight_NK: Tensor, rounded_NK: Tensor, hessian_KK: Tensor) -> Tensor:
    """Mean squared change of each output channel, ``(N,)``, float64: ``(w - w_q) H (w - w_q)^T``."""
    error = weight_NK.double() - rounded_NK.double()
    return ((error @ hessian_KK.double()) * error).sum(1)


def round_layers(
    network: nn.Module,
    layers: Mapping[str, QuantLayer],
    samples: Samples,
    limit: int = 0,
    seed: int = 0,
    damp: float = 0.01,
    act_order: bool = False,
    rounded: bool = False,
    weights: Sequence[float] | None = None,
) -> dict[str, Rounded]:
    """Round open layers by GPTQ with the inputs that a full-precision network gives the modules of their names.

    Layers are observed together as long as their Hessians fit in 2 GiB; each such group is one pass over the samples.

    Args, Raises: see :func:`hessians` and :func:`gptq`.
    """
    if len(samples) == 0:
        raise QuantError("GPTQ needs calibration samples, the set is empty")
    results: dict[str, Rounded] = {}
    groups = list(_groups(layers))
    for number, group in enumerate(groups):
        with progress(f"GPTQ inputs {number + 1}/{len(groups)}") as report:
            found = hessians(network, group, samples, limit, seed, report, rounded, weights)
        for name, layer in group.items():
            results[name] = round_layer(layer, found.pop(name), damp, act_order=act_order)
    return results


def _groups(layers: Mapping[str, QuantLayer]) -> Iterator[dict[str, QuantLayer]]:
    group: dict[str, QuantLayer] = {}
    used = 0
    for name, layer in layers.items():
        size = 8 * math.prod(layer.geometry.weight_shape[1:]) ** 2
        if group and used + size > HESSIAN_BYTES:
            yield group
            group, used = {}, 0
        group[name] = layer
        used += size
    yield group
