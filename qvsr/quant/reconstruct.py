"""Reconstruction unit by unit (BRECQ, arXiv 2102.05426): a unit gets the inputs of the network quantized so far and learns to return
what it returns at full precision.

A unit is a residual block, a transformer block, a temporal layer, or a single layer outside of these. The network keeps its
floating-point layers while units are learned; rounded weights are lent to it by :func:`torch.func.functional_call`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvsr.models.layers import ResBlock, TemporalConv
from qvsr.models.unet import TemporalAttention, TransformerBlock
from qvsr.quant.layer import QuantError, QuantLayer
from qvsr.quant.refine import shuffled

BLOCKS = (ResBlock, TransformerBlock, TemporalConv, TemporalAttention)


@dataclass(frozen=True)
class Unit:
    """What is reconstructed together.

    Attributes:
        name, module: in the network.
        layers: names of its quantized layers, in the network.
    """

    name: str
    module: nn.Module
    layers: tuple[str, ...]

    def inner(self, layer: str) -> str:
        """Name of a layer's weight within the unit."""
        return f"{layer}.weight".removeprefix(f"{self.name}.")

    def error(self, out: Tensor, target: Tensor, power: float) -> Tensor:
        """``|out - target|^power`` summed over channels, averaged over the rest."""
        channel = -1 if isinstance(self.module, nn.Linear | TransformerBlock) else 1
        return (out - target).abs().pow(power).sum(channel).mean()


@dataclass(frozen=True)
class UnitCall:
    """Arguments of a unit in the network quantized so far, and its output at full precision."""

    args: tuple[Any, ...]
    target: Tensor


def units(network: nn.Module, layers: Iterable[str]) -> list[Unit]:
    """The units that hold the named layers, in the order of the network's modules; each layer is in one of them."""
    blocks = [name for name, module in network.named_modules() if isinstance(module, BLOCKS)]
    members: dict[str, list[str]] = {}
    for layer in layers:
        members.setdefault(next((block for block in blocks if layer.startswith(block + ".")), layer), []).append(layer)
    return [Unit(name, network.get_submodule(name), tuple(inside)) for name, inside in members.items()]


def check_plain(layer: QuantLayer) -> None:
    """Refuse a layer whose rounded weight cannot stand in for the floating-point one.

    Raises:
        QuantError: a layer with a smoothing scale, an offset, a rotation or a branch.
    """
    if layer.smooth is not None or layer.offset is not None or any(layer.rotated) or layer.rank:
        raise QuantError(
            f"{layer.name}: a layer that is smoothed, shifted, rotated or has a branch cannot be reconstructed in place of its float layer"
        )


@contextmanager
def replayed(outputs: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Within the block these modules return the given outputs and compute nothing; a network must not change them in place."""

    def returning(out: Tensor) -> Callable[..., Tensor]:
        return lambda *_args, **_kwargs: out

    for module, out in outputs.items():
        module.forward = returning(out)
    try:
        yield
    finally:
        for module in outputs:
            del module.forward  # the class's own shows again


class _Reached(Exception):
    """Ends a network call at the unit that was waited for."""


@torch.no_grad()
def capture(unit: Unit, full: Callable[[], Any], quantized: Callable[[], Any]) -> UnitCall:
    """One call of a unit for learning; both network calls end at the unit, later layers do not run.

    Args:
        full, quantized: call the network at full precision and as quantized so far, on the same sample.
    Raises:
        QuantError: a unit that does not run.
    """
    seen: dict[str, Any] = {}

    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["args"] = args
        raise _Reached

    def after(_module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> None:
        seen["target"] = out
        raise _Reached

    for key, run in (("target", full), ("args", quantized)):
        # before hooks that round the unit's input: that is for the unit to learn
        handle = (
            unit.module.register_forward_hook(after) if key == "target" else unit.module.register_forward_pre_hook(before, prepend=True)
        )
        try:
            run()
        except _Reached:
            pass
        finally:
            handle.remove()
        if key not in seen:
            raise QuantError(f"{unit.name}: never ran on a calibration sample, so it cannot be reconstructed")
    return UnitCall(**seen)


def fit(
    parameters: Sequence[nn.Parameter],
    calls: Sequence[UnitCall],
    loss: Callable[[UnitCall], Tensor],
    updates: int,
    batch: int,
    learning_rate: float,
    seed: int,
    what: str,
    penalty: Callable[[int], Tensor | None] = lambda _update: None,
    cosine: bool = False,
) -> tuple[float, ...]:
    """Adam on the mean of `loss` over `batch` calls an update, drawn without repetition until all were used.

    Args:
        penalty: added to the loss of an update, by its number from 0; None: nothing.
        cosine: let the learning rate fall to 0 along a cosine; else it stays.
    Returns:
        the loss of each update, without the penalty.
    Raises:
        QuantError: no calls, or a loss that is not finite.
    """
    if not calls:
        raise QuantError(f"{what}: the calibration set is empty")
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: (1 + math.cos(math.pi * update / max(1, updates))) / 2 if cosine else 1.0
    )
    order, losses = shuffled(len(calls), seed), []
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            for update in range(updates):
                total = 0.0
                # one call after the other: timesteps and context differ, and temporal layers want whole clips
                for _ in range(batch):
                    value = loss(calls[next(order)]) / batch
                    value.backward()  # type: ignore[no-untyped-call]
                    total += value.item()
                extra = penalty(update)
                if extra is not None:
                    extra.backward()  # type: ignore[no-untyped-call]
                if not math.isfinite(total):
                    raise QuantError(f"{what}: the loss is {total} at update {update + 1} of {updates}; lower its learning rate")
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                losses.append(total)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return tuple(losses)
