"""EfficientDM: fine-tuning by low-rank weights that merge before rounding, activation scales of their own for each step (arXiv 2310.03270).

Kept: QALoRA (:mod:`qvsr.quant.qalora`): weights ``Q(W0 + B A)`` with rank 32, Linear and convolutions alike, so that B A ends up in the integers;
asymmetric scales per output channel, trained too; rates of B and A in proportion to the layer's mean weight scale (1/2500 of it), AdamW, all rates
falling linearly to 0. TALSQ: activations asymmetric and static per tensor, a (scale, zero point) for each recorded timestep, all starting from one
searched range (:mod:`qvsr.quant.search`), each trained only by calls at its own step. The loss is the squared difference of the network's
output to the full-precision one on the full-precision trajectory; no ground truth is used. A trajectory is walked from its highest timestep down, one
update a step.

The video U-Net forces: it needs LQ input, so noise alone starts no trajectory. The recorded calibration calls *are* full-precision trajectories, of
calibration clips: they are walked clip by clip instead of running the sampler anew, and a sample is a call with its five frames. The step is told by
the timestep, not by counting calls, which tiles would break: tiles of one step share its scales and are walked one after the other.

Cost: none at run time beyond integer layers and the table of scales. Training runs the whole network forwards and backwards with the weights of all
layers rounded anew: 16,000 updates by default, which is the published number (160 walks over 100 sampling steps); here a walk has as many steps
as were recorded of each clip, so the walks are more, and so are the updates of each step's scales. Fewer updates are a *reduced* EfficientDM:
the default configuration's 80 give each step's scales 16, with which B A brings nearly all of the gain and scales by step none
(`config/default.yaml`, W4A4, loss from 0.159: all 0.091, one scale for all steps 0.088, without B A 0.159, W0 rounded 0.100).

Deviations:
- only some of the sampling steps are recorded (`calibration.steps`), and only these have a row in the table. Another step takes the row of the
  nearest recorded one, the lower of two equally near: bounds are midpoints. (Bounds at the recorded steps themselves would give every step
  between two the noisier one's row, and with 10 of 50 steps that is up to four steps away instead of two. With 5 of 10, as in the default
  configuration, both are one step away, and the restored clips differ by less than 0.03 dB);
- W0 is the floating-point weight, as in the paper's formula; in the released code it is the rounded one (`base: rounded`). From there B A must
  reach half a scale before any integer changes;
- all layers but the shared exclusions (`method.exclude`) have the same bits, the skip and downsampling convolutions too; the released code leaves
  these unrounded, the first three layers and the last at 8 bits;
- zero points are rounded to whole numbers, gradients passing straight through. Their rate is a setting of its own, since its unit is a level:
  at the published 5e-4 few updates of a step move none of them by the half level that changes anything, and rates that do helped nothing here;
- the first ranges are searched on the full-precision network's inputs, on samples of all recorded timesteps;
- scales never fall below the layer's smallest scale;
- training that did not lower the loss on the probed calibration samples is undone; there it is always taken.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from qvsr.config import QuantSpec
from qvsr.method_settings import EfficientDMSettings
from qvsr.progress import progress
from qvsr.quant import apply, search
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer
from qvsr.quant.qalora import AdaptedLayer, StepGrids
from qvsr.quant.refine import PROBES, Curve, Sample, Samples, call, mean_loss, shuffled
from qvsr.registry import BASELINES

log = logging.getLogger(__name__)


@BASELINES.add("efficientdm", title="EfficientDM", source="arXiv 2310.03270")
def efficientdm(unet: nn.Module, calibration: Samples, spec: QuantSpec) -> nn.Module:
    """Quantize a U-Net in place with EfficientDM.

    Args:
        unet: full precision; takes ``(x, t, context, struct)``.
        calibration: recorded full-precision calls, with the clip that each belongs to (`clip`).
        spec: bits, excluded layers, seed, and :class:`qvsr.method_settings.EfficientDMSettings` as plain values.
    Returns:
        the same network with its layers replaced by frozen :class:`QuantLayer`; the losses before and after training and the number of
        trained parameters are noted on it for the checkpoint.
    """
    settings = EfficientDMSettings.model_validate(spec.settings)
    modules = apply.quantizable(unet, spec.exclude)
    if len(calibration) == 0:
        raise QuantError("efficientdm: the calibration set is empty")
    layers = {}
    for name, module in modules.items():
        layers[name] = layer = QuantLayer.from_float(module, LayerPlan(spec.weight_bits, spec.act_bits), name)
        layer.set_weight_ranges([search.weight_range(module.weight, spec.weight_bits, layer.scale_floor)])  # type: ignore[arg-type]
    calls = recorded(calibration)
    ranged = [calibration[index] for index in spread(calls, settings.range_samples, spec.seed)]
    find_activation_ranges(unet, modules, layers, ranged, settings.range_values, spec.seed)
    timesteps = sorted({t for _, t in calls})
    grids = StepGrids(layers, midpoints(timesteps) if settings.by_step else timesteps[-1:])
    adapted = {
        name: AdaptedLayer(modules[name], layer, grids, name, settings.rank, settings.base == "rounded", spec.seed)
        for name, layer in layers.items()
    }
    apply.quantize_layers(unet, spec.exclude, lambda name, _module: layers[name])
    for name, trainee in adapted.items():
        apply.replace(unet, name, trainee)
    with grids.follow(unet):
        curve = train(unet, adapted, grids, calibration, calls, settings, spec.seed)
    grids.give()
    for name, trainee in adapted.items():
        trainee.give()
        apply.replace(unet, name, layers[name])
    apply.follow_timesteps(unet)
    trained = sum(parameter.numel() for parameter in parameters(adapted, grids)) if settings.updates else 0
    apply.note(unet, trained_params=trained, losses={"finetune": curve.summary()} if settings.updates else {})
    return unet


def find_activation_ranges(
    unet: nn.Module,
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, QuantLayer],
    samples: Sequence[Sample],
    values: int | None,
    seed: int,
) -> None:
    """One static range of each layer's input, by search in the full-precision network."""

    @torch.no_grad()
    def run() -> None:
        for sample in samples:
            call(unet, sample)

    with progress("activation ranges", 0):
        ranges = search.activation_ranges(modules, layers, run, values, seed)
    for name, (low, high) in ranges.items():
        layers[name].set_static_activations(low[None], high[None])


