"""Ranges that round with the least error instead of reaching from the smallest to the largest value.

The search of Q-Diffusion (arXiv 2302.04304): of 80 ranges, (minimum, maximum) times 1.00, 0.99, … 0.21, the one with the smallest mean of
``|x - xq|^2.4`` is taken, the widest where two are equal. Works on any asymmetric quantizer of :mod:`qvsr.quant.affine`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from qvsr.quant import affine
from qvsr.quant.layer import QuantError, QuantLayer
from qvsr.quant.observe import observe_inputs

FACTORS = tuple(1 - k / 100 for k in range(80))
POWER = 2.4
BLOCK = 2**18  # weights whose output channels are scored at a time: what fits a processor's cache


@torch.no_grad()
def weight_range(weight: Tensor, bits: int, floor: float = affine.SCALE_FLOOR) -> tuple[Tensor, Tensor]:
    """Searched minimum and maximum of each output channel of one part of a weight ``(N, K, *kernel)``.

    Returns:
        both ``(N, 1, …)``, as :func:`qvsr.quant.affine.channel_range` returns them and
        :meth:`qvsr.quant.layer.QuantLayer.set_weight_ranges` takes them.
    """
    if weight.numel() > BLOCK and len(weight) > 1:
        blocks = [weight_range(block, bits, floor) for block in weight.split(max(1, BLOCK // weight[0].numel()))]
        lows, highs = zip(*blocks, strict=True)
        return torch.cat(lows), torch.cat(highs)
    low, high = affine.channel_range(weight)
    axes = tuple(range(1, weight.dim()))
    least, best = torch.full_like(low, math.inf), torch.ones_like(low)
    for factor in FACTORS:
        rounded = affine.round_to_grid(weight, *affine.qparams(low * factor, high * factor, bits, floor), bits)
        score = rounded.sub_(weight).abs_().pow_(POWER).mean(axes, keepdim=True)
        better = score < least
        least, best = torch.where(better, score, least), torch.where(better, factor, best)
    return low * best, high * best


@torch.no_grad()
def activation_ranges(
    modules: Mapping[str, nn.Module], layers: Mapping[str, QuantLayer], run: Callable[[], None], values: int | None = None, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Searched static range of each layer's input, one a part, over all calls that `run` makes of it.

    Two runs: the first finds minimum and maximum, the second scores the 80 ranges; inputs are not kept.

    Args:
        modules: the layers that run, by name; their inputs are looked at.
        layers: of the same names; say how an input is transformed and cut into parts before it is rounded, and to how many bits.
        run: runs the network on the calibration samples, both times alike.
        values: score at most this many values of a part and call, drawn anew for each call; None: all. The minimum and maximum are over all.
        seed: of the drawn values.
    Returns:
        minima and maxima by name, both ``(P,)``.
    Raises:
        QuantError: a layer that never ran.
    """
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    scores = {name: torch.zeros(len(layer.parts), len(FACTORS), dtype=torch.float64) for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(seed)

    def widen(name: str, x: Tensor) -> None:
        low, high = (torch.stack(ends) for ends in zip(*map(affine.tensor_range, layers[name].input_parts(x)), strict=True))
        if name in ranges:
            low, high = torch.minimum(low, ranges[name][0]), torch.maximum(high, ranges[name][1])
        ranges[name] = low, high

    def score(name: str, x: Tensor) -> None:
        layer, (low, high) = layers[name], ranges[name]
        for part, piece in enumerate(layer.input_parts(x)):
            flat = piece.flatten()
            if values is not None and flat.numel() > values:
                flat = flat[torch.randint(flat.numel(), (values,), generator=generator).to(flat.device)]
            candidates = _candidates(low[part], high[part], layer)
            errors = [(flat - affine.round_to_grid(flat, *candidate, layer.act_bits)).abs_().pow_(POWER).sum() for candidate in candidates]
            scores[name][part] += torch.stack(errors).cpu()

    for see in (widen, score):
        with observe_inputs(modules, see):
            run()
    for name in modules:
        if name not in ranges:
            raise QuantError(f"{name}: never ran on the calibration samples, so it has no activation range")
    best = {name: torch.tensor(FACTORS)[total.argmin(1)].to(ranges[name][0]) for name, total in scores.items()}
    return {name: (low * best[name], high * best[name]) for name, (low, high) in ranges.items()}


def _candidates(low: Tensor, high: Tensor, layer: QuantLayer) -> Sequence[tuple[Tensor, Tensor]]:
    """Scale and zero point of each of the 80 ranges."""
    return [affine.qparams(low * factor, high * factor, layer.act_bits, layer.scale_floor) for factor in FACTORS]
