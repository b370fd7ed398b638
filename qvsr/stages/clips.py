"""One clip from its source: ground truth and degraded frames."""

from __future__ import annotations

from pathlib import Path

from qvsr.config import Config
from qvsr.data.datasets import build_clip


def run(config: Config, dataset: str, clip: str, gt: Path, lq: Path) -> None:
    """Cut a clip from its source and degrade it.

    Args:
        dataset: name of a dataset in the settings.
        clip: name of one of its clips.
        gt, lq: clip folders to write.
    """
    build_clip(config, dataset, clip, gt, lq)
