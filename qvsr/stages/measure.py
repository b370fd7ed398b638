"""Every metric of restored clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qvsr import protocols, results
from qvsr.config import Config
from qvsr.data.clips import read_frames_TCHW
from qvsr.provenance import head


def run(
    config: Config,
    pred: Path,
    gt: Path,
    fp: Path | None,
    clips: Sequence[str],
    dataset: str,
    method: str,
    bits: str,
    execution: str,
    out: Path,
) -> None:
    """Measure clips and write one JSON line a clip and metric.

    Args:
        pred: folder of restored frames, or of the ground truth itself; or a folder of such clips.
        gt: the ground truth likewise.
        fp: the full-precision output likewise; needed by metrics that compare with it.
        clips: names of clips in these folders; empty: every folder in `pred`, and where there is none the folders are one clip's frames.
        dataset: name of the dataset; stands in each line, as `method`, `bits` and `execution` do.
    """
    names = list(clips) or (sorted(one.name for one in pred.iterdir() if one.is_dir()) if pred.is_dir() else [])
    protocol, rows = protocols.read(config.protocol), []
    for name in names or ["."]:
        context = results.Context(
            backbone=config.backbone.name,
            method=method,
            bits=bits,
            execution=execution,
            seed=config.seed,
            dataset=dataset,
            clip=(pred / name).name,
            limit=config.datasets[dataset].limit if dataset in config.datasets else None,
            provenance=head(),
        )
        full_precision = read_frames_TCHW(fp / name) if fp is not None else None
        rows += results.measure_clip(
            read_frames_TCHW(pred / name), read_frames_TCHW(gt / name), full_precision, config.metrics, context, protocol
        )
    results.write(out, rows)
