"""Q-Diffusion: searched static ranges, split shortcuts, learned rounding (arXiv 2302.04304; units arXiv 2102.05426, rounding arXiv 2004.10568).

Kept: weights asymmetric per output channel, activations asymmetric and static per tensor, ranges by the 80-step search with the 2.4 norm
(:mod:`qvsr.quant.search`); the decoder blocks' 1x1 skip convolutions, whose input is the concatenation of two feature maps, with ranges of their
own for either (weights and activations); AdaRound unit by unit through the network (:mod:`qvsr.quant.adaround`), each with the inputs that the
network with the weights rounded so far gives and the outputs of full precision; then activation ranges, and their step sizes trained unit by unit,
activations rounded everywhere (:mod:`qvsr.quant.lsq`). Samples of all timesteps are pooled.

The video U-Net forces: a ResBlock's unit takes (map, time embedding, structure maps) and holds its SPADE convolutions; the temporal convolution and
the temporal attention are units too; a sample is a call with its five frames, never single frames, since temporal units need whole clips, so a
batch of 8 is 40 frames.

Cost: none at run time beyond integer layers (a second scale for the split skips). Calibration is long: by default 20,000 + 5,000 updates of 8 samples
for each unit, of which the published network has 80, hence days on a GPU; fewer are a *reduced* Q-Diffusion and are to be called so. Without
`keep_outputs` two calls of the network up to the unit come on top, for each unit, sample and training.

Deviations:
- products of attention (q, k, v and the softmax) are not quantized, because no method's are here; the released code quantizes them;
- the shared layers are left out (`method.exclude`); the released code leaves out none;
- activation ranges are searched on a network whose weights are rounded and whose activations are not, all layers at once; there each layer
  sees inputs rounded before it. The optional pass of moving averages is not made;
- units are trained on at most `samples` calls, because their inputs are kept in memory; there all are kept;
- the error of tokens is summed over channels as that of maps is; there over tokens;
- a unit whose error did not fall keeps what it had (rounding to nearest, searched steps); there it always takes what was learned;
- steps never fall below the layer's smallest scale.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qvsr.config import QuantSpec
from qvsr.method_settings import QDiffusionSettings
from qvsr.models.layers import Downsample, ResBlock
from qvsr.models.unet import InflatedUNet
from qvsr.progress import progress
from qvsr.quant import apply, search
from qvsr.quant.adaround import Rounding, learn_rounding
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer
from qvsr.quant.lsq import InputStep, learn_steps, rounded_inputs
from qvsr.quant.reconstruct import Unit, UnitCall, capture, replayed, units
from qvsr.quant.refine import Curve, Sample, Samples, call
from qvsr.registry import BASELINES


@BASELINES.add("q_diffusion", title="Q-Diffusion", source="arXiv 2302.04304")
def q_diffusion(unet: nn.Module, calibration: Samples, spec: QuantSpec) -> nn.Module:
    """Quantize a U-Net in place with Q-Diffusion.

    Args:
        unet: full precision; takes ``(x, t, context, struct)``.
        calibration: recorded full-precision calls; only their inputs are read.
        spec: bits, excluded layers, seed, and :class:`qvsr.method_settings.QDiffusionSettings` as plain values.
    Returns:
        the same network with its layers replaced by frozen :class:`QuantLayer`; the errors of both trainings, summed over units, are noted
        on it for the checkpoint.
    """
    settings = QDiffusionSettings.model_validate(spec.settings)
    modules = apply.quantizable(unet, spec.exclude)
    if len(calibration) == 0:
        raise QuantError("q_diffusion: the calibration set is empty")
    parts = skip_parts(unet) if settings.shortcut_split else {}
    layers = {}
    for name, module in modules.items():
        layers[name] = layer = QuantLayer.from_float(module, LayerPlan(spec.weight_bits, spec.act_bits, parts.get(name, ())), name)
        pieces = module.weight.split(layer.parts, 1)  # type: ignore[operator,union-attr]
        layer.set_weight_ranges([search.weight_range(piece, spec.weight_bits, layer.scale_floor) for piece in pieces])
    chosen = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(spec.seed)).tolist()
    samples = [calibration[index] for index in chosen[: settings.samples]]
    network = Emulated(unet, modules, settings.keep_outputs)
    losses, trained = {}, 0
    curves = round_weights(network, layers, samples, settings, spec.seed)
    if settings.round_updates:
        losses["round_weights"] = summary(curves)
        trained += sum(math.prod(layer.geometry.weight_shape) for layer in layers.values())
    ranged = [calibration[index] for index in chosen[: settings.range_samples]]
    find_activation_ranges(network, layers, ranged, settings, spec.seed)
    if settings.step_updates:
        losses["train_steps"] = summary(train_steps(network, layers, samples, settings, spec.seed))
        trained += sum(step.step.numel() for step in network.steps.values())
    apply.quantize_layers(unet, spec.exclude, lambda name, _module: layers[name])
    apply.freeze(unet)
    apply.note(unet, losses=losses, trained_params=trained)
    return unet


class Emulated:
    """The floating-point network, which can run at full precision and with what is rounded so far.

    Attributes:
        modules: the layers to quantize, by name.
        weights: rounded weights by the layers' names; layers without one run at full precision.
        steps: input quantizers by the layers' names; likewise.
        keep: keep the outputs of units that are done, sample by sample, so that the next unit's inputs need no run of what lies before it.
    """

    def __init__(self, unet: nn.Module, modules: Mapping[str, nn.Module], keep: bool = False) -> None:
        self.unet, self.modules, self.keep = unet, modules, keep
        self.weights: dict[str, Tensor] = {}
        self.steps: dict[str, InputStep] = {}
        self._full: defaultdict[int, dict[nn.Module, Tensor]] = defaultdict(dict)
        self._done: defaultdict[int, dict[nn.Module, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def quantized(self, sample: Sample) -> Any:
        """The network's output with what is rounded so far."""
        weights = {f"{name}.weight": weight for name, weight in self.weights.items()}
        with rounded_inputs({name: self.modules[name] for name in self.steps}, self.steps):
            return functional_call(self.unet, weights, (sample.x, sample.t, sample.context, sample.struct))

    def calls_of(self, unit: Unit, samples: list[Sample]) -> list[UnitCall]:
        """What a unit gets and should return, for every sample."""
        calls = []
        for index, sample in enumerate(samples):
            full, quantized = (
                partial(self._replay, self._full[index], call, self.unet),
                partial(self._replay, self._done[index], self.quantized),
            )
            calls.append(capture(unit, partial(full, sample), partial(quantized, sample)))
        return calls

    @torch.no_grad()
    def done(self, unit: Unit, calls: list[UnitCall]) -> None:
        """Tell that a unit is as it will be from here on, with its calls of all samples."""
        if not self.keep:
            return
        weights = {unit.inner(name): self.weights[name] for name in unit.layers}
        with rounded_inputs({name: self.modules[name] for name in unit.layers if name in self.steps}, self.steps):
            for index, seen in enumerate(calls):
                self._full[index][unit.module] = seen.target
                self._done[index][unit.module] = functional_call(unit.module, weights, seen.args)

    def start_again(self) -> None:
        """Tell that units change once more from the first on."""
        self._done.clear()

    @staticmethod
    def _replay(outputs: dict[nn.Module, Tensor], run: Callable[..., Any], *args: Any) -> Any:
        with replayed(outputs):
            return run(*args)


