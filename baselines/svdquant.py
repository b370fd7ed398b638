"""SVDQuant: smoothing moves outliers into the weight, a low-rank branch takes them from there (arXiv 2411.05007).

    y = x' L1L2^T + Q(x') Q(W' - L1 L2)^T + b,     x' = x / s,  W' = W s,  s = amax^alpha / wmax^beta  per input channel

For each layer by itself, on the inputs that the full-precision network gives it:

1. `search_smoothing`: of 39 pairs (alpha, beta), (0, 0), (a, 0) and (a, 1 - a) for a = 0.05 … 0.95, the one whose output is nearest to full
   precision in L2, with the branch from the SVD of W' and with both roundings on.
2. `iterate_branch`: SVD of what rounding the residual left over, ``W' - Q(R)``, gives the next branch; the best output is kept and the
   first round without gain ends it.

Kept: formula, candidates, criterion with everything on, rank 32, iteration and its end, the branch at full precision on the smoothed,
unrounded input. Granularity `native`: symmetric weights and per-token activations, each in groups of 64 input channels; `shared`: as all methods.

What the video U-Net forced: the released code smooths and branches no residual-block convolution, embedding, sampler or transformer
projection, and its branch takes 1x1 kernels only. Two thirds of this U-Net's weights are 3x3 convolutions, so those skips are **not** applied: every
layer that is quantized gets smoothing and branch, as for every method here. A convolution is a matrix (outputs, inputs · taps) for the SVD; a
factor, and a group, is input channels with all their taps. Kernels larger than 1x1 sum over pixels, so their activations have a range per frame
and group instead of per pixel.

Deviations: layers that read one tensor (q, k, v) are searched one by one, where the original shares s and the input side of the branch. Factors
are scaled to geometric mean 1, which changes no product. A rank that a weight cannot have is refused; with ``limit_ranks`` such a layer gets
the highest it can (the header counts them), but a full-rank branch takes the whole layer and leaves nothing to round. Activations are
asymmetric, where the original shifts those that are then at least 0 to unsigned. The float64 eigenvectors of the Gram matrix replace the SVD
(same product). Residuals are rounded to nearest, or with ``weights: gptq`` by GPTQ (1 % damping, columns in order of their inputs' size) after
the searches, which always round to nearest.

Cost: one call a calibration sample for ``amax``; then, per layer, 39 decompositions and 39 times its `samples` calls, plus one of each a round.
Layer inputs are held 256 MiB at a time, each a pass through those samples: at the published size about one a layer. The branch is R (N + K taps)
parameters and as many products a position, at full precision; smoothing is one division an input value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qvsr.config import QuantSpec
from qvsr.method_settings import SVDQuantSettings
from qvsr.progress import progress
from qvsr.quant import apply, low_rank
from qvsr.quant.gptq import round_layers
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer
from qvsr.quant.observe import observe_inputs
from qvsr.quant.refine import Sample, Samples, call
from qvsr.quant.smoothing import factors, input_amax, weight_amax
from qvsr.registry import BASELINES

STEPS = tuple(step / 20 for step in range(1, 20))
CANDIDATES = ((0.0, 0.0), *((a, 0.0) for a in STEPS), *((a, 1 - a) for a in STEPS))
MEMORY = 256 * 2**20  # bytes of layer inputs held at a time


@BASELINES.add("svdquant", title="SVDQuant", source="arXiv 2411.05007")
@torch.no_grad()
def svdquant(unet: nn.Module, calibration: Samples, spec: QuantSpec) -> nn.Module:
    """Quantize a U-Net in place with SVDQuant.

    Args:
        unet: full precision; takes ``(x, t, context, struct)``.
        calibration: recorded full-precision calls.
        spec: bits, excluded layers, seed (of the input vectors that GPTQ sees), and :class:`qvsr.method_settings.SVDQuantSettings` as plain values.
    Returns:
        the same network with its layers replaced by frozen :class:`QuantLayer`; exponents, rounds and relative squared output error of each layer
        (before GPTQ) are noted on it for the checkpoint.
    Raises:
        QuantError: a rank that a layer's weight cannot have, without `limit_ranks`.
    """
    settings = SVDQuantSettings.model_validate(spec.settings)
    modules = apply.quantizable(unet, spec.exclude)
    ranks = layer_ranks(modules, settings)
    plan = LayerPlan(spec.weight_bits, spec.act_bits)
    if settings.granularity == "native":
        plan = replace(plan, act_granularity="token", weight_symmetric=True)
    amax = input_amax(unet, modules, calibration)
    candidates = CANDIDATES if settings.smooth else CANDIDATES[:1]
    made: dict[str, QuantLayer] = {}
    chosen: dict[str, dict[str, float]] = {}
    with progress("smoothing and branches") as report:
        for batch in recorded_inputs(unet, modules, calibration, settings.samples):
            for name, inputs in batch.items():
                weight: Tensor = modules[name].weight  # type: ignore[assignment]
                parts = groups(weight.shape[1], settings.group_size) if settings.granularity == "native" else ()
                search = LayerSearch(modules[name], replace(plan, rank=ranks[name], parts=parts), name, inputs)
                pair = search.search_smoothing(amax[name][0], candidates)
                rounds = search.iterate_branch(settings.iterations)
                made[name] = search.layer
                chosen[name] = {"alpha": pair[0], "beta": pair[1], "rounds": rounds, "error": float(f"{search.relative_error:.6g}")}
                report(len(made), len(modules))
            layers = {name: made[name] for name in batch}
            if settings.weights == "gptq":
                round_layers(unet, layers, calibration, settings.gptq_rows, spec.seed, act_order=True)
            for layer in layers.values():  # at once: an open layer holds its weight three times
                if layer.is_open:
                    layer.freeze()
    apply.quantize_layers(unet, spec.exclude, lambda name, _module: made[name])
    apply.note(unet, searched=chosen, ranks_limited=sum(rank < settings.rank for rank in ranks.values()))
    return unet


def layer_ranks(modules: Mapping[str, nn.Module], settings: SVDQuantSettings) -> dict[str, int]:
    """Rank of every layer's branch."""
    ranks = {}
    for name, module in modules.items():
        limit = low_rank.rank_limit(module.weight)  # type: ignore[arg-type]
        if settings.rank > limit and not settings.limit_ranks:
            shape = tuple(module.weight.shape)  # type: ignore[union-attr,operator]
            raise QuantError(
                f"svdquant: {name} cannot have rank {settings.rank}: the limit of its weight {shape} is {limit}; "
                f"lower method.svdquant.rank to {limit}, or set limit_ranks: true"
            )
        ranks[name] = min(settings.rank, limit)
    return ranks


