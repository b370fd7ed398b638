"""MaxMin: round to nearest between the smallest and the largest value (arXiv 1712.05877).

Weights have a range per output channel, activations one per tensor: measured anew in each call (`dynamic`, QuantVSR's own quantizer), or
fixed from calibration (`static`: the first sample's minimum and maximum, then a moving average over the samples, as in the framework of the
same laboratory). Which of the two the paper's table used is not known. No rotation, branch or training; the channel split is off by
default. The video U-Net forces nothing: the temporal convolutions are rounded per output channel like the others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qvsr.config import QuantSpec
from qvsr.method_settings import MaxMinSettings
from qvsr.progress import progress
from qvsr.quant import affine, apply
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer, halves
from qvsr.quant.observe import observe_inputs
from qvsr.quant.refine import Samples, call
from qvsr.registry import BASELINES


@BASELINES.add("maxmin", title="MaxMin", source="arXiv 1712.05877")
def maxmin(unet: nn.Module, calibration: Samples, spec: QuantSpec) -> nn.Module:
    """Quantize a U-Net in place by rounding to nearest.

    Args:
        unet: full precision; takes ``(x, t, context, struct)``.
        calibration: recorded full-precision calls; read for static activation ranges only.
        spec: bits, excluded layers, and :class:`qvsr.method_settings.MaxMinSettings` as plain values; there is nothing random.
    Returns:
        the same network with its layers replaced by frozen :class:`QuantLayer`.
    """
    settings = MaxMinSettings.model_validate(spec.settings)
    layers = {}
    for name, module in apply.quantizable(unet, spec.exclude).items():
        parts = halves(int(module.weight.shape[1])) if settings.channel_split else ()  # type: ignore[union-attr,index]
        layers[name] = QuantLayer.from_float(module, LayerPlan(spec.weight_bits, spec.act_bits, parts), name)
    if settings.activations == "static":
        set_static_ranges(unet, layers, calibration, spec, settings.ema)
    apply.quantize_layers(unet, spec.exclude, lambda name, _module: layers[name])
    apply.freeze(unet)
    return unet


@torch.no_grad()
def set_static_ranges(unet: nn.Module, layers: dict[str, QuantLayer], samples: Samples, spec: QuantSpec, decay: float) -> None:
    """Activation ranges from the full-precision network's inputs: the first call's, then ``decay·old + (1 - decay)·new``."""
    if len(samples) == 0:
        raise QuantError("maxmin: static activation ranges need calibration samples, the set is empty")
    lows: dict[str, Tensor] = {}
    highs: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        ranges = [affine.tensor_range(part) for part in layers[name].input_parts(x)]
        for kept, new in ((lows, torch.stack([low for low, _ in ranges])), (highs, torch.stack([high for _, high in ranges]))):
            kept[name] = torch.lerp(new, kept[name], decay) if name in kept else new

    with observe_inputs(apply.quantizable(unet, spec.exclude), see), progress("activation ranges") as report:
        for index in range(len(samples)):
            call(unet, samples[index])
            report(index + 1, len(samples))
    for name, layer in layers.items():
        if name not in lows:
            raise QuantError(f"{name}: never ran on the calibration samples, so it has no static range; use activations: dynamic")
        layer.set_static_activations(lows[name][None], highs[name][None])