def round_weights(
    network: Emulated, layers: dict[str, QuantLayer], samples: list[Sample], settings: QDiffusionSettings, seed: int
) -> list[Curve]:
    """Learn the rounding of all weights, unit by unit, activations unrounded; fills `network.weights` and the layers' integers."""
    curves, found = [], units(network.unet, layers)
    with progress("round weights") as report:
        for index, unit in enumerate(found):
            roundings = {name: Rounding(layers[name]) for name in unit.layers}
            calls = network.calls_of(unit, samples) if settings.round_updates else []
            if calls:
                curve = learn_rounding(
                    unit,
                    roundings,
                    calls,
                    settings.round_updates,
                    settings.batch,
                    settings.round_learning_rate,
                    settings.round_weight,
                    settings.round_warmup,
                    seed,
                )
                curves.append(curve)
            for name, rounding in roundings.items():
                layers[name].set_integers(rounding.integers())
                network.weights[name] = rounding.hard()
            network.done(unit, calls)
            report(index + 1, len(found))
    return curves


def find_activation_ranges(
    network: Emulated, layers: dict[str, QuantLayer], samples: list[Sample], settings: QDiffusionSettings, seed: int
) -> None:
    """Static ranges of all layers' inputs by search, in the network with rounded weights; fills `network.steps`."""

    def run() -> None:
        for sample in samples:
            network.quantized(sample)

    with progress("activation ranges", 0):
        ranges = search.activation_ranges(network.modules, layers, run, settings.range_values, seed)
    for name, (low, high) in ranges.items():
        layers[name].set_static_activations(low[None], high[None])
        network.steps[name] = InputStep(layers[name])


