"""One method at one bit width: the quantized U-Net as a checkpoint."""

from __future__ import annotations

from pathlib import Path

from qvsr.config import Config, QuantSpec, parse_bits
from qvsr.devices import moved, pick
from qvsr.provenance import code_digest
from qvsr.registry import BASELINES, plugins

CODE = ("qvsr/quant/**/*.py", "qvsr/quantvsr.py", "qvsr/kernels/**/*.py", "qvsr/kernels/csrc/cpu/*", "baselines/*.py")


class QuantizeStageError(ValueError):
    """What was asked for cannot be quantized; the message says what would work."""


def run(config: Config, method: str, bits: str, calibration: Path, out: Path) -> None:
    """Quantize the backbone's U-Net.

    Args:
        method: a registered method, or a variant of one; the package `baselines`, or the one that offers it, must have been imported.
        bits: such as W4A4.
        calibration: folder written by the calibrate stage.
        out: the checkpoint, safetensors; its header holds every setting that made it.
    """
    from qvsr.data.calibration import CalibrationSet
    from qvsr.models.checkpoints import load_backbone
    from qvsr.quant import checkpoint

    base, own = config.resolve_method(method)
    quantize = BASELINES[base]
    weight_bits, act_bits = parse_bits(bits)
    if 32 in (weight_bits, act_bits):
        raise QuantizeStageError(f"{method} {bits}: nothing to quantize; bits from 2 to 8 are, such as W4A4")
    if base in plugins():
        settings = config.plugin_settings(method, quantize.facts.get("settings"))
    else:
        settings = own.model_dump(mode="json") if own is not None else {}
    spec = QuantSpec(
        method=base,
        weight_bits=weight_bits,
        act_bits=act_bits,
        exclude=config.method.exclude,
        settings=settings,
        seed=config.seed,
        schedule=config.backbone.schedule,
        steps=config.sampling.steps,
    )
    device = pick(config.device)
    backbone = moved(load_backbone(config.backbone), device)
    samples = CalibrationSet(calibration, backbone.structure, backbone.digest, device)
    unet = quantize(backbone.unet, samples, spec).cpu()
    header = {
        "method": method,
        "base": base,
        "bits": bits,
        "backbone": config.backbone.name,
        "weights": backbone.digest,
        "spec": spec.model_dump(mode="json"),
        "calibration": samples.digest,
        "calibration_set": {
            "dataset": samples.manifest["calibration"]["dataset"],
            "samples": len(samples),
            "steps": samples.manifest["calibration"]["steps"],
        },
        "code": code_digest(*CODE),
    }
    if base in plugins():
        header["plugin"] = str(plugins()[base])
    checkpoint.save(unet, out, header)