class LayerSearch:
    """The best quantized form of one layer so far, `layer`, and its summed squared output error, `error`."""

    def __init__(self, module: nn.Module, plan: LayerPlan, name: str, inputs: Sequence[Tensor]) -> None:
        self.module, self.plan, self.name, self.inputs = module, plan, name, inputs
        self.targets = [module(x) for x in inputs]
        self.error = float("inf")
        self.layer: QuantLayer

    @property
    def relative_error(self) -> float:
        """Squared output error over the squared output."""
        return self.error / max(sum(float(target.double().pow(2).sum()) for target in self.targets), 1e-30)

    def offer(self, smooth: Tensor | None, branch: tuple[Tensor, Tensor]) -> bool:
        """Take a form if its output error is below the best."""
        layer = QuantLayer.from_float(self.module, self.plan, self.name, smooth=smooth, branch=branch)
        error = sum(float((layer(x) - y).double().pow(2).sum()) for x, y in zip(self.inputs, self.targets, strict=True))
        if error < self.error:
            self.layer, self.error = layer, error
            return True
        return False

    def search_smoothing(self, amax_K: Tensor, candidates: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """Factors by the exponents of least output error, the branch from the SVD of the smoothed weight; returns the exponents."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        wmax_K, best = weight_amax(weight), candidates[0]
        for pair in candidates:
            smooth = factors(amax_K, wmax_K, *pair) if any(pair) else None
            smoothed = weight if smooth is None else weight * smooth.view(1, -1, *(1,) * (weight.dim() - 2))
            if self.offer(smooth, low_rank.gram_init(smoothed, self.plan.rank)):
                best = pair
        return best

    def iterate_branch(self, rounds: int) -> int:
        """Branches from the SVD of what the rounded residual leaves over, as long as the output error falls; returns the rounds kept."""
        for done in range(rounds):
            assert self.layer.weight is not None
            left_over = self.layer.weight - torch.cat(self.layer.quantized_weights(), 1)
            if not self.offer(self.layer.smooth, low_rank.gram_init(left_over, self.plan.rank)):
                return done
        return rounds


def groups(channels: int, size: int) -> tuple[int, ...]:
    """Sizes of consecutive groups of channels; the last has what remains.

    >>> groups(160, 64)
    (64, 64, 32)
    """
    full, rest = divmod(channels, size)
    return (size,) * full + ((rest,) if rest else ())


def recorded_inputs(unet: nn.Module, layers: Mapping[str, nn.Module], samples: Samples, count: int) -> Iterator[dict[str, list[Tensor]]]:
    """The inputs of layers in at most `count` evenly spaced samples, by name, in batches of layers that fit into `MEMORY`.

    Each batch costs a pass through the samples; a layer whose inputs alone are larger than that is a batch of its own.
    """
    count = min(count, len(samples))
    chosen = [samples[round(k * (len(samples) - 1) / max(1, count - 1))] for k in range(count)]
    sizes = {name: sum(x.numel() * x.element_size() for x in xs) for name, xs in _record(unet, layers, chosen[:1], meta=True).items()}
    batches: list[list[str]] = []
    held = MEMORY + 1
    for name, size in sizes.items():
        if held + size * count > MEMORY:
            batches.append([])
            held = 0
        batches[-1].append(name)
        held += size * count
    for batch in batches:
        yield _record(unet, {name: layers[name] for name in batch}, chosen)


def _record(unet: nn.Module, layers: Mapping[str, nn.Module], samples: Sequence[Sample], meta: bool = False) -> dict[str, list[Tensor]]:
    """Inputs of layers by name, copied since the network may go on to overwrite them; `meta`: their shapes only."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    with observe_inputs(layers, lambda name, x: found[name].append(x.to("meta") if meta else x.clone())):
        for sample in samples:
            call(unet, sample)
    return found
