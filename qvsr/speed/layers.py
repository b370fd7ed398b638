"""Every different layer of a U-Net by itself, with random weights and inputs, in all its variants.

Layers are quantized as `quantvsr` does it: channel halves with dynamic ranges, rotated, and with a low-rank branch where the variant has one. Packed time
is that of the whole layer, rotation and rounding of the input included. Packed convolutions get their input channels last, as they return it: 72 of 100
convolutions of the small network in packed execution do. What they are compared with is the faster of float32's two layouts.

The result is checked first: packed against simulated execution of the same layer on the same input.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qvsr.config import Config
from qvsr.progress import progress
from qvsr.quant.apply import excluded, quantizable
from qvsr.quant.cost import example_inputs
from qvsr.quant.layer import KINDS, LayerPlan, QuantLayer, halves
from qvsr.speed.machine import Peaks
from qvsr.speed.timing import BF16, FP32, FP32_LAST, Row, Times, Variant, alternate, decibels

RANK = 24  # of the published costs
PACKED = tuple(Variant(f"packed W{bits}A{bits}", "packed", bits, channels_last=True) for bits in (8, 6, 4))
BRANCHED = Variant(f"packed W4A4 r{RANK}", "packed", 4, RANK, channels_last=True)
SIMULATED = Variant("simulated W4A4", "simulated", 4)
VARIANTS = (FP32, FP32_LAST, BF16, SIMULATED, *PACKED, BRANCHED)
MAPS = {4: torch.channels_last, 5: torch.channels_last_3d}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """Layers of a network that are alike.

    Attributes:
        weight, input, output: shapes.
        name: of the first such layer; it tells no shapes apart.
        quantized: whether the configuration's methods quantize it.
    """

    kind: str
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    bias: bool
    input: tuple[int, ...]
    output: tuple[int, ...]
    quantized: bool = True
    name: str = field(default="", compare=False)

    @property
    def macs(self) -> int:
        return self.positions * math.prod(self.weight)

    @property
    def positions(self) -> int:
        return math.prod(self.output) // self.weight[0]

    def branch_rank(self, rank: int) -> int:
        return min(rank, self.weight[0], math.prod(self.weight[1:]))

    def branch_params(self, rank: int) -> int:
        return self.branch_rank(rank) * (self.weight[0] + math.prod(self.weight[1:]))

    def moved(self, variant: Variant) -> float:
        """Bytes of input, weight and output as the variant keeps them: what must be read and written at least.

        A packed layer gets and returns float32; so does a simulated one, whose rounded weight is float32, too.
        """
        of_weight = variant.bits / 8 if variant.execution == "packed" else 2 if variant.bfloat16 else 4
        of_maps = 2 if variant.bfloat16 else 4
        return (
            of_maps * (math.prod(self.input) + math.prod(self.output))
            + of_weight * math.prod(self.weight)
            + 4 * self.branch_params(variant.rank)
        )

    def least(self, variant: Variant, peaks: Peaks) -> float:
        """Seconds that the machine's peaks allow; simulated execution multiplies in float32."""
        bits = 32 if variant.execution == "simulated" else variant.bits
        return peaks.seconds(bits, self.macs, self.branch_params(variant.rank) * self.positions, self.moved(variant))

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        if self.kind == "Linear":
            return nn.Linear(self.weight[1], self.weight[0], bias=self.bias).requires_grad_(False)
        how: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "bias": self.bias}
        return getattr(nn, self.kind)(self.weight[1], self.weight[0], self.weight[2:], **how).requires_grad_(False)  # type: ignore[no-any-return]


