"""QuantVSR: low-bit quantization of a diffusion video super-resolution U-Net (arXiv 2508.04485).

Every quantized layer is ``conv(X, L1 L2) + conv(Q(X H), Q((W - L1 L2) H)) + b``: input channels cut in two halves, each rotated by its own
random Hadamard matrix; weights rounded per output channel and half, activations per half over the whole call; a full-precision
low-rank branch from the SVD of the weight. Three stages on recorded full-precision calls (x, t, context, structure, output):

1. `allocate_ranks`: the branch gets a rank between `rank_min` and `rank_max` from how much a layer's input varies in space and time.
2. `refine_branches`: L1 and L2 of all layers are trained on the error of the network's output; ranges stay those of the first residual.
3. `align_bias`: a bias per output channel is trained likewise and folded into the layer's bias.

Deviations from the released code: the branch runs as two thin layers (there: a dense product); a rank that a layer's weight cannot have is
refused unless `limit_ranks` is set (there: lowered); Hadamard matrices exist here for more sizes than 2^k, 20*2^k and 60*2^k; float32
throughout (there: bfloat16 autocast).

Beyond the paper, each a setting that is off by default and costs nothing at run time: activation ranges narrowed by a factor (`act_clip`), weight
ranges searched (`weight_ranges`) and following the residual (`refresh_ranges`), the residual rounded by GPTQ (`residual`), thresholds of the ranks
by search (`stca_search`), a bias by timestep (`bias_by_step`) or measured (`bias`), bits layer by layer (`mixed`), calibration samples weighted by
what their error does to the sampler's result (`loss_weight`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qvsr.config import QuantSpec, ScheduleSettings
from qvsr.method_settings import QuantVSRSettings
from qvsr.models.schedule import Schedule
from qvsr.progress import progress
from qvsr.quant import affine, apply, low_rank
from qvsr.quant.allocate import allocate
from qvsr.quant.bias import measure_bias
from qvsr.quant.clip import search_clips
from qvsr.quant.gptq import round_layers
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer, halves
from qvsr.quant.observe import observe_inputs
from qvsr.quant.refine import Curve, Sample, Samples, call, mean_loss, recomputed, train
from qvsr.quant.search import weight_range
from qvsr.quant.sensitivity import measure
from qvsr.registry import BASELINES

log = logging.getLogger(__name__)
UNMEASURED = ("emb_layers", "time_embed")
THRESHOLDS = (0.1, 0.25, 0.4)  # lower ones that stca_search tries, and 1 less them as upper ones


@dataclass(frozen=True)
class Complexity:
    """Spatial and temporal complexity of layer inputs, ``(L, S)`` for L layers and S calibration samples; rows follow `names`."""

    names: tuple[str, ...]
    spatial_LS: Tensor
    temporal_LS: Tensor


def complexity(x: Tensor, temporal_conv: bool = False) -> tuple[Tensor, Tensor]:
    """Spatial and temporal complexity of one layer input, as published.

    C_s is the unbiased standard deviation over everything behind axis 1, averaged over axes 0 and 1; C_t the mean squared difference of
    neighbours on axis 0. Axis 0 is taken as time and axis 1 as channel whatever the layer: for tokens ``(T, N, C)`` the deviation is over the
    channels of a token, and for temporal attention, whose input is ``(B·H·W, T, C)``, "time" is space.

    Args:
        x: the input; for a temporal convolution ``(B, C, T, H, W)``, which is first folded to ``(B·T, C, H, W)``.
    Returns:
        C_s and C_t, both ``()``; 0 where there is nothing to compare (one value, one frame).
    """
    if temporal_conv:
        x = x.transpose(1, 2).flatten(0, 1)
    if x.dim() < 3:
        x = x.reshape(*x.shape, *(1,) * (3 - x.dim()))
    rest = x.flatten(2)
    zero = x.new_zeros(())
    spatial = rest.std(-1).mean() if rest.shape[-1] > 1 else zero
    temporal = (x[1:] - x[:-1]).pow(2).mean() if x.shape[0] > 1 else zero
    return spatial, temporal


def is_measured(name: str) -> bool:
    """Whether complexity is measured for a layer; embedding layers keep the smallest rank.

    >>> is_measured("input_blocks.1.0.emb_layers.1"), is_measured("input_blocks.1.0.in_layers.2")
    (False, True)
    """
    return not any(part in name for part in UNMEASURED)


@torch.no_grad()
def measure_complexity(unet: nn.Module, layers: Mapping[str, nn.Module], samples: Samples) -> Complexity:
    """Complexity of the inputs that the full-precision network gives its layers, sample by sample."""
    names = tuple(name for name in layers if is_measured(name))
    spatial: dict[str, list[Tensor]] = {name: [] for name in names}
    temporal: dict[str, list[Tensor]] = {name: [] for name in names}

    def see(name: str, x: Tensor) -> None:
        c_spatial, c_temporal = complexity(x, "temporal_conv" in name)
        spatial[name].append(c_spatial)
        temporal[name].append(c_temporal)

    with observe_inputs({name: layers[name] for name in names}, see), progress("complexity") as report:
        for index in range(len(samples)):
            call(unet, samples[index])
            report(index + 1, len(samples))
    unused = [name for name in names if len(spatial[name]) != len(samples)]
    if unused:
        raise QuantError(f"{unused[0]} ran {len(spatial[unused[0]])} times in {len(samples)} network calls; once a call is needed")
    return Complexity(names, torch.stack([torch.stack(spatial[n]) for n in names]), torch.stack([torch.stack(temporal[n]) for n in names]))


def allocate_ranks(
    spatial_LS: Tensor, temporal_LS: Tensor, settings: QuantVSRSettings, quantiles: tuple[float, float] | None = None
) -> Tensor:
    """Rank of each measured layer (spatio-temporal complexity aware allocation).

    Thresholds are quantiles pooled over all layers and samples, separately for both complexities. A layer starts at `rank_min`; each sample
    adds 1 if both complexities reach their upper threshold and takes 1 if both stay at or below the lower; the sum is clipped once, at the
    end, then rounded to a multiple of `rank_multiple` (so bounds that are no multiples move).

    Args:
        spatial_LS, temporal_LS: complexities of L layers in S samples.
        quantiles: lower and upper threshold; None: the setting `quantile` and 1 less it.
    Returns:
        int64 ``(L,)``.
    Raises:
        QuantError: settings that give a layer rank 0.
    """
    votes = torch.zeros(spatial_LS.shape[0], dtype=torch.int64)
    both = [_against_thresholds(values, *(quantiles or (settings.quantile, 1 - settings.quantile))) for values in (spatial_LS, temporal_LS)]
    votes += (both[0][1] & both[1][1]).sum(1) - (both[0][0] & both[1][0]).sum(1)
    ranks = (settings.rank_min + votes).clamp(settings.rank_min, settings.rank_max)
    step = settings.rank_multiple
    ranks = (ranks + step // 2) // step * step
    if ranks.numel() and int(ranks.min()) == 0:
        raise QuantError(f"rank_min {settings.rank_min} rounds to 0 with rank_multiple {step}: raise the one or lower the other")
    return ranks


def _against_thresholds(values: Tensor, lower: float, upper: float) -> tuple[Tensor, Tensor]:
    """Where values are at or below the lower and at or above the upper pooled quantile (linear interpolation)."""
    pool = values.double().flatten().sort().values
    low, high = (_quantile(pool, q) for q in (lower, upper))
    return values <= low, values >= high


def _quantile(pool: Tensor, q: float) -> float:
    """Quantile of sorted values; torch.quantile refuses more than 16 million."""
    place = q * (pool.numel() - 1)
    below = int(place)
    above = min(below + 1, pool.numel() - 1)
    return float(pool[below] + (pool[above] - pool[below]) * (place - below))


def layer_ranks(
    layers: Mapping[str, nn.Module],
    measured: Complexity | None,
    settings: QuantVSRSettings,
    quantiles: tuple[float, float] | None = None,
) -> tuple[dict[str, int], int]:
    """Rank of every layer; and how many layers' ranks were lowered to what their weight can have.

    Raises:
        QuantError: a rank that a weight cannot have, unless `limit_ranks` is set.
    """
    wanted = dict.fromkeys(layers, settings.rank_min)
    if measured is not None:
        found = allocate_ranks(measured.spatial_LS, measured.temporal_LS, settings, quantiles)
        wanted |= dict(zip(measured.names, found.tolist(), strict=True))
    limits = {name: low_rank.rank_limit(module.weight) for name, module in layers.items()}  # type: ignore[arg-type]
    beyond = [name for name, rank in wanted.items() if rank > limits[name]]
    if beyond and not settings.limit_ranks:
        first = beyond[0]
        setting = f"rank_min {settings.rank_min}" if settings.rank_min > limits[first] else f"rank_max {settings.rank_max}"
        raise QuantError(
            f"{first}: rank {wanted[first]} is above {limits[first]}, the limit of its weight (so it is for {len(beyond)} layers): "
            f"lower method.quantvsr.{setting}, or set method.quantvsr.limit_ranks to true"
        )
    return {name: min(rank, limits[name]) for name, rank in wanted.items()}, len(beyond)


def sample_weights(samples: Samples, kind: str, schedule: ScheduleSettings | None, steps: int | None) -> list[float] | None:
    """How much each sample's squared output error counts: its mean over the samples is 1; None where all count alike.

    An error d of the network's output at timestep t moves the clean latent by ``sigma d`` where the network predicts v, by ``sigma / alpha d`` where it
    predicts eps; the sampler's next latent by the posterior mean's first coefficient times that. At t = 0 v hardly matters, whatever its error.

    Args:
        kind: "equal", "x0" (the clean latent) or "latent" (the next one).
    Raises:
        QuantError: the schedule or the number of steps is not known.
    """
    if kind == "equal":
        return None
    if schedule is None or steps is None:
        raise QuantError(
            f"quantvsr: loss_weight {kind!r} needs the noise schedule and the sampling steps (schedule, steps of QuantSpec); or use equal"
        )
    process = Schedule(schedule).for_sampling(steps)
    places = process.timesteps
    weights = []
    for index in range(len(samples)):
        t = int(samples[index].t.flatten()[0])
        at = min(range(len(places)), key=lambda place: abs(places[place] - t))
        moved = float(process.sqrt_one_minus_alphas_cumprod[at])
        if schedule.parameterization == "eps":
            moved /= float(process.sqrt_alphas_cumprod[at])
        if kind == "latent":
            moved *= float(process.posterior_mean_coef1[at])
        weights.append(moved**2)
    mean = sum(weights) / len(weights)
    return [weight / mean for weight in weights]


def bias_bounds(samples: Samples) -> tuple[int, ...]:
    """Upper bounds of the rows of a bias table: half way from each recorded timestep to the next; the last is the last recorded one."""
    recorded = sorted({int(samples[index].t.flatten()[0]) for index in range(len(samples))})
    return (*((low + high) // 2 for low, high in pairwise(recorded)), recorded[-1])


class Few:
    """Some samples of a set, evenly spaced; `weights` are theirs."""

    def __init__(self, samples: Samples, count: int, weights: Sequence[float] | None) -> None:
        count = min(count, len(samples))
        self.samples = samples
        self.indices = [round(k * (len(samples) - 1) / max(1, count - 1)) for k in range(count)]
        self.weights = None if weights is None else [weights[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[self.indices[index]]


def refine_branches(
    unet: nn.Module, samples: Samples, settings: QuantVSRSettings, seed: int, weights: Sequence[float] | None = None
) -> tuple[Curve, int]:
    """Train L1 and L2 of all open layers together; the curve and the number of trained parameters.

    Weight ranges stay, so a residual that leaves its range is cut off, as published; with `refresh_ranges` they follow it.
    """
    layers = apply.quant_layers(unet).values()
    for layer in layers:
        layer.refresh_ranges = settings.refresh_ranges
    parameters = [parameter for layer in layers for parameter in (layer.up, layer.down) if parameter is not None]
    curve = _train(unet, parameters, samples, settings, settings.refine_updates, seed, "refine branches", weights)
    if settings.refresh_ranges:
        for layer in layers:
            layer.refresh_weight_ranges()
            if settings.weight_ranges == "searched":
                search_weight_ranges(layer)
    return curve, sum(parameter.numel() for parameter in parameters)


def align_bias(
    unet: nn.Module, samples: Samples, settings: QuantVSRSettings, seed: int, weights: Sequence[float] | None = None
) -> tuple[Curve, int]:
    """Train a correction per output channel of every layer, starting from zero, and fold it into the bias; the curve and the number of values.

    With `bias_by_step` it has a row for each recorded timestep.
    """
    parameters = start_corrections(unet, samples, settings)
    curve = _train(unet, parameters, samples, settings, settings.lba_updates, seed, "align bias", weights)
    for layer in apply.quant_layers(unet).values():
        layer.fold_correction()
    return curve, sum(parameter.numel() for parameter in parameters)


def start_corrections(unet: nn.Module, samples: Samples, settings: QuantVSRSettings) -> list[nn.Parameter]:
    """Corrections of zero for every layer: one row, or with `bias_by_step` one a recorded timestep."""
    bounds = bias_bounds(samples) if settings.bias_by_step else ()
    parameters = [layer.start_correction(bounds) for layer in apply.quant_layers(unet).values()]
    apply.follow_timesteps(unet)
    return parameters


def search_weight_ranges(layer: QuantLayer) -> None:
    """Weight ranges of an open layer with the least rounding error; kept as factors of minimum and maximum, which later ranges are cut by too."""
    shrink = []
    for part in layer.rounding()[0].view(layer.geometry.weight_shape).split(layer.parts, 1):
        low, high = affine.channel_range(part)
        found = weight_range(part, layer.weight_bits, layer.scale_floor)
        wide = torch.where(high.abs() > low.abs(), high, low)
        shrink.append(torch.where(high.abs() > low.abs(), found[1], found[0]) / torch.where(wide == 0, 1, wide))
        shrink[-1][wide == 0] = 1
    layer.weight_shrink = tuple(shrink)
    layer.refresh_weight_ranges()


def _train(
    unet: nn.Module,
    parameters: list[nn.Parameter],
    samples: Samples,
    settings: QuantVSRSettings,
    updates: int,
    seed: int,
    what: str,
    weights: Sequence[float] | None,
) -> Curve:
    with progress(what) as report, recomputed(unet):
        return train(
            unet,
            parameters,
            samples,
            updates,
            settings.accumulate,
            settings.learning_rate,
            settings.weight_decay,
            seed,
            what,
            report,
            weights=weights,
        )


class Build:
    """The layers of a network as they are decided, one step after the other, before they take the full-precision layers' places.

    Attributes:
        modules: the full-precision layers.
        made: quantized layers, open, by name.
        facts: plain values for the checkpoint's header.
    """

    def __init__(self, unet: nn.Module, calibration: Samples, spec: QuantSpec, settings: QuantVSRSettings) -> None:
        self.unet, self.calibration, self.spec, self.settings = unet, calibration, spec, settings
        self.modules = apply.quantizable(unet, spec.exclude)
        self.weights = sample_weights(calibration, settings.loss_weight, spec.schedule, spec.steps)
        self.few = Few(calibration, settings.search_samples, self.weights)
        self.facts: dict[str, Any] = {}
        self.clips: dict[str, dict[int, Tensor]] = {}
        self.made: dict[str, QuantLayer] = {}
        self._svd: dict[str, tuple[Tensor, Tensor]] = {}

    def layer(self, name: str, rank: int, weight_bits: int, act_bits: int) -> QuantLayer:
        """A layer with a branch of some rank, its weight and activation ranges as the settings want them."""
        module, branch = self.modules[name], None
        weight: Tensor = module.weight  # type: ignore[assignment]
        if rank:
            if name not in self._svd or self._svd[name][1].shape[0] < rank:
                self._svd[name] = low_rank.svd_init(weight, rank)
            up, down = self._svd[name]
            branch = up[:, :rank].contiguous(), down[:rank].contiguous()
        parts = halves(int(weight.shape[1])) if self.settings.channel_split else ()
        plan = LayerPlan(weight_bits, act_bits, parts, self.settings.rotation, rank)
        layer = QuantLayer.from_float(module, plan, name, self.spec.seed, branch=branch)
        if self.settings.weight_ranges == "searched":
            search_weight_ranges(layer)
        if self.clips:
            layer.set_activation_clip(self.clips[name][act_bits])
        return layer

    def make(self, ranks: Mapping[str, int], bits: Mapping[str, tuple[int, int]] | None = None) -> dict[str, QuantLayer]:
        """All layers, with the row's bits where `bits` has no weight and activation bits for them."""
        nominal = (self.spec.weight_bits, self.spec.act_bits)
        return {name: self.layer(name, ranks[name], *(bits or {}).get(name, nominal)) for name in self.modules}

    def ranks(self) -> dict[str, int]:
        """Rank of every layer."""
        settings = self.settings
        if not settings.branch:
            self.facts["ranks_limited"] = 0
            return dict.fromkeys(self.modules, 0)
        measured = measure_complexity(self.unet, self.modules, self.calibration) if settings.stca else None
        ranks, self.facts["ranks_limited"] = layer_ranks(self.modules, measured, settings)
        if measured is not None and settings.stca_search:
            return self.search_ranks(measured, ranks)
        return ranks

    def search_ranks(self, measured: Complexity, published: dict[str, int]) -> dict[str, int]:
        """Thresholds whose ranks give the network the least loss, untrained, among those with a branch no larger than the published ones'."""
        budget, tried = self.branch_params(published), dict[tuple[float, float], tuple[dict[str, int], float]]()
        for quantiles in ((0.25, 0.75), *product(THRESHOLDS, (1 - q for q in THRESHOLDS))):
            ranks, _ = layer_ranks(self.modules, measured, self.settings, quantiles)
            if self.branch_params(ranks) <= budget and ranks not in [found for found, _ in tried.values()]:
                made = self.make(ranks)
                with apply.exchanged(self.unet, made):
                    tried[quantiles] = ranks, mean_loss(self.unet, self.few, range(len(self.few)), self.few.weights)
        best = min(tried, key=lambda quantiles: tried[quantiles][1])
        self.facts["stca_thresholds"] = {
            "chosen": list(best),
            "tried": {f"{low:g} {high:g}": loss for (low, high), (_, loss) in tried.items()},
        }
        return tried[best][0]

    def branch_params(self, ranks: Mapping[str, int]) -> int:
        """Parameters of all branches: R (N + K taps) each."""
        shapes = {name: tuple(module.weight.shape) for name, module in self.modules.items()}  # type: ignore[union-attr,arg-type]
        return sum(rank * (shapes[name][0] + math.prod(shapes[name][1:])) for name, rank in ranks.items())

    def find_clips(self, bits: Sequence[int]) -> None:
        """Factors of the activation ranges; they do not depend on the branch, which sees inputs unrounded."""
        layers = self.make(dict.fromkeys(self.modules, 0))
        power = self.settings.act_clip_power
        self.clips = search_clips(self.unet, layers, self.few, bits, self.few.weights, power, seed=self.spec.seed)

    def mixed_bits(self, ranks: Mapping[str, int], candidates: Sequence[int]) -> dict[str, tuple[int, int]]:
        """Weight and activation bits of every layer: the least summed error at the row's average bits.

        Averages are over what the bits cost: weight bits over weights (storage), activation bits over multiply-accumulates (operations, as the
        cost table counts them) of the recorded calls; with tiles of another size layers without pixels weigh a little more or less. What the other
        switches store beside the weights is taken off the weights' budget.
        """
        settings, nominal = self.settings, (self.spec.weight_bits, self.spec.act_bits)
        found = measure(
            self.unet,
            self.made,
            self.few,
            candidates,
            self.clips or None,
            self.few.weights,
            settings.weight_ranges == "searched",
            seed=self.spec.seed,
        )
        sizes = np.array([math.prod(self.made[name].geometry.weight_shape) for name in found.names], dtype=np.float64)
        macs, width = sizes * found.positions_L.numpy(), np.array(candidates, dtype=np.float64)
        idle = ((found.weights_LB == 0).all(1) & (found.inputs_LB == 0).all(1)).numpy()
        tables = [found.weights_LB.numpy().copy(), found.inputs_LB.numpy().copy()]
        if settings.mixed_idle == "nominal":
            for table, own in zip(tables, nominal, strict=True):
                table[np.ix_(idle, width != own)] = tables[0].sum() + tables[1].sum()  # as if any other bits were ruinous
        budgets = [float(sizes.sum() * nominal[0]) - self.extra_bits(), float(macs.sum() * nominal[1])]
        if settings.mixed == "weights":
            places = [(w, candidates.index(nominal[1])) for w in allocate(tables[0], (sizes[:, None] * width)[None], budgets[:1])]
        elif settings.mixed == "activations":
            places = [(candidates.index(nominal[0]), a) for a in allocate(tables[1], (macs[:, None] * width)[None], budgets[1:])]
        elif settings.mixed_budget == "bits":
            both = [allocate(t, (c[:, None] * width)[None], [b]) for t, c, b in zip(tables, (sizes, macs), budgets, strict=True)]
            places = list(zip(*both, strict=True))
        else:
            w, a = (axis.reshape(-1) for axis in np.meshgrid(width, width, indexing="ij"))
            costs = np.stack([sizes[:, None] * w, macs[:, None] * a, macs[:, None] * np.maximum(w, a)])
            errors = (tables[0][:, :, None] + tables[1][:, None, :]).reshape(len(idle), -1)
            places = [divmod(place, len(width)) for place in allocate(errors, costs, [*budgets, float(macs.sum() * max(nominal))])]
        chosen = {name: (candidates[w], candidates[a]) for name, (w, a) in zip(found.names, places, strict=True)}
        bits = np.array(list(chosen.values()), dtype=np.float64)
        self.facts["mixed"] = {
            "weight_bits": float(sizes @ bits[:, 0] / sizes.sum()),
            "act_bits": float(macs @ bits[:, 1] / macs.sum()),
            "idle_layers": int(idle.sum()),
        }
        return chosen

    def extra_bits(self) -> int:
        """Storage that published QuantVSR does not have: factors of activation ranges, further rows of a bias table."""
        rows = len(bias_bounds(self.calibration)) - 1 if self.settings.bias_by_step else 0
        values = sum((len(layer.parts) if self.clips else 0) + rows * layer.geometry.out_channels for layer in self.made.values())
        return 32 * values

    def decide(self) -> dict[str, QuantLayer]:
        """Ranks, ranges and bits of all layers."""
        settings, spec = self.settings, self.spec
        mixed = settings.mixed != "none"
        candidates = sorted({width for own in (spec.weight_bits, spec.act_bits) for width in _around(own, settings.mixed_span)})
        if settings.act_clip:
            self.find_clips(candidates if mixed else [spec.act_bits])
        ranks = self.ranks()
        self.made = self.make(ranks)
        if mixed:
            self.made = self.make(ranks, self.mixed_bits(ranks, candidates))
        self._svd.clear()
        return self.made