def recorded(samples: Samples) -> list[tuple[str, int]]:
    """Clip and timestep of each recorded call."""
    return [(sample.clip, int(sample.t)) for sample in (samples[index] for index in range(len(samples)))]


def trajectories(calls: Sequence[tuple[str, int]]) -> list[list[int]]:
    """Indices of each clip's calls from the highest timestep down; those at one timestep (tiles, segments) in their order."""
    clips: defaultdict[str, list[int]] = defaultdict(list)
    for index in sorted(range(len(calls)), key=lambda index: -calls[index][1]):
        clips[calls[index][0]].append(index)
    return [clips[name] for name in sorted(clips)]


def spread(calls: Sequence[tuple[str, int]], most: int, seed: int) -> list[int]:
    """Indices of at most `most` calls: one of each timestep before a second of any, drawn at random within a timestep."""
    drawn = torch.randperm(len(calls), generator=torch.Generator().manual_seed(seed)).tolist()
    turns: Counter[int] = Counter()
    ranked = []
    for index in drawn:
        t = calls[index][1]
        ranked.append((turns[t], t, index))
        turns[t] += 1
    return [index for _, _, index in sorted(ranked)[:most]]


def midpoints(timesteps: Sequence[int]) -> list[int]:
    """Upper bounds that give each timestep to the nearest recorded one, the lower of two.

    >>> midpoints([1, 201, 401])
    [101, 301, 401]
    """
    return [(here + after) // 2 for here, after in pairwise(timesteps)] + [timesteps[-1]]


def train(
    network: nn.Module,
    adapted: Mapping[str, AdaptedLayer],
    grids: StepGrids,
    samples: Samples,
    calls: Sequence[tuple[str, int]],
    settings: EfficientDMSettings,
    seed: int,
) -> Curve:
    """Walk the clips' trajectories, one AdamW step a call on the squared difference to the recorded output.

    Returns:
        the losses; where the loss of the probed samples did not fall, all parameters are as they were.
    """
    probes = spread(calls, PROBES, seed)
    before = mean_loss(network, samples, probes)
    if settings.updates == 0:
        return Curve(before, before, ())
    trained = parameters(adapted, grids)
    start = [parameter.detach().clone() for parameter in trained]
    groups = [
        {"params": [layer.up, layer.down], "lr": settings.lora_learning_rate * float(layer.scale.mean())}
        for layer in adapted.values()
        if layer.up.numel()
    ]
    groups += [
        {"params": [layer.scale for layer in adapted.values()], "lr": settings.weight_learning_rate},
        {"params": grids.scales, "lr": settings.act_learning_rate},
        {"params": grids.zero_points, "lr": settings.zero_point_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / settings.updates)
    losses, walk = [], walked(trajectories(calls), seed)
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), progress("finetune") as report:
            for update in range(settings.updates):
                sample = samples[next(walk)]
                loss = F.mse_loss(call(network, sample), sample.out)
                loss.backward()  # type: ignore[no-untyped-call]
                if not math.isfinite(loss.item()):
                    raise QuantError(
                        f"efficientdm: the loss is {loss.item()} at update {update + 1} of {settings.updates}; lower the learning rates"
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)  # a row of the grids without gradient is left alone
                schedule.step()
                losses.append(loss.item())
                report(update + 1, settings.updates)
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
    curve = Curve(before, mean_loss(network, samples, probes), tuple(losses))
    line = f"efficientdm: loss on {len(probes)} calibration samples {before:.4g} -> {curve.after:.4g} in {settings.updates} updates"
    if curve.after < before:
        log.info(line)
    else:
        with torch.no_grad():
            for parameter, value in zip(trained, start, strict=True):
                parameter.copy_(value)
        log.warning("%s: it did not fall, so the parameters stay as they were; lower the learning rates or raise updates", line)
    return curve


def parameters(adapted: Mapping[str, AdaptedLayer], grids: StepGrids) -> list[nn.Parameter]:
    """Everything that is trained."""
    own = [parameter for layer in adapted.values() for parameter in (layer.up, layer.down, layer.scale)]
    return [*own, *grids.scales, *grids.zero_points]


def walked(order: Sequence[Sequence[int]], seed: int) -> Iterator[int]:
    """Endless indices, one trajectory after another, every trajectory once before any comes again."""
    for trajectory in shuffled(len(order), seed):
        yield from order[trajectory]
