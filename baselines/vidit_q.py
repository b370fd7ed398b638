"""ViDiT-Q: channel balance, then rotation, with dynamic activation ranges (arXiv 2406.02540).

    y = Q(x m H) Q(W / m H)^T + b,     m = wmax^alpha / amax^(1 - alpha)  per input channel

*Static* imbalance of the channels, the same in every step, is scaled away by m; *dynamic* imbalance, which changes from step to step, is spread
by the Hadamard rotation H. Weights are rounded to nearest between the minimum and maximum of an output channel; activations between those of
a token (native) or of the tensor (shared), measured anew in each call. ``amax`` is the released code's statistic: the largest magnitude over
tokens, averaged over the batch, and over calibration samples by a moving average.

Kept: formula, order (scale, then rotate), statistic, ranges, and from the 2024 code, as the setting ``timestep_bounds``, a balance of its own
for each group of timesteps. That code rounds the weight anew for each group, so this is a set of integers a group
(:class:`qvsr.quant.by_timestep.ByTimestep`), which multiplies the size by the number of groups; hence one group is the default.

What the video U-Net forced: a token is a (frame, pixel) for linear layers and a pixel for 1x1 convolutions; a larger kernel sums over
pixels, whose scales no integer sum can mix, and takes a range per frame (per clip for Conv3d, whose kernel mixes frames). m acts on the input
channels of convolutions, the same for every tap. "Batch" is the frames of a segment, in temporal attention its pixels.

Deviations: the value of alpha in the ICLR release is not known to us, so it is the even 0.5; the 2024 code raises ``amax`` to alpha and ``wmax`` to
1 - alpha, so that its 0.11 (W4A8) is 0.89 here. m is scaled to geometric mean 1, which changes no product. The first and last layers and the embedders
of the paper's networks stay full precision; here the exclusions shared by all methods do. Left out: the split by guidance (there is none) and
metric-decoupled mixed precision (bits are uniform here).

Cost: one full-precision call a calibration sample; per call one product a channel, and the rotation.
"""

from __future__ import annotations

from torch import nn

from qvsr.config import QuantSpec
from qvsr.method_settings import ViDiTQSettings
from qvsr.quant import apply
from qvsr.quant.by_timestep import ByTimestep
from qvsr.quant.layer import LayerPlan, QuantLayer
from qvsr.quant.refine import Samples
from qvsr.quant.smoothing import factors, input_amax, weight_amax
from qvsr.registry import BASELINES


@BASELINES.add("vidit_q", title="ViDiT-Q", source="arXiv 2406.02540")
def vidit_q(unet: nn.Module, calibration: Samples, spec: QuantSpec) -> nn.Module:
    """Quantize a U-Net in place with ViDiT-Q.

    Args:
        unet: full precision; takes ``(x, t, context, struct)``.
        calibration: recorded full-precision calls; read for the balance only. Each timestep group needs one.
        spec: bits, excluded layers, seed (of the rotations), and :class:`qvsr.method_settings.ViDiTQSettings` as plain values.
    Returns:
        the same network with its layers replaced by frozen :class:`QuantLayer`, or by :class:`ByTimestep` of those with several groups.
    """
    settings = ViDiTQSettings.model_validate(spec.settings)
    modules, bounds = apply.quantizable(unet, spec.exclude), settings.timestep_bounds
    granularity = settings.native_activations if settings.granularity == "native" else "tensor"
    plan = LayerPlan(spec.weight_bits, spec.act_bits, rotate=settings.rotation, act_granularity=granularity)
    forms: dict[str, list[QuantLayer]] = {}
    if settings.balance:
        for name, amax_SK in input_amax(unet, modules, calibration, bounds, settings.ema).items():
            wmax_K = weight_amax(modules[name].weight)  # type: ignore[arg-type]
            # the layer divides by its factors, the paper multiplies: both exponents change their sign
            rows = [factors(amax_K, wmax_K, 1 - settings.alpha, settings.alpha) for amax_K in amax_SK]
            forms[name] = [QuantLayer.from_float(modules[name], plan, name, spec.seed, smooth=row) for row in rows]
    else:
        forms = {name: [QuantLayer.from_float(module, plan, name, spec.seed)] for name, module in modules.items()}
    apply.quantize_layers(unet, spec.exclude, lambda name, _module: forms[name][0])
    if len(bounds) > 1:
        for name, by_group in forms.items():
            apply.replace(unet, name, ByTimestep(by_group, bounds, name))
    apply.freeze(unet)
    apply.follow_timesteps(unet)
    return unet
