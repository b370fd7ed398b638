"""Bias corrections measured instead of trained: what rounding changes in the mean of each output channel.

The mean of a rounded layer's output differs from that of the full-precision layer, mostly because ranges cut tails off, and later layers pass
the difference on. Layer after layer, in the order of one network call, the difference is measured and at once made up for, so that a layer
corrects only what the layers before it left; means over calibration samples (of one row of timesteps) become the correction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvsr.progress import progress
from qvsr.quant import apply
from qvsr.quant.by_timestep import row_of
from qvsr.quant.layer import QuantError, QuantLayer
from qvsr.quant.refine import Samples, call


def channel_means(layer: QuantLayer, y: Tensor) -> Tensor:
    """Mean of each output channel ``(N,)`` over everything else."""
    return y.flatten(0, -2).mean(0) if layer.is_linear else y.transpose(0, 1).flatten(1).mean(1)


@torch.no_grad()
def measure_bias(
    network: nn.Module,
    full_precision: Mapping[str, nn.Module],
    samples: Samples,
    bounds: Sequence[int] = (),
    weights: Sequence[float] | None = None,
) -> None:
    """Fill the started corrections of a network's quantized layers (:meth:`qvsr.quant.layer.QuantLayer.start_correction`) with what is measured.

    Args:
        network: with its quantized layers.
        full_precision: the layers that they stand for, by name.
        bounds: the timesteps that the corrections were started with.
        weights: of each sample, by sample; None: all 1.
    """
    layers = {name: layer for name, layer in apply.quant_layers(network).items() if name in full_precision}
    shape = (max(1, len(bounds)),)
    sums = {name: layer.weight_scale.new_zeros(*shape, layer.geometry.out_channels) for name, layer in layers.items()}
    seen = torch.zeros(shape)
    means: dict[str, Tensor] = {}
    row, weight = 0, 1.0

    def remember(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, y: Tensor) -> None:
            means[name] = channel_means(layers[name], y)

        return hook

    def make_up(name: str) -> Any:
        def hook(layer: nn.Module, _args: Any, y: Tensor) -> Tensor:
            assert isinstance(layer, QuantLayer)
            missing = means[name] - channel_means(layer, y)
            sums[name][row] += weight * missing
            return y + (missing if layer.is_linear else layer._along_inputs(missing))

        return hook

    with progress("bias") as report:
        for index in range(len(samples)):
            sample = samples[index]
            row, weight = row_of(sample.t, bounds) if bounds else 0, 1.0 if weights is None else weights[index]
            seen[row] += weight
            handles = [module.register_forward_hook(remember(name)) for name, module in full_precision.items()]
            try:
                with apply.exchanged(network, full_precision):
                    call(network, sample)
            finally:
                for handle in handles:
                    handle.remove()
            handles = [layer.register_forward_hook(make_up(name)) for name, layer in layers.items()]
            try:
                call(network, sample)
            finally:
                for handle in handles:
                    handle.remove()
            report(index + 1, len(samples))
    if bool((seen == 0).any()):
        raise QuantError(f"bias by timestep: no calibration sample for row {int((seen == 0).nonzero()[0])} of {list(bounds)}")
    for name, layer in layers.items():
        if layer.correction is None:
            raise QuantError(f"{name}: no correction was started")
        layer.correction.copy_((sums[name] / seen[:, None]).view(layer.correction.shape))
