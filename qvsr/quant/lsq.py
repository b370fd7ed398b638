"""Learned step sizes of static activation quantizers (LSQ, arXiv 1902.08153, as Q-Diffusion, arXiv 2302.04304, uses it).

An input x becomes ``step (clip(round(x/step) + z, 0, 2^bits - 1) - z)``; the rounding passes gradients straight through, so the step gets the
rounding error of what is rounded inside the range, and the outermost level of what is cut off. Zero points are not trained.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qvsr.quant import affine
from qvsr.quant.layer import QuantError, QuantLayer
from qvsr.quant.reconstruct import Unit, UnitCall, check_plain, fit
from qvsr.quant.refine import Curve

log = logging.getLogger(__name__)
POWER = 2.4


class InputStep:
    """The static input quantizer of one layer with trainable steps, one a part.

    Args:
        layer: with a single static range (no table by timestep), without smoothing, rotation and branch; it is not changed.
    """

    def __init__(self, layer: QuantLayer) -> None:
        check_plain(layer)
        if layer.act_scale is None or layer.act_zero_point is None or len(layer.act_scale) != 1:
            raise QuantError(f"{layer.name}: steps are learned from one static range a part; set it first")
        self.layer = layer
        self.step = nn.Parameter(layer.act_scale[0].clone(), requires_grad=False)
        self.zero_point = layer.act_zero_point[0]

    def __call__(self, x: Tensor) -> Tensor:
        """The rounded input, shaped as `x`; gradients reach `x` and `step`."""
        top, rounded = affine.levels(self.layer.act_bits), []
        for piece, step, zero in zip(self.layer.input_parts(x), self.used(), self.zero_point, strict=True):
            position = piece / step
            q = position.detach().round() + zero
            # written out: whether clamp passes gradients at its very bounds depends on torch's version
            inside = (q >= 0) & (q <= top)
            q = q.clamp(0, top) + torch.where(inside, position - position.detach(), 0.0)
            rounded.append((q - zero) * step)
        return rounded[0] if len(rounded) == 1 else torch.cat(rounded, -1 if self.layer.is_linear else 1)

    def used(self) -> Tensor:
        """The steps ``(P,)``, never below the layer's smallest scale."""
        return self.step.clamp_min(self.layer.scale_floor)

    def give(self) -> None:
        """Hand the learned steps to the layer."""
        self.layer.act_scale = self.used().detach()[None].clone()


@contextmanager
def rounded_inputs(modules: Mapping[str, nn.Module], steps: Mapping[str, InputStep]) -> Iterator[None]:
    """Within the block each of the floating-point layers `modules` gets its input rounded by the step of the same name."""

    def hook(step: InputStep) -> Any:
        return lambda _module, args: (step(args[0]), *args[1:])

    handles = [module.register_forward_pre_hook(hook(steps[name])) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def learn_steps(
    unit: Unit,
    modules: Mapping[str, nn.Module],
    steps: Mapping[str, InputStep],
    weights: Mapping[str, Tensor],
    calls: Sequence[UnitCall],
    updates: int,
    batch: int,
    learning_rate: float,
    seed: int,
) -> Curve:
    """Learn the steps of all layers of a unit together.

    Args:
        modules, steps, weights: floating-point layers, steps and rounded weights by name in the network; those of the unit are read.
        calls: of the unit, with what it should return.
        learning_rate: at the start; it falls to 0 along a cosine.
        seed: of the order of the calls.
    Returns:
        mean of ``|error|^2.4`` of the unit's output over all calls, before and after. Where it did not fall the steps are as they were.
    """
    given = {unit.inner(name): weights[name] for name in unit.layers}

    def error(call: UnitCall) -> Tensor:
        return unit.error(functional_call(unit.module, given, call.args), call.target, POWER)

    @torch.no_grad()
    def whole() -> float:
        return sum(error(call).item() for call in calls) / max(1, len(calls))

    parameters = [steps[name].step for name in unit.layers]
    start = [step.detach().clone() for step in parameters]
    with rounded_inputs({name: modules[name] for name in unit.layers}, steps):
        before = whole()
        losses = fit(parameters, calls, error, updates, batch, learning_rate, seed, f"steps of {unit.name}", cosine=True)
        curve = Curve(before, whole(), losses)
    if curve.after >= before:
        log.info("steps of %s: error %.4g -> %.4g, so they stay as they were", unit.name, before, curve.after)
        for step, value in zip(parameters, start, strict=True):
            step.data.copy_(value)
    return curve
