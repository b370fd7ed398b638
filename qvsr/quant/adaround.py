"""Learned rounding of weights (AdaRound, arXiv 2004.10568): each weight goes to the integer below or above, whichever the output likes.

A weight w on a grid of scale s and zero point z is ``s (clip(floor(w/s) + h(V) + z, 0, 2^bits - 1) - z)`` while it is learned, with the rectified
sigmoid ``h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)`` and V such that h starts as the fraction that floor cut off. The loss is the squared error of a
unit's output plus ``weight · sum(1 - |2h - 1|^beta)``; beta falls from 20 to 2 along a line, after a warm-up without this term, and drives h to
0 or 1. At the end h is 1 where V >= 0, else 0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qvsr.quant import affine
from qvsr.quant.layer import QuantLayer
from qvsr.quant.reconstruct import Unit, UnitCall, check_plain, fit
from qvsr.quant.refine import Curve

log = logging.getLogger(__name__)
LOW, HIGH = -0.1, 1.1
BETA_START, BETA_END = 20.0, 2.0


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V): 0 to 1, reaching both; shaped as V.

    >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return (torch.sigmoid(v) * (HIGH - LOW) + LOW).clamp(0, 1)


def beta_at(update: int, updates: int, warmup: float) -> float | None:
    """Exponent of the regulariser at an update counted from 0; None in the warm-up, where the term is left out.

    >>> [beta_at(update, 10, 0.2) for update in (0, 1, 2, 6)]
    [None, None, 20.0, 11.0]
    """
    start = warmup * updates
    if update < start:
        return None
    return BETA_END + (BETA_START - BETA_END) * (1 - (update - start) / (updates - start))


class Rounding:
    """The rounding of one layer's weight while it is learned; `v` is trained.

    Args:
        layer: without smoothing, rotation and branch; its weight and weight ranges are read, nothing is changed.
    """

    def __init__(self, layer: QuantLayer) -> None:
        check_plain(layer)
        assert layer.weight is not None, f"{layer.name} is frozen"
        self.bits = layer.weight_bits
        self.scale, self.zero_point = layer._weight_grid()
        position = layer.weight / self.scale
        self.below = torch.floor(position)
        self.v = nn.Parameter(-torch.log((HIGH - LOW) / (position - self.below - LOW) - 1), requires_grad=False)

    def soft(self) -> Tensor:
        """The weight ``(N, K, *kernel)`` between two grid points; gradients reach `v`."""
        q = (self.below + rectified_sigmoid(self.v) + self.zero_point).clamp(0, affine.levels(self.bits))
        return (q - self.zero_point) * self.scale

    def integers(self) -> Tensor:
        """The decided integers."""
        return (self.below + (self.v >= 0) + self.zero_point).clamp_(0, affine.levels(self.bits)).to(affine.storage(self.bits))

    def hard(self) -> Tensor:
        """The weight that the decided integers stand for."""
        return affine.dequantize(self.integers(), self.scale, self.zero_point)

    def indecision(self, beta: float) -> Tensor:
        """``sum(1 - |2h - 1|^beta)``: 0 where every h is 0 or 1."""
        return (1 - (2 * rectified_sigmoid(self.v) - 1).abs().pow(beta)).sum()


def learn_rounding(
    unit: Unit,
    roundings: Mapping[str, Rounding],
    calls: Sequence[UnitCall],
    updates: int,
    batch: int,
    learning_rate: float,
    weight: float,
    warmup: float,
    seed: int,
) -> Curve:
    """Learn the rounding of all weights of a unit together; activations are not rounded.

    Args:
        roundings: by name of the unit's layers in the network; their `v` is changed.
        calls: of the unit, with what it should return.
        weight: of the regulariser.
        warmup: share of the updates without it.
        seed: of the order of the calls.
    Returns:
        squared error of the unit's output, over all calls and with decided weights, before (rounded to nearest) and after. Where it did not fall,
        which a short run can end with, `v` is as it was.
    """

    def output_error(weights: Mapping[str, Tensor], call: UnitCall) -> Tensor:
        given = {unit.inner(name): value for name, value in weights.items()}
        return unit.error(functional_call(unit.module, given, call.args), call.target, 2.0)

    def soft_error(call: UnitCall) -> Tensor:
        return output_error({name: rounding.soft() for name, rounding in roundings.items()}, call)

    @torch.no_grad()
    def hard_error() -> float:
        weights = {name: rounding.hard() for name, rounding in roundings.items()}
        return sum(output_error(weights, call).item() for call in calls) / max(1, len(calls))

    def indecision(update: int) -> Tensor | None:
        beta = beta_at(update, updates, warmup)
        return None if beta is None else weight * torch.stack([rounding.indecision(beta) for rounding in roundings.values()]).sum()

    before = hard_error()
    parameters = [rounding.v for rounding in roundings.values()]
    start = [v.detach().clone() for v in parameters]
    losses = fit(parameters, calls, soft_error, updates, batch, learning_rate, seed, f"rounding of {unit.name}", indecision)
    curve = Curve(before, hard_error(), losses)
    if curve.after >= before:
        log.info("rounding of %s: error %.4g -> %.4g, so it is rounded to nearest", unit.name, before, curve.after)
        for v, value in zip(parameters, start, strict=True):
            v.data.copy_(value)
    return curve
