"""Every metric of one restored clip."""

from __future__ import annotations

from pathlib import Path

from qvsr import protocols, results
from qvsr.config import Config
from qvsr.data.clips import read_frames_TCHW
from qvsr.provenance import head


def run(config: Config, pred: Path, gt: Path, fp: Path | None, dataset: str, method: str, bits: str, execution: str, out: Path) -> None:
    """Measure one clip and write one JSON line per metric.

    Args:
        pred: clip folder of restored frames, or of the ground truth itself.
        gt: clip folder of the ground truth.
        fp: clip folder of the full-precision output; needed by metrics that compare with it.
        dataset: name of the dataset; stands in each line, as `method`, `bits` and `execution` do.
    """
    context = results.Context(
        backbone=config.backbone.name,
        method=method,
        bits=bits,
        execution=execution,
        seed=config.seed,
        dataset=dataset,
        clip=pred.name,
        limit=config.datasets[dataset].limit if dataset in config.datasets else None,
        provenance=head(),
    )
    protocol = protocols.read(config.protocol)
    full_precision = read_frames_TCHW(fp) if fp is not None else None
    rows = results.measure_clip(read_frames_TCHW(pred), read_frames_TCHW(gt), full_precision, config.metrics, context, protocol)
    results.write(out, rows)
