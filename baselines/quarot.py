"""QuaRot: rotate, then round (arXiv 2404.00456).

Kept: input channels and weights are multiplied by a randomised Hadamard matrix, which spreads outliers over all channels and changes nothing
without rounding; weights are rounded on a symmetric grid per output channel, to nearest or by GPTQ (arXiv 2210.17323; damping 1 %,
blocks of 128 columns, optional act-order); activations are rounded on a dynamic symmetric grid per token (`granularity: native`), or per tensor as
the other methods' are (`shared`). No training, no branch, no channel split.

What the video U-Net forced to change: a language model has one residual stream behind RMSNorm, whose scale folds into the next layer and
whose rotation folds into the weights on both sides. Here GroupNorm, LayerNorm, SPADE, concatenations and SiLU stand between the layers,
none of which commutes with a rotation. So each layer rotates its own input while it runs, on the channel axis, in convolutions the same for each
tap; a number of channels without a Hadamard matrix stays unrotated. A convolution's token is a pixel, and a kernel larger than one pixel sums
pixels that would have different scales: such layers round per frame in the native setting (Conv3d: per clip).

Deviations: attention's queries, keys, values are not quantized (as for no method here), so neither are they rotated by head; no clipping of
activation ranges (the paper's 0.9; the released code's default is 1, as here) and no search for weight ranges (an option there); GPTQ sees
the inputs of the full-precision network and not of the layers rounded so far, it sees `gptq_rows` of a call's input vectors, inputs that were
never seen are rounded to nearest and not set to 0, and an output channel keeps nearest rounding where that loses less; scales do not
fall below 1e-4 (as for every method here).

Cost: nothing learned and one sign an input channel; at run time a rotation of K channels at each input position (K log K operations
by a fast transform, K^2 as dense matrices, as simulated here). GPTQ takes the recorded calls once for every 2 GiB of Hessians, 8 (K·taps)^2
bytes a layer, and (K·taps)^3 operations a layer.
"""

from __future__ import annotations

from torch import nn

from qvsr.config import QuantSpec
from qvsr.method_settings import QuaRotSettings
from qvsr.quant import apply
from qvsr.quant.gptq import round_layers
from qvsr.quant.layer import LayerPlan, QuantLayer
from qvsr.quant.refine import Samples
from qvsr.registry import BASELINES


@BASELINES.add("quarot", title="QuaRot", source="arXiv 2404.00456")
def quarot(unet: nn.Module, calibration: Samples, spec: QuantSpec) -> nn.Module:
    """Quantize a U-Net in place by rotating and rounding.

    Args:
        unet: full precision; takes ``(x, t, context, struct)``.
        calibration: recorded full-precision calls; read for GPTQ only.
        spec: bits, excluded layers, seed of the rotations' signs, and :class:`qvsr.method_settings.QuaRotSettings` as plain values.
    Returns:
        the same network with its layers replaced by frozen :class:`QuantLayer`; for GPTQ, both losses of each layer are noted on it.
    Raises:
        QuantError: GPTQ without samples, or a layer that never ran on them.
    """
    settings = QuaRotSettings.model_validate(spec.settings)
    layers = open_layers(unet, spec, settings)
    if settings.weights == "gptq":
        done = round_layers(unet, layers, calibration, settings.gptq_rows, spec.seed, settings.gptq_damp, settings.gptq_act_order)
        apply.note(unet, gptq={name: [one.nearest, one.chosen, one.kept_nearest] for name, one in done.items()})
    apply.quantize_layers(unet, spec.exclude, lambda name, _module: layers[name])
    apply.freeze(unet)
    return unet


def open_layers(unet: nn.Module, spec: QuantSpec, settings: QuaRotSettings) -> dict[str, QuantLayer]:
    """The rotated layers by name, not rounded yet and not in the network yet."""
    plan = LayerPlan(
        spec.weight_bits,
        spec.act_bits,
        rotate=settings.rotation,
        act_granularity="token" if settings.granularity == "native" else "tensor",
        weight_symmetric=settings.symmetric,
        act_symmetric=settings.symmetric,
    )
    modules = apply.quantizable(unet, spec.exclude)
    return {name: QuantLayer.from_float(module, plan, name, spec.seed) for name, module in modules.items()}