def train_steps(
    network: Emulated, layers: dict[str, QuantLayer], samples: list[Sample], settings: QDiffusionSettings, seed: int
) -> list[Curve]:
    """Train the activation steps unit by unit, with all weights and activations rounded; the layers get them."""
    curves, found = [], units(network.unet, layers)
    network.start_again()
    with progress("train steps") as report:
        for index, unit in enumerate(found):
            calls = network.calls_of(unit, samples)
            curve = learn_steps(
                unit,
                network.modules,
                network.steps,
                network.weights,
                calls,
                settings.step_updates,
                settings.batch,
                settings.step_learning_rate,
                seed,
            )
            curves.append(curve)
            for name in unit.layers:
                network.steps[name].give()
            network.done(unit, calls)
            report(index + 1, len(found))
    return curves


def summary(curves: list[Curve]) -> dict[str, Any]:
    """Plain values: the error summed over all units before and after, as kept, and how many units kept what they learned."""
    return {
        "before": sum(curve.before for curve in curves),
        "after": sum(min(curve.before, curve.after) for curve in curves),
        "units": len(curves),
        "units_lowered": sum(curve.after < curve.before for curve in curves),
        "updates": sum(len(curve.updates) for curve in curves),
    }


def skip_parts(unet: nn.Module) -> dict[str, tuple[int, int]]:
    """Channels of the two maps that a decoder block's 1x1 skip convolution gets side by side, by the convolution's name.

    The decoder concatenates its own map h with the encoder's maps, last in first out: the second part has the channels of that encoder
    block's output, the first what remains. Other networks than the U-Net of :mod:`qvsr.models.unet` have none.
    """
    if not isinstance(unet, InflatedUNet):
        return {}
    skips = [_out_channels(block[0]) for block in unet.input_blocks]  # type: ignore[index]
    parts = {}
    for index, block in enumerate(unet.output_blocks):
        skip, convolution = skips.pop(), block[0].skip_connection  # type: ignore[index]
        if isinstance(convolution, nn.Conv2d):
            parts[f"output_blocks.{index}.0.skip_connection"] = (convolution.in_channels - skip, skip)
    return parts


def _out_channels(module: nn.Module) -> int:
    """Channels that an encoder block's first module returns; what follows it there keeps them."""
    if isinstance(module, ResBlock):
        return int(module.in_layers[2].out_channels)  # type: ignore[union-attr,arg-type]
    return int((module.op if isinstance(module, Downsample) else module).out_channels)  # type: ignore[arg-type]
