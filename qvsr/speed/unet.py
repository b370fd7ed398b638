"""One step of a whole U-Net with random weights: one call on a segment of frames of one latent tile.

Two measurements, because networks that stand side by side cannot tell what one of them takes:

- *alone*: a process for each variant, which holds that network and nothing else. Memory is what the process has above what it had with torch, our modules
  and the inputs loaded: the most during the step, and at rest behind the building. Both layouts of float32 are timed here; the faster one goes on.
- *together*: one process with float32, bfloat16 and all packed networks, whose rounds alternate. Ratios are from here. Then each packed network computes the
  same step simulated, once for the difference, and once with an input that is 1e-7 of it off: in a whole network a last digit flips roundings, and simulated
  execution is no nearer to itself. Simulated steps take longer than all others: their ratio is not one of alternating rounds, and their row says so.

What is not quantized is shared by the networks of one process. Weights are random and drawn layer by layer, the same in every process.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from qvsr.config import Config, UNetSettings
from qvsr.quant import apply
from qvsr.quant.cost import example_inputs, full_facts
from qvsr.speed.layers import MAPS, RANK, Shape, quantized, shapes
from qvsr.speed.machine import Measured, Memory, Peaks, in_a_process
from qvsr.speed.timing import BF16, FP32, FP32_LAST, Row, Times, Variant, alternate, decibels

PACKED = (
    *(Variant(f"packed W{bits}A{bits} r{RANK}", "packed", bits, RANK) for bits in (8, 6, 4)),
    *(Variant(f"packed W{bits}A{bits} r{RANK}, rest bf16", "packed", bits, RANK, half=True) for bits in (8, 4)),
)
SIMULATED = Variant(f"simulated W4A4 r{RANK}", "simulated", 4, RANK)
VARIANTS = (FP32, FP32_LAST, BF16, SIMULATED, *PACKED)
MOVED = 1e-7  # of the input: about the last digit of float32
log = logging.getLogger(__name__)
Inputs = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


def inputs_of(settings: UNetSettings, tile: int, tokens: int) -> Inputs:
    """Random values of the sizes that the sampler gives the network."""
    generator = torch.Generator().manual_seed(0)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    x, t, context, struct = example_inputs(settings, tile, tokens)
    return draw(x), t + 500, draw(context), {width: draw(maps) for width, maps in struct.items()}


def network(settings: UNetSettings, variant: Variant, exclude: Sequence[str], full: nn.Module | None = None) -> nn.Module:
    """A network of random weights, a layer at a time: no second copy of it is ever in memory.

    Args:
        full: the same network in float32, whose weights are quantized and whose other parameters are shared; None: they are drawn.
    """
    from qvsr.models.unet import InflatedUNet

    with torch.device("meta"):
        net: nn.Module = InflatedUNet(settings).eval().requires_grad_(False)
    # names alone: the layers in float32 are to go, one by one
    chosen = set(apply.quantizable(net, exclude)) if variant.execution != "float" else set()
    own = [name for name, module in net.named_modules() if next(module.parameters(recurse=False), None) is not None]
    for number, name in enumerate(own):
        module = net.get_submodule(name) if full is None else full.get_submodule(name)
        if full is None:
            _draw(module, number)
        if name in chosen:
            layer = quantized(module, variant, name, number)
            layer.set_execution(variant.execution)
            apply.replace(net, name, layer)
        elif full is not None:
            for key, parameter in module.named_parameters(recurse=False):
                setattr(net.get_submodule(name), key, parameter)
    if variant.execution == "float":
        net = _converted(net, variant)
    elif variant.half:
        apply.set_precision(net, torch.bfloat16)
    return net


def _draw(module: nn.Module, seed: int) -> None:
    """PyTorch's initial values in the place of none; what a trained network does not have, layers that return zero, is none of them."""
    torch.manual_seed(seed)
    module.to_empty(device="cpu", recurse=False)
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()  # type: ignore[operator]
    else:
        for parameter in module.parameters(recurse=False):  # how much temporal layers mix
            parameter.fill_(0.5)


def _converted(net: nn.Module, variant: Variant) -> nn.Module:
    """Type and layout, a tensor at a time."""
    for parameter in net.parameters():
        layout = MAPS.get(parameter.dim()) if variant.channels_last else None
        parameter.data = parameter.data.to(torch.bfloat16 if variant.bfloat16 else parameter.dtype)
        if layout is not None:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return net


def step(net: nn.Module, variant: Variant, given: Inputs) -> Callable[[], Tensor]:
    """The call that is timed; inputs have the variant's type and layout before."""
    x, t, context, struct = given
    dtype = torch.bfloat16 if variant.bfloat16 else torch.float32

    def laid(maps: Tensor) -> Tensor:
        maps = maps.to(dtype)
        return maps.contiguous(memory_format=torch.channels_last) if variant.channels_last else maps

    own = laid(x), t, context.to(dtype), {width: laid(maps) for width, maps in struct.items()}
    return lambda: net(*own)


# ---------------------------------------------------------------- in processes of their own


def _job(job: dict[str, Any]) -> tuple[UNetSettings, Inputs, list[str]]:
    settings = UNetSettings.model_validate(job["settings"])
    return settings, inputs_of(settings, job["tile"], job["tokens"]), job["exclude"]


def alone(job: dict[str, Any]) -> Measured:
    """Memory and times of one variant; the first step, which makes what later ones keep, is in the peak and not in the times."""
    variant = next(one for one in VARIANTS if one.name == job["variant"])
    settings, given, exclude = _job(job)
    memory = Memory()
    call = step(network(settings, variant, exclude), variant, given)
    at_rest = memory.resident()
    memory.start()
    call()
    times = []
    for _ in range(job["rounds"]):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return Measured(tuple(times), memory.peak(), at_rest)


