"""A whole clip restored by an exported model, simulated and packed, and by the full-precision network that it was made of.

As for the U-Net there are two measurements: a process for each variant, for its memory; and one with all of them, whose rounds of whole clips alternate,
for times and for how far the frames are apart. The networks compute as in the restore and upscale stages, on the number of threads that is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from qvsr.config import Config
from qvsr.data import clips
from qvsr.data.datasets import build_clip
from qvsr.models.checkpoints import Backbone, load_backbone
from qvsr.models.flow import estimator
from qvsr.models.noise import KeyedNoise
from qvsr.models.pipeline import network_calls, restore, to_uint8
from qvsr.quant import exported
from qvsr.quant.cost import full_facts
from qvsr.speed.machine import Measured, Memory, in_a_process
from qvsr.speed.timing import BenchError, Row, Times, Variant, alternate, decibels

log = logging.getLogger(__name__)


def variants_of(header: dict[str, Any]) -> list[Variant]:
    """Full precision, and both executions of a model."""
    bits, spec = header["quantized"]["bits"], header["quantized"]["spec"]
    executions = [Variant(f"{execution} {bits}", execution, int(spec["weight_bits"])) for execution in ("simulated", "packed")]
    return [Variant("fp32", "float", 32), *executions]


def check(config: Config, model: Path) -> dict[str, Any]:
    """Refuse what cannot be measured; returns the model's header.

    Raises:
        BenchError: the configuration has another network than the model, or no clip.
        qvsr.quant.exported.ModelError: no such model.
    """
    header = exported.read_header(model)
    files = {"weights", "vae_weights", "flow_weights"}
    if header["backbone"] != config.backbone.model_dump(mode="json", exclude=files):
        raise BenchError(
            f"{model} was made of {header['backbone']['name']}, the configuration has another {config.backbone.name}: give the configuration that it "
            "was exported with"
        )
    if config.picture is None:
        raise BenchError("bench clip restores the clip of `picture`, which the configuration leaves out: set picture to [DATASET, CLIP]")
    return header


def restorer(config: Config, model: Path, variant: Variant) -> Callable[[Tensor, str], Tensor]:
    """A function from LQ frames and the clip's name to frames; networks are loaded now."""
    backbone: Backbone
    if variant.execution == "float":
        backbone = load_backbone(config.backbone)
    else:
        backbone = exported.load(model, variant.execution).backbone
    flow = estimator(config.sampling.flow, config.backbone.flow_weights)
    return lambda lq_TCHW, name: restore(backbone, lq_TCHW, config.sampling, KeyedNoise(config.seed, name), flow)


# ---------------------------------------------------------------- in processes of their own


def _job(job: dict[str, Any]) -> tuple[Config, Path, Tensor, str]:
    torch.set_deterministic_debug_mode("error")  # as the stages do
    frames_TCHW = torch.from_numpy(clips.read_clip(Path(job["lq"])).frames_THWC).permute(0, 3, 1, 2).float().div(255).contiguous()
    return Config.model_validate(job["config"]), Path(job["model"]), frames_TCHW[: job["frames"]], job["clip"]


def alone(job: dict[str, Any]) -> Measured:
    """Memory and time of one variant."""
    config, model, lq_TCHW, name = _job(job)
    variant = next(one for one in variants_of(exported.read_header(model)) if one.name == job["variant"])
    memory = Memory()
    call = restorer(config, model, variant)
    at_rest = memory.resident()
    memory.start()
    call(lq_TCHW, name)
    return Measured((), memory.peak(), at_rest)


def together(job: dict[str, Any]) -> dict[str, Any]:
    """Times of alternating rounds, and differences of the frames."""
    config, model, lq_TCHW, name = _job(job)
    frames: dict[str, Tensor] = {}

    def call(variant: Variant, work: Callable[[Tensor, str], Tensor]) -> None:
        frames[variant.execution] = work(lq_TCHW, name)

    variants = variants_of(exported.read_header(model))
    works = {variant: restorer(config, model, variant) for variant in variants}
    calls = {variant.name: lambda variant=variant, work=work: call(variant, work) for variant, work in works.items()}
    times = alternate(calls, job["seconds"], job["rounds"])
    pictures = {execution: to_uint8(restored, config.sampling.rounding).double() / 255 for execution, restored in frames.items()}
    return {
        "times": {name: asdict(one) for name, one in times.items()},
        "error": float((frames["packed"] - frames["simulated"]).norm() / frames["simulated"].norm()),
        "psnr": psnr(pictures["packed"], pictures["simulated"]),
        "psnr_fp": {execution: psnr(pictures[execution], pictures["float"]) for execution in ("simulated", "packed")},
        "shape": list(frames["float"].shape),
    }


