"""The tables of a run: metrics and cost of every row, as csv, Markdown and LaTeX."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qvsr import results
from qvsr.config import Config
from qvsr.provenance import atomic_path


def run(config: Config, measured: Sequence[Path], checkpoints: Sequence[Path], out: Path) -> None:
    """Write all tables into one folder.

    Args:
        measured: JSON-lines files of the measure stage, every clip of every row.
        checkpoints: quantized U-Nets; their cost is counted on themselves.
    """
    from qvsr.models.checkpoints import load_backbone
    from qvsr.quant import checkpoint as quantized
    from qvsr.quant.cost import measured_cost
    from qvsr.report.tables import write_cost, write_metrics

    rows = results.read(*measured)
    costs = [measured_cost(load_backbone(config.backbone).unet, config, "full_precision", "W32A32")]
    for checkpoint in checkpoints:
        header = quantized.read_header(checkpoint)
        unet = quantized.load(checkpoint, load_backbone(config.backbone).unet)
        costs.append(measured_cost(unet, config, header["method"], header["bits"]))
    call = f"one segment of {config.backbone.unet.num_frames} frames on a latent tile of {config.sampling.tile}×{config.sampling.tile}"
    with atomic_path(out) as partial:
        write_metrics(partial, rows, config.methods, config.metrics, variant_notes(config))
        write_cost(partial, costs, call, config.methods)


def variant_notes(config: Config) -> list[str]:
    """A line for each variant in the tables: what it is made of."""
    listed = {name: config.variants[name] for name in config.methods if name in config.variants}
    return [
        f"{name}: {variant.method} with {', '.join(f'{key}={json.dumps(value)}' for key, value in variant.settings.items()) or 'its settings'}."
        for name, variant in listed.items()
    ]
