"""LQ frames of one clip to frames of four times the size, by the network as it is, quantized, or by no network at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from qvsr.config import Config
from qvsr.data import clips
from qvsr.devices import moved, pick
from qvsr.plan import UNQUANTIZED, clip_name
from qvsr.progress import progress

if TYPE_CHECKING:
    from qvsr.models.unet import InflatedUNet


class RestoreStageError(ValueError):
    """What was asked for does not fit together; the message says what would."""


def run(config: Config, method: str, bits: str, checkpoint: Path | None, lq: Path, out: Path, seed: int | None = None) -> None:
    """Restore one clip.

    Args:
        method: a method's name; ``full_precision`` and ``bicubic`` need no checkpoint.
        bits: such as W4A4; must be those of the checkpoint.
        checkpoint: quantized U-Net written by the quantize stage.
        lq: clip folder of LQ frames.
        out: clip folder to write.
        seed: of the noise; None: the configuration's.
    """
    import torch

    from qvsr.models.checkpoints import load_backbone
    from qvsr.models.flow import estimator
    from qvsr.models.noise import KeyedNoise
    from qvsr.models.pipeline import bicubic_upscale, restore_segments, to_uint8

    if (checkpoint is None) != (method in UNQUANTIZED):
        needs = "no checkpoint" if method in UNQUANTIZED else "--checkpoint, the file that quantize wrote"
        raise RestoreStageError(f"method {method} needs {needs}")
    source = clips.read_clip(lq)
    name = clip_name(lq)
    execution = None
    frames_TCHW = torch.from_numpy(source.frames_THWC).permute(0, 3, 1, 2).float().div(255).contiguous()
    if method == "bicubic":
        pieces = [bicubic_upscale(frames_TCHW, config.sampling.upscale)]
    else:
        backbone = load_backbone(config.backbone)
        if checkpoint is not None:
            from qvsr.quant import apply
            from qvsr.quant import checkpoint as quantized

            header = quantized.read_header(checkpoint)
            if (header["method"], header["bits"]) != (method, bits):
                raise RestoreStageError(f"{checkpoint} is {header['method']} {header['bits']}, not {method} {bits}")
            backbone = replace(backbone, unet=cast("InflatedUNet", quantized.load(checkpoint, backbone.unet)))
            execution = apply.choose_execution(config.execution, config.device)
            apply.set_execution(backbone.unet, execution)
        device = pick(config.device)
        backbone = moved(backbone, device)
        flow = estimator(config.sampling.flow, config.backbone.flow_weights, device)
        noise = KeyedNoise(config.seed if seed is None else seed, name)
        with progress(f"restore {name} {method} {bits}") as report:
            pieces = list(restore_segments(backbone, frames_TCHW, config.sampling, noise, flow, progress=report, clip=name))
    frames_THWC = torch.cat([to_uint8(piece, config.sampling.rounding) for piece in pieces]).numpy()
    draw = clips.lq_draw(source.info)
    known = ({"lq": draw} if draw else {}) | ({"execution": execution} if execution else {})
    clips.write_clip(out, frames_THWC, {"source": name, "fps": source.info.get("fps"), "method": method, "bits": bits, **known})