def shapes(config: Config) -> dict[Shape, int]:
    """The different layers of a configuration's U-Net and how many it has of each; nothing is computed."""
    from qvsr.models.unet import InflatedUNet

    found: dict[Shape, int] = {}
    with torch.device("meta"):
        unet = InflatedUNet(config.backbone.unet)
    quantizable(unet, config.method.exclude)  # refuses names that exclude nothing

    def note(name: str, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        stride, padding = getattr(layer, "stride", ()), getattr(layer, "padding", ())
        quantized = not excluded(name, config.method.exclude)
        sizes = tuple(layer.weight.shape), stride, padding, layer.bias is not None, tuple(args[0].shape), tuple(output.shape)
        shape = Shape(KINDS[type(layer)], *sizes, quantized, name)
        found[shape] = found.get(shape, 0) + 1

    with ExitStack() as stack, torch.no_grad():
        for name, layer in unet.named_modules():
            if type(layer) in KINDS:
                hook = layer.register_forward_hook(lambda layer, args, output, name=name: note(name, layer, args, output))
                stack.callback(hook.remove)
        unet(*example_inputs(config.backbone.unet, config.sampling.tile, config.backbone.context_tokens, "meta"))
    return found


def handful(found: dict[Shape, int], count: int = 5) -> dict[Shape, int]:
    """A few shapes for a quick look: of each kind the one with most multiply-accumulates in all, then those with most."""
    ordered = sorted(found, key=lambda shape: -shape.macs * found[shape])
    firsts = [next(shape for shape in ordered if shape.kind == kind) for kind in dict.fromkeys(shape.kind for shape in ordered)]
    chosen = [*firsts, *(shape for shape in ordered if shape not in firsts)][: max(count, len(firsts))]
    return {shape: found[shape] for shape in ordered if shape in chosen}


def quantized(module: nn.Module, variant: Variant, name: str, seed: int = 0) -> QuantLayer:
    """A frozen layer; the branch is random, as time does not depend on its values."""
    count, inputs, *kernel = module.weight.shape  # type: ignore[union-attr,misc]
    rank = min(variant.rank, count, inputs * math.prod(kernel))
    generator = torch.Generator().manual_seed(seed)
    up, down = (0.01 * torch.randn(size, generator=generator) for size in ((count, rank), (rank, inputs, *kernel)))
    layer = QuantLayer.from_float(module, LayerPlan(variant.bits, variant.bits, halves(inputs), True, rank), name, seed, branch=(up, down))
    layer.freeze()
    return layer


def calls_of(shape: Shape, variants: Sequence[Variant]) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float]]:
    """A call of each variant by name, and of packed ones how far they are from simulated execution."""
    x = torch.randn(shape.input, generator=torch.Generator().manual_seed(1))
    layout = MAPS.get(x.dim()) if shape.kind != "Linear" else None
    last = x.to(memory_format=layout) if layout is not None else x
    calls: dict[str, Callable[[], Tensor]] = {}
    errors = {}
    for variant in variants:
        given = last if variant.channels_last else x
        if variant.execution == "float":
            module, dtype = shape.module(), torch.bfloat16 if variant.bfloat16 else torch.float32
            if variant == FP32_LAST and layout is None:
                continue  # there is no other layout
            how = {"memory_format": layout} if variant.channels_last and layout is not None else {}
            module, own = module.to(dtype, **how), given.to(dtype)  # type: ignore[call-overload]
            calls[variant.name] = lambda module=module, own=own: module(own)  # type: ignore[misc]
            continue
        layer = quantized(shape.module(), variant, shape.name)
        if variant.execution == "packed":
            expected = layer(given)
            layer.set_execution("packed")
            errors[variant.name] = float((layer(given) - expected).norm() / expected.norm())
        calls[variant.name] = lambda layer=layer, given=given: layer(given)  # type: ignore[misc]
    return calls, errors


@torch.no_grad()
def run(
    found: dict[Shape, int],
    peaks: Peaks,
    facts: dict[str, Any],
    backend: str,
    seconds: float,
    least: int,
    variants: Sequence[Variant] = VARIANTS,
) -> list[Row]:
    """Rows of all variants of all shapes.

    Args:
        found: shapes and how often the network has them.
        facts: path, device, threads and torch's version, for every row.
        backend: who computes packed layers.
        seconds: for the rounds of each shape; least: rounds at least.
    """
    rows: list[Row] = []
    with progress("layers", parts=20) as report:
        for done, (shape, count) in enumerate(found.items()):
            calls, errors = calls_of(shape, variants)
            times = alternate(calls, seconds, least)
            rows += rows_of(shape, count, [v for v in variants if v.name in times], times, errors, peaks, facts, backend)
            report(done + 1, len(found))
    return rows


def rows_of(
    shape: Shape,
    count: int,
    variants: Iterable[Variant],
    times: dict[str, Times],
    errors: dict[str, float],
    peaks: Peaks,
    facts: dict[str, Any],
    backend: str,
) -> list[Row]:
    """What the times of one shape mean."""
    fp32 = min(times[one.name].median for one in (FP32, FP32_LAST) if one.name in times)
    bf16 = times[BF16.name].median if BF16.name in times else None
    rows = []
    for variant in variants:
        own = times[variant.name]
        moved = shape.moved(variant)
        rows.append(
            Row(
                name=shape.name,
                kind=shape.kind,
                shape=shape.weight,
                bits=variant.precision,
                execution=variant.execution,
                backend=backend if variant.execution == "packed" else "torch",
                seconds=own.median,
                seconds_fp32=fp32,
                ratio_fp32=fp32 / own.median,
                error=errors.get(variant.name),
                macs=shape.macs,
                variant=variant.name,
                rank=shape.branch_rank(variant.rank),
                input=shape.input,
                count=count,
                together=True,
                rounds=own.rounds,
                seconds_q1=own.q1,
                seconds_q3=own.q3,
                ratio_bf16=bf16 / own.median if bf16 is not None else None,
                gops=2 * shape.macs / own.median / 1e9,
                gb_s=moved / own.median / 1e9,
                roofline=shape.least(variant, peaks) / own.median,
                peak_mb=None,
                resident_mb=None,
                error_floor=None,
                sqnr_db=decibels(errors.get(variant.name)),
                psnr_db=None,
                psnr_fp_db=None,
                **facts,
            )
        )
    return rows
