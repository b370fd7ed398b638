"""Train a few parameters of a quantized network so that its output comes closer to the full-precision output."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qvsr.quant.apply import quant_layers
from qvsr.quant.layer import QuantError

log = logging.getLogger(__name__)
LR_FACTOR = 0.2
PROBES = 8
LARGE = 2**28  # weights of quantized layers in a network from which those that are rounded for training are not kept


class Sample(Protocol):
    """One recorded call of the full-precision network; :class:`qvsr.data.calibration.Sample` is one."""

    @property
    def x(self) -> Tensor: ...
    @property
    def t(self) -> Tensor: ...
    @property
    def context(self) -> Tensor: ...
    @property
    def struct(self) -> dict[str, Tensor]: ...
    @property
    def out(self) -> Tensor: ...
    @property
    def clip(self) -> str: ...


class Samples(Protocol):
    """A calibration set; :class:`qvsr.data.calibration.CalibrationSet` is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Curve:
    """What training did: the mean loss before and after on the same few samples, and the loss of each update.

    `after` is that of the parameters as training left them; where it is not below `before`, they were put back.
    """

    before: float
    after: float
    updates: tuple[float, ...]

    def summary(self, points: int = 20) -> dict[str, Any]:
        """Plain values for a file's header: at most `points` means over equal stretches of the curve."""
        size = max(1, math.ceil(len(self.updates) / points))
        means = [sum(part) / len(part) for part in (self.updates[i : i + size] for i in range(0, len(self.updates), size))]
        return {
            "before": self.before,
            "after": self.after,
            "kept": self.after < self.before,
            "updates": len(self.updates),
            "curve": [float(f"{mean:.6g}") for mean in means],
        }


def call(network: nn.Module, sample: Sample) -> Tensor:
    """The network's output for a recorded call."""
    result: Tensor = network(sample.x, sample.t, sample.context, sample.struct)
    return result


@torch.no_grad()
def mean_loss(network: nn.Module, samples: Samples, indices: Sequence[int], weights: Sequence[float] | None = None) -> float:
    """Mean squared difference to the recorded outputs, over some samples, each times its weight."""
    return sum(
        float(F.mse_loss(call(network, samples[i]), samples[i].out)) * (1.0 if weights is None else weights[i]) for i in indices
    ) / len(indices)


def train(
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    samples: Samples,
    updates: int,
    accumulate: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    what: str = "refine",
    progress: Callable[[int, int], None] | None = None,
    factor: float = LR_FACTOR,
    weights: Sequence[float] | None = None,
) -> Curve:
    """Minimise the squared difference to the recorded full-precision output over `parameters`, and nothing else.

    AdamW; the learning rate falls to a fifth after half of the updates; each update sums the gradients of `accumulate` samples; samples
    come in a random order, every one once before any comes again (arXiv 2508.04485, Sec. 4.1, and its released code).

    Args:
        network: takes ``(x, t, context, struct)``.
        seed: of the order of samples.
        what: names this training in messages.
        progress: called with (updates done, updates in all).
        factor: what the learning rate is multiplied by after half of the updates.
        weights: of each sample's loss, by sample; None: all 1.
    Returns:
        the losses. The parameters are trained, or as they were if the loss did not fall on the probed samples: a few updates at a rate made
        for many can do more harm than rounding did (the published code, with many, keeps whatever comes out).
    Raises:
        QuantError: no samples, or a loss that is not finite.
    """
    if len(samples) == 0:
        raise QuantError(f"{what}: the calibration set is empty")
    probes = sorted({round(i * (len(samples) - 1) / max(1, PROBES - 1)) for i in range(PROBES)})
    before = mean_loss(network, samples, probes, weights)
    if updates == 0 or not parameters:
        return Curve(before, before, ())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, updates // 2), factor)
    order, losses = shuffled(len(samples), seed), []
    start = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            for update in range(updates):
                total = 0.0
                for _ in range(accumulate):
                    index = next(order)
                    sample = samples[index]
                    loss = F.mse_loss(call(network, sample), sample.out)
                    if weights is not None:
                        loss = loss * weights[index]
                    (loss / accumulate).backward()  # type: ignore[no-untyped-call]
                    total += loss.item() / accumulate
                if not math.isfinite(total):
                    raise QuantError(f"{what}: the loss is {total} at update {update + 1} of {updates}; lower learning_rate")
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                losses.append(total)
                if progress is not None:
                    progress(update + 1, updates)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    curve = Curve(before, mean_loss(network, samples, probes, weights), tuple(losses))
    line = f"{what}: loss on {len(probes)} calibration samples {before:.4g} -> {curve.after:.4g} in {updates} updates"
    if curve.after < before:
        log.info(line)
    else:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
        log.warning("%s: it did not fall, so the parameters stay as they were; lower learning_rate or raise the updates", line)
    return curve


@contextmanager
def recomputed(network: nn.Module) -> Iterator[None]:
    """Within the block, open layers of a large network keep no rounded weights: neither between calls nor for the backward pass, which computes them
    again. Training through the rounding would hold several copies of every weight; losses and gradients are the same.
    """
    layers = [layer for layer in quant_layers(network).values() if layer.is_open]
    if sum(math.prod(layer.geometry.weight_shape) for layer in layers) < LARGE:
        layers = []
    for layer in layers:
        layer.keep_rounded, layer._cache = False, None
        setattr(layer, "forward", functools.partial(checkpoint, layer.forward, use_reentrant=False))  # noqa: B010  (a method to mypy)
    try:
        yield
    finally:
        for layer in layers:
            layer.keep_rounded = True
            delattr(layer, "forward")


def shuffled(count: int, seed: int) -> Iterator[int]:
    """Endless indices below `count`, a new permutation each round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
