"""QuantVSR: low-bit quantization of a diffusion video super-resolution U-Net (arXiv 2508.04485).

Every quantized layer is ``conv(X, L1 L2) + conv(Q(X H), Q((W - L1 L2) H)) + b``: input channels cut in two halves, each rotated by its own
random Hadamard matrix; weights rounded per output channel and half, activations per half over the whole call; a full-precision
low-rank branch from the SVD of the weight. Three stages on recorded full-precision calls (x, t, context, structure, output):

1. `allocate_ranks`: the branch gets a rank between `rank_min` and `rank_max` from how much a layer's input varies in space and time.
2. `refine_branches`: L1 and L2 of all layers are trained on the error of the network's output; ranges stay those of the first residual.
3. `align_bias`: a bias per output channel is trained likewise and folded into the layer's bias.

Deviations from the released code: the branch runs as two thin layers (there: a dense product); ranks are also limited to what a layer's
weight can have (the paper's 16 is above it in narrow networks; the header counts the layers concerned); Hadamard matrices exist here for
more sizes than 2^k, 20*2^k and 60*2^k; float32 throughout (there: bfloat16 autocast).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qvsr.config import QuantSpec
from qvsr.method_settings import QuantVSRSettings
from qvsr.progress import progress
from qvsr.quant import apply, low_rank
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer, halves
from qvsr.quant.observe import observe_inputs
from qvsr.quant.refine import Curve, Samples, call, train
from qvsr.registry import BASELINES

log = logging.getLogger(__name__)
UNMEASURED = ("emb_layers", "time_embed")


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


def allocate_ranks(spatial_LS: Tensor, temporal_LS: Tensor, settings: QuantVSRSettings) -> Tensor:
    """Rank of each measured layer (spatio-temporal complexity aware allocation).

    Thresholds are quantiles pooled over all layers and samples, separately for both complexities. A layer starts at `rank_min`; each sample
    adds 1 if both complexities reach their upper threshold and takes 1 if both stay at or below the lower; the sum is clipped once, at the
    end, then rounded to a multiple of `rank_multiple` (so bounds that are no multiples move).

    Args:
        spatial_LS, temporal_LS: complexities of L layers in S samples.
    Returns:
        int64 ``(L,)``.
    Raises:
        QuantError: settings that give a layer rank 0.
    """
    votes = torch.zeros(spatial_LS.shape[0], dtype=torch.int64)
    both = [_against_thresholds(values, settings.quantile) for values in (spatial_LS, temporal_LS)]
    votes += (both[0][1] & both[1][1]).sum(1) - (both[0][0] & both[1][0]).sum(1)
    ranks = (settings.rank_min + votes).clamp(settings.rank_min, settings.rank_max)
    step = settings.rank_multiple
    ranks = (ranks + step // 2) // step * step
    if ranks.numel() and int(ranks.min()) == 0:
        raise QuantError(f"rank_min {settings.rank_min} rounds to 0 with rank_multiple {step}: raise the one or lower the other")
    return ranks


def _against_thresholds(values: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Where values are at or below the lower and at or above the upper pooled quantile (linear interpolation)."""
    pool = values.double().flatten().sort().values
    low, high = (_quantile(pool, q) for q in (quantile, 1 - quantile))
    return values <= low, values >= high


def _quantile(pool: Tensor, q: float) -> float:
    """Quantile of sorted values; torch.quantile refuses more than 16 million."""
    place = q * (pool.numel() - 1)
    below = int(place)
    above = min(below + 1, pool.numel() - 1)
    return float(pool[below] + (pool[above] - pool[below]) * (place - below))


def layer_ranks(layers: Mapping[str, nn.Module], measured: Complexity | None, settings: QuantVSRSettings) -> tuple[dict[str, int], int]:
    """Rank of every layer, limited to what its weight can have; and how many layers that limit concerned."""
    wanted = dict.fromkeys(layers, settings.rank_min)
    if measured is not None:
        wanted |= dict(zip(measured.names, allocate_ranks(measured.spatial_LS, measured.temporal_LS, settings).tolist(), strict=True))
    limits = {name: low_rank.rank_limit(module.weight) for name, module in layers.items()}  # type: ignore[arg-type]
    ranks = {name: min(rank, limits[name]) for name, rank in wanted.items()}
    return ranks, sum(ranks[name] < wanted[name] for name in ranks)


def refine_branches(unet: nn.Module, samples: Samples, settings: QuantVSRSettings, seed: int) -> Curve:
    """Train L1 and L2 of all open layers together; weight ranges stay, so a residual that leaves its range is cut off, as published."""
    layers = apply.quant_layers(unet).values()
    parameters = [parameter for layer in layers for parameter in (layer.up, layer.down) if parameter is not None]
    return _train(unet, parameters, samples, settings, settings.refine_updates, seed, "refine branches")


def align_bias(unet: nn.Module, samples: Samples, settings: QuantVSRSettings, seed: int) -> Curve:
    """Train a correction per output channel of every layer, starting from zero, and fold it into the bias."""
    layers = apply.quant_layers(unet).values()
    for layer in layers:
        layer.correction = nn.Parameter(torch.zeros_like(layer.weight_scale[:, 0]), requires_grad=False)
    parameters = [layer.correction for layer in layers if layer.correction is not None]
    curve = _train(unet, parameters, samples, settings, settings.lba_updates, seed, "align bias")
    for layer in layers:
        layer.fold_correction()
    return curve


def _train(
    unet: nn.Module, parameters: list[nn.Parameter], samples: Samples, settings: QuantVSRSettings, updates: int, seed: int, what: str
) -> Curve:
    with progress(what) as report:
        return train(
            unet, parameters, samples, updates, settings.accumulate, settings.learning_rate, settings.weight_decay, seed, what, report
        )


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
    layers = apply.quantizable(unet, spec.exclude)
    if len(calibration) == 0:
        raise QuantError("quantvsr: the calibration set is empty")
    measured = measure_complexity(unet, layers, calibration) if settings.branch and settings.stca else None
    ranks, limited = layer_ranks(layers, measured, settings) if settings.branch else (dict.fromkeys(layers, 0), 0)

    def make(name: str, module: nn.Module) -> QuantLayer:
        channels = module.weight.shape[1]  # type: ignore[union-attr,index]
        parts = halves(int(channels)) if settings.channel_split else ()
        plan = LayerPlan(spec.weight_bits, spec.act_bits, parts, settings.rotation, ranks[name])
        return QuantLayer.from_float(module, plan, name, spec.seed)

    apply.quantize_layers(unet, spec.exclude, make)
    losses = {}
    if settings.branch and settings.refine:
        losses["refine_branches"] = refine_branches(unet, calibration, settings, spec.seed).summary()
    apply.freeze(unet)
    if settings.lba:
        losses["align_bias"] = align_bias(unet, calibration, settings, spec.seed).summary()
    apply.note(unet, losses=losses, ranks_limited=limited)
    return unet
