"""PassionSR: trained channel scales and offsets, then trained ranges (arXiv 2411.17106).

    y = Q((x - o) / s) Q(W s)^T + W o + b,     Q between two trained bounds

Kept: the learnable equivalent transform with a factor s and an offset o per input channel, ``s = amax^a / wmax^a`` (a = 0.3) and ``o = 0`` at the
start; the learnable boundary quantizer (:mod:`qvsr.quant.boundaries`), whose bounds belong to a weight's output channel and to a whole static
activation; two halves of the input channels with bounds of their own; the order of the distribution-quantization calibration: a pass that measures
activation ranges by a moving average (0.95), two epochs that train s and o, two that train the bounds; Adam at 1e-5, a tenth of it after the first
epoch, one sample an update.

The video U-Net forces: the published model takes one step and is trained on the latent image that it returns; this one takes many, so the loss is the
squared error of the U-Net's output over calls of all timesteps pooled. A sample is a call with its five frames. For Conv3d s and o are per channel as
for the others. The constant ``W o`` is exact at zero-padded borders, where fewer taps see the offset (:mod:`qvsr.quant.layer`).

Cost: at run time a subtraction and a division a channel, and the constant, one more number a channel and tap; s of a layer behind an affine norm could be
folded into that norm. To calibrate: two full-precision calls a sample and four epochs of training the whole network.

What to expect of the loss: the squared error of the output weighs all timesteps alike, while an error at the last of them hardly reaches the restored
frames. In the small model of config/default.yaml that timestep has most of the loss, so a high rate lowers the loss and can still take fidelity away.

Deviations:
- products of attention are not quantized, because no method's are here; so the factors of their operands (s_qk on the head dimension, s_vw on the keys)
  have nothing to act on and are left out;
- the shared layers are left out (`method.exclude`); the released code keeps the first convolution at the bits of all layers, and the first linear
  layer of the time embedding and the last convolution at 8;
- the released code's linear layers cut tokens, not channels, in halves, and count ``W o`` twice; neither is copied;
- s is scaled to geometric mean 1 at the start, which changes no product;
- moving averages are those of the full-precision network's inputs, transformed by the starting s; the paper does not say whose;
- while s and o are trained, a weight's bounds are the smallest and largest value of ``W s``, gradients included, and activation bounds stay as measured:
  how the bounds follow s is not published;
- a stage whose loss did not fall on the probed samples is undone; there it always takes what was learned;
- scales never fall below the layer's smallest scale;
- the setting `relative` (off by default) counts each trained number in units of its own size, because one rate of Adam moves a weight's bound of 0.1
  a hundred times as far as an activation's of 10. It makes few updates go a long way and is not published.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from baselines.maxmin import set_static_ranges
from qvsr.config import QuantSpec
from qvsr.method_settings import PassionSRSettings
from qvsr.progress import progress
from qvsr.quant import affine, apply
from qvsr.quant.boundaries import Trained, bounded_quantize
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer, halves
from qvsr.quant.refine import Curve, Samples, train
from qvsr.quant.smoothing import factors, input_amax, weight_amax
from qvsr.registry import BASELINES

LR_FACTOR = 0.1
SMALLEST_FACTOR = 1e-3  # of s, however far it is trained


@BASELINES.add("passionsr", title="PassionSR", source="arXiv 2411.17106")
def passionsr(unet: nn.Module, calibration: Samples, spec: QuantSpec) -> nn.Module:
    """Quantize a U-Net in place with PassionSR.

    Args:
        unet: full precision; takes ``(x, t, context, struct)``.
        calibration: recorded full-precision calls.
        spec: bits, excluded layers, seed, and :class:`qvsr.method_settings.PassionSRSettings` as plain values.
    Returns:
        the same network with its layers replaced by frozen :class:`QuantLayer`; losses and the number of trained parameters are noted on it for
        the checkpoint.
    """
    settings = PassionSRSettings.model_validate(spec.settings)
    modules = apply.quantizable(unet, spec.exclude)
    if len(calibration) == 0:
        raise QuantError("passionsr: the calibration set is empty")
    layers = start(unet, modules, calibration, spec, settings)
    learned = {name: Learned(module, layers[name], settings.relative) for name, module in modules.items()}
    apply.quantize_layers(unet, spec.exclude, lambda name, _module: layers[name])
    for name, one in learned.items():
        apply.replace(unet, name, one)
    losses, trained = {}, 0
    parameters = [parameter for one in learned.values() for parameter in one.transform()]
    if parameters and settings.transform_epochs:
        curve = _train(
            unet, parameters, calibration, settings.transform_epochs, settings.transform_learning_rate, spec.seed, "train transform"
        )
        losses["train_transform"], trained = curve.summary(), trained + sum(parameter.numel() for parameter in parameters)
    for one in learned.values():
        one.fix_weight_bounds()
    parameters = [parameter for one in learned.values() for parameter in one.bounds()]
    if settings.bounds_epochs:
        curve = _train(unet, parameters, calibration, settings.bounds_epochs, settings.bounds_learning_rate, spec.seed, "train bounds")
        losses["train_bounds"], trained = curve.summary(), trained + sum(parameter.numel() for parameter in parameters)
    for name, one in learned.items():
        apply.replace(unet, name, one.quant_layer())
    apply.freeze(unet)
    apply.note(unet, losses=losses, trained_params=trained)
    return unet


def start(
    unet: nn.Module, modules: Mapping[str, nn.Module], samples: Samples, spec: QuantSpec, settings: PassionSRSettings
) -> dict[str, QuantLayer]:
    """Open layers with the starting s and static activation ranges, by name."""
    amax = input_amax(unet, modules, samples) if settings.transform else {}
    layers = {}
    for name, module in modules.items():
        weight: Tensor = module.weight.detach()  # type: ignore[assignment,operator,union-attr]
        plan = LayerPlan(spec.weight_bits, spec.act_bits, halves(weight.shape[1]) if settings.channel_split else ())
        smooth = factors(amax[name][0], weight_amax(weight), settings.alpha, settings.alpha) if settings.transform else None
        layers[name] = QuantLayer.from_float(module, plan, name, smooth=smooth)
    set_static_ranges(unet, layers, samples, spec, settings.ema)
    return layers


class Learned(nn.Module):
    """A layer while its transform and bounds are trained; it rounds as the layer that :meth:`quant_layer` returns.

    Args:
        module: the floating-point layer.
        layer: plan, starting s and static activation ranges; it is not changed.
        relative: count s, o and the bounds in units of their own size at the start.
    """

    def __init__(self, module: nn.Module, layer: QuantLayer, relative: bool) -> None:
        super().__init__()
        assert layer.act_scale is not None and layer.act_zero_point is not None, f"{layer.name} has no static range"
        self.module, self.layer, self.relative = module, layer, relative
        scale, zero_point = layer.act_scale[0], layer.act_zero_point[0]
        low, high = -zero_point * scale, (affine.levels(layer.act_bits) - zero_point) * scale
        width = (high - low) if relative else None
        self.act_low, self.act_high = Trained(low, width), Trained(high, width)
        self.smooth = self.offset = self.weight_low = self.weight_high = None
        if layer.smooth is not None:
            self.smooth = Trained(layer.smooth, layer.smooth if relative else None)
            self.offset = Trained(torch.zeros_like(layer.smooth), None if width is None else layer.smooth * self._by_channel(width))

    smooth: Trained | None
    offset: Trained | None
    weight_low: Trained | None
    weight_high: Trained | None

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`QuantLayer.forward`, with gradients to all that is trained."""
        layer, weight, constant = self.layer, self._weight(), None
        if self.smooth is not None and self.offset is not None:
            offset, factor = self.offset(), self._factor()
            constant = layer.offset_constant((weight * self._along_weight(offset)).sum(1, keepdim=True), x.shape)
            # (x - o) / s as one product and sum, whose backward pass is half as long
            x = torch.addcmul(self._along_input(-offset / factor), x, self._along_input(1 / factor))
            weight = weight * self._along_weight(factor)
        low, high = (self._along_input(self._by_channel(bound())) for bound in (self.act_low, self.act_high))
        x = bounded_quantize(x, low, high, layer.act_bits, layer.scale_floor)
        low, high = (self._along_weight(self._by_channel(bound)) for bound in self._weight_bounds(weight))
        y = layer.operate(x, bounded_quantize(weight, low, high, layer.weight_bits, layer.scale_floor), layer.bias)
        return y if constant is None else y + constant

    def transform(self) -> list[nn.Parameter]:
        """What the first stage trains."""
        return [number.parameter for number in (self.smooth, self.offset) if number is not None]

    def bounds(self) -> list[nn.Parameter]:
        """What the second stage trains; :meth:`fix_weight_bounds` first."""
        bounds = (self.weight_low, self.weight_high, self.act_low, self.act_high)
        return [number.parameter for number in bounds if number is not None]

    @torch.no_grad()
    def fix_weight_bounds(self) -> None:
        """Let the weight's bounds follow s no longer: they become numbers of their own."""
        weight = self._weight()
        low, high = self._weight_bounds(weight if self.smooth is None else weight * self._along_weight(self._factor()))
        width = (high - low).clamp_min(self.layer.scale_floor) if self.relative else None
        self.weight_low, self.weight_high = Trained(low, width), Trained(high, width)

    @torch.no_grad()
    def quant_layer(self) -> QuantLayer:
        """The open quantized layer with what was trained."""
        old, smooth, offset = self.layer, None, None
        if self.smooth is not None and self.offset is not None:
            smooth, offset = self._factor(), self.offset()
        plan = LayerPlan(old.weight_bits, old.act_bits, old.parts, scale_floor=old.scale_floor)
        layer = QuantLayer.from_float(self.module, plan, old.name, smooth=smooth, offset=offset)
        assert layer.weight is not None
        low, high = self._weight_bounds(layer.weight)
        layer.set_weight_ranges(list(zip(low.unbind(1), high.unbind(1), strict=True)))
        layer.set_static_activations(self.act_low()[None], self.act_high()[None])
        return layer

    def _weight(self) -> Tensor:
        return self.module.weight.detach()  # type: ignore[no-any-return,operator,union-attr]

    def _factor(self) -> Tensor:
        assert self.smooth is not None
        return self.smooth().clamp_min(SMALLEST_FACTOR)

    def _weight_bounds(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, P)`` each; of the transformed weight until they are fixed."""
        if self.weight_low is not None and self.weight_high is not None:
            return self.weight_low(), self.weight_high()
        ranges = [affine.channel_range(part.flatten(1)) for part in weight.split(self.layer.parts, 1)]
        return torch.cat([low for low, _ in ranges], 1), torch.cat([high for _, high in ranges], 1)

    def _by_channel(self, values: Tensor) -> Tensor:
        """One value a part, ``(…, P)``, repeated over the part's channels: ``(…, K)``."""
        return torch.cat([values[..., part : part + 1].expand(*values.shape[:-1], size) for part, size in enumerate(self.layer.parts)], -1)

    def _along_input(self, values: Tensor) -> Tensor:
        return values if self.layer.is_linear else self._along_weight(values)

    def _along_weight(self, values: Tensor) -> Tensor:
        """``(K,)`` or ``(N, K)``, shaped to broadcast over a weight."""
        return values.reshape(-1, values.shape[-1], *(1,) * len(self.layer.geometry.kernel))


def _train(
    unet: nn.Module, parameters: list[nn.Parameter], samples: Samples, epochs: float, learning_rate: float, seed: int, what: str
) -> Curve:
    with progress(what) as report:
        return train(unet, parameters, samples, round(epochs * len(samples)), 1, learning_rate, 0.0, seed, what, report, factor=LR_FACTOR)