def psnr(a: Tensor, b: Tensor) -> float | None:
    """Of all pixels of a clip in [0, 1] at once, in decibels; None where they are equal.

    >>> psnr(torch.zeros(2, 2), torch.full((2, 2), 0.5))
    6.020599913279624
    """
    return decibels(float((a - b).square().mean().sqrt()))


# ---------------------------------------------------------------- rows


def run(
    config: Config, model: Path, facts: dict[str, Any], backend: str, seconds: float, rounds: int, frames: int | None = None
) -> list[Row]:
    """Rows of all variants.

    Args:
        model: written by export.
        facts: path, device, threads and torch's version, for every row.
        backend: who computes packed layers.
        seconds, rounds: of the alternating measurement, about and at least.
        frames: of the clip; None: all.
    """
    header = check(config, model)
    assert config.picture is not None
    dataset, name = config.picture
    with TemporaryDirectory(prefix="qvsr-bench-") as folder:
        lq = Path(folder) / "LQ" / name
        build_clip(config, dataset, name, Path(folder) / "GT" / name, lq)
        found = clips.read_clip(lq).frames_THWC
        job: dict[str, Any] = {
            "config": config.model_dump(mode="json"),
            "model": str(model.resolve()),
            "lq": str(lq),
            "clip": name,
            "frames": min(frames or len(found), len(found)),
            "threads": facts["threads"],
            "seconds": seconds,
            "rounds": rounds,
        }
        single = {}
        for variant in variants_of(header):
            log.info("%s: memory, in a process of its own", variant.name)
            single[variant] = Measured(**in_a_process(f"{__name__}:alone", {**job, "variant": variant.name}, facts["threads"]))
            log.info("  %s", single[variant])
        log.info("all together: times")
        both = in_a_process(f"{__name__}:together", job, facts["threads"])
    height, width = found.shape[1:3]
    calls = network_calls(height, width, job["frames"], config.sampling, config.backbone.first_stage.factor)
    counted = full_facts(config.backbone.unet, config.sampling.tile, config.backbone.context_tokens)
    macs = calls * (counted.attention_macs + sum(layer.macs for layer in counted.layers))
    return rows_of(name, header, (job["frames"], *found.shape[1:]), macs, single, both, facts, backend)


def rows_of(
    name: str,
    header: dict[str, Any],
    lq: tuple[int, ...],
    macs: int,
    single: dict[Variant, Measured],
    both: dict[str, Any],
    facts: dict[str, Any],
    backend: str,
) -> list[Row]:
    """What both measurements mean.

    Args:
        lq: frames, height, width, channels of the input.
    """
    times = {variant: Times(**both["times"][variant.name]) for variant in single}
    fp32 = next(one.median for variant, one in times.items() if variant.execution == "float")
    rows = []
    for variant, own in times.items():
        packed = variant.execution == "packed"
        rows.append(
            Row(
                name=name,
                kind="clip",
                shape=tuple(both["shape"]),
                bits=variant.precision if variant.execution == "float" else header["quantized"]["bits"],
                execution=variant.execution,
                backend=backend if packed else "torch",
                seconds=own.median,
                seconds_fp32=fp32,
                ratio_fp32=fp32 / own.median,
                error=both["error"] if packed else None,
                macs=macs,
                variant=variant.name,
                rank=max((int(layer["rank"]) for layer in header["layers"].values()), default=0) if variant.execution != "float" else 0,
                input=(lq[0], lq[3], *lq[1:3]),
                count=1,
                together=True,
                rounds=own.rounds,
                seconds_q1=own.q1,
                seconds_q3=own.q3,
                ratio_bf16=None,
                gops=2 * macs / own.median / 1e9,
                gb_s=None,
                roofline=None,
                peak_mb=single[variant].peak_mb,
                resident_mb=single[variant].resident_mb,
                error_floor=None,
                sqnr_db=None,
                psnr_db=both["psnr"] if packed else None,
                psnr_fp_db=both["psnr_fp"].get(variant.execution),
                **facts,
            )
        )
    return rows
