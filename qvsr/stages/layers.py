"""What quantization did to each layer of one checkpoint: a table and a figure."""

from __future__ import annotations

import logging
from pathlib import Path

from qvsr.config import Config
from qvsr.provenance import atomic_path

log = logging.getLogger(__name__)


class LayersStageError(ValueError):
    """A report that cannot be made; the message says what would work."""


def run(config: Config, checkpoint: Path, calibration: Path, out: Path, samples: int = 10) -> None:
    """Write the report of a checkpoint; its worst layers go to the log.

    Args:
        checkpoint: quantized from the configuration's backbone.
        calibration: folder written by the calibrate stage with the same backbone.
        out: the csv; the figure appears beside it under the same name as png.
        samples: how many calibration samples are looked at, spread over timesteps and clips.
    """
    from qvsr.data.calibration import CalibrationSet
    from qvsr.models.checkpoints import load_backbone
    from qvsr.quant import checkpoint as quantized
    from qvsr.quant.cost import full_facts
    from qvsr.report.layers import draw, layers_csv, report, spread, worst

    if out.suffix != ".csv":
        raise LayersStageError(f"--out {out}: a name that ends in .csv is needed, the figure is written beside it as .png")
    header = quantized.read_header(checkpoint)
    backbone = load_backbone(config.backbone)
    recorded = CalibrationSet(calibration, None, backbone.digest)
    chosen = spread([int(recorded[index].t) for index in range(len(recorded))], samples)
    recorded.structure = backbone.structure
    network = quantized.load(checkpoint, load_backbone(config.backbone).unet)
    macs = {
        layer.name: layer.macs for layer in full_facts(config.backbone.unet, config.sampling.tile, config.backbone.context_tokens).layers
    }
    rows = report(backbone.unet, network, [recorded[index] for index in chosen], macs)
    log.info("%s %s, %d of %d calibration samples", header["method"], header["bits"], len(chosen), len(recorded))
    log.info("%s", worst(rows))
    with atomic_path(out.with_suffix(".png")) as figure, atomic_path(out) as table:
        draw(figure, rows, f"{header['method']} {header['bits']}, {header['backbone']}")
        table.write_text(layers_csv(rows), encoding="utf-8")