def _around(bits: int, span: int) -> range:
    """Numbers of bits that a layer may have.

    >>> list(_around(3, 2)), list(_around(8, 1))
    ([2, 3, 4, 5], [7, 8])
    """
    return range(max(2, bits - span), min(8, bits + span) + 1)


@BASELINES.add("quantvsr", title="QuantVSR", source="arXiv 2508.04485")
def quantvsr(unet: nn.Module, calibration: Samples, spec: QuantSpec) -> nn.Module:
    """Quantize a U-Net in place with QuantVSR.

    Args:
        unet: full precision; takes ``(x, t, context, struct)``.
        calibration: recorded full-precision calls.
        spec: bits, excluded layers, seed, and :class:`qvsr.method_settings.QuantVSRSettings` as plain values.
    Returns:
        the same network with its layers replaced by frozen :class:`QuantLayer`; ranks and losses are noted on it for the checkpoint.
    """
    settings = QuantVSRSettings.model_validate(spec.settings)
    if len(calibration) == 0:
        raise QuantError("quantvsr: the calibration set is empty")
    if settings.samples is not None:
        calibration = Few(calibration, settings.samples, None)
    build = Build(unet, calibration, spec, settings)
    layers, weights = build.decide(), build.weights
    apply.quantize_layers(unet, spec.exclude, lambda name, _module: layers[name])
    losses, trained = {}, 0
    if settings.branch and settings.refine:
        curve, trained = refine_branches(unet, calibration, settings, spec.seed, weights)
        losses["refine_branches"] = curve.summary()
    if settings.residual == "gptq":
        few = build.few
        with apply.exchanged(unet, build.modules):
            round_layers(unet, layers, few, settings.gptq_rows, spec.seed, act_order=True, rounded=True, weights=few.weights)
    apply.freeze(unet)
    if settings.lba and settings.bias == "measured":
        started = start_corrections(unet, calibration, settings)
        trained += sum(parameter.numel() for parameter in started)
        measure_bias(unet, build.modules, calibration, bias_bounds(calibration) if settings.bias_by_step else (), weights)
        apply.freeze(unet)
    elif settings.lba:
        curve, values = align_bias(unet, calibration, settings, spec.seed, weights)
        losses["align_bias"], trained = curve.summary(), trained + values
    apply.note(unet, losses=losses, trained_params=trained, **build.facts)
    return unet