def together(job: dict[str, Any]) -> dict[str, Any]:
    """Times of alternating rounds, and how far each packed network is from itself simulated."""
    settings, given, exclude = _job(job)
    float32 = FP32_LAST if job["channels_last"] else FP32
    full = network(settings, float32, exclude)
    nets = {float32: full, BF16: network(settings, BF16, exclude)}
    nets |= {variant: network(settings, variant, exclude, full) for variant in PACKED}
    calls = {variant.name: step(net, variant, given) for variant, net in nets.items()}
    times = alternate(calls, job["seconds"], job["rounds"], max(job["rounds"], 50))
    del calls, full
    for variant in (float32, BF16):
        nets.pop(variant)  # simulated networks hold rounded weights in float32: room for one
    errors, floors, simulated = {}, {}, math.nan
    for variant in PACKED:
        net = nets.pop(variant)
        call = step(net, variant, given)
        packed = call()
        apply.set_execution(net, "simulated")
        expected = call()
        moved = step(net, variant, (given[0] * (1 + MOVED), *given[1:]))
        begun = time.perf_counter()
        beside = moved()
        if (variant.bits, variant.half) == (SIMULATED.bits, SIMULATED.half):
            simulated = time.perf_counter() - begun
        errors[variant.name], floors[variant.name] = (
            (one - expected).float().norm().item() / expected.float().norm().item() for one in (packed, beside)
        )
        del net, call, moved
    return {"times": {name: asdict(one) for name, one in times.items()}, "errors": errors, "floors": floors, "simulated": simulated}


# ---------------------------------------------------------------- rows


def run(config: Config, peaks: Peaks, facts: dict[str, Any], backend: str, seconds: float, rounds: int) -> list[Row]:
    """Rows of all variants.

    Args:
        facts: path, device, threads and torch's version, for every row.
        backend: who computes packed layers.
        seconds, rounds: of the alternating measurement, about and at least.
    """
    found = shapes(config)  # before the long work: settings that cannot be are refused here
    job: dict[str, Any] = {
        "settings": config.backbone.unet.model_dump(mode="json"),
        "tile": config.sampling.tile,
        "tokens": config.backbone.context_tokens,
        "exclude": list(config.method.exclude),
        "threads": facts["threads"],
        "seconds": seconds,
        "rounds": rounds,
    }
    single: dict[Variant, Measured] = {}
    for variant in VARIANTS:
        log.info("%s: memory, in a process of its own", variant.name)
        measured = in_a_process(
            f"{__name__}:alone", {**job, "variant": variant.name, "rounds": 1 if variant == SIMULATED else 2}, facts["threads"]
        )
        single[variant] = Measured(**measured)
        log.info("  %s", single[variant])
    last = Times.of(single[FP32_LAST].seconds).median < Times.of(single[FP32].seconds).median
    log.info("all together: times")
    both = in_a_process(f"{__name__}:together", {**job, "channels_last": last}, facts["threads"])
    return rows_of(config, found, single, both, peaks, facts, backend)


def rows_of(
    config: Config,
    found: dict[Shape, int],
    single: dict[Variant, Measured],
    both: dict[str, Any],
    peaks: Peaks,
    facts: dict[str, Any],
    backend: str,
) -> list[Row]:
    """What both measurements mean."""
    times = {name: Times(**one) for name, one in both["times"].items()}
    counted = full_facts(config.backbone.unet, config.sampling.tile, config.backbone.context_tokens)
    macs = counted.attention_macs + sum(layer.macs for layer in counted.layers)
    fp32 = next(times[one.name].median for one in (FP32, FP32_LAST) if one.name in times)
    x, *_ = example_inputs(config.backbone.unet, config.sampling.tile, config.backbone.context_tokens, "meta")
    rows = []
    for variant in VARIANTS:
        own, of_peak = times.get(variant.name), single[variant]
        if variant == SIMULATED:
            own = Times.of([both["simulated"]])
        error = both["errors"].get(variant.name)
        seconds = own if own is not None else Times.of(of_peak.seconds)
        rows.append(
            Row(
                name=config.backbone.name,
                kind="unet",
                shape=tuple(x.shape),
                bits=variant.precision,
                execution=variant.execution,
                backend=backend if variant.execution == "packed" else "torch",
                seconds=seconds.median,
                seconds_fp32=fp32,
                ratio_fp32=fp32 / seconds.median,
                error=error,
                macs=macs,
                variant=variant.name,
                rank=variant.rank,
                input=tuple(x.shape),
                count=1,
                together=variant.name in times,
                rounds=seconds.rounds,
                seconds_q1=seconds.q1,
                seconds_q3=seconds.q3,
                ratio_bf16=times[BF16.name].median / seconds.median,
                gops=2 * macs / seconds.median / 1e9,
                gb_s=None,
                roofline=least(found, counted.attention_macs, variant, peaks) / seconds.median,
                peak_mb=of_peak.peak_mb,
                resident_mb=of_peak.resident_mb,
                error_floor=both["floors"].get(variant.name),
                sqnr_db=decibels(error),
                psnr_db=None,
                psnr_fp_db=None,
                **facts,
            )
        )
    return rows


def least(found: dict[Shape, int], attention_macs: int, variant: Variant, peaks: Peaks) -> float:
    """Seconds that the machine's peaks allow: each layer's own, unquantized ones and attention products in float32 (bfloat16); norms and the like: none."""
    unquantized = variant if variant.execution == "float" else BF16 if variant.half else FP32
    layers = math.fsum(count * shape.least(variant if shape.quantized else unquantized, peaks) for shape, count in found.items())
    return layers + peaks.seconds(unquantized.bits, attention_macs, 0, 0)
