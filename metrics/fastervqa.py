"""FasterVQA, a quality score of a video from few fragments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from metrics._vsreval import score
from qvsr.registry import METRICS


@METRICS.add(
    "fastervqa",
    unit="",
    higher_is_better=True,
    needs="none",
    frames="clip",
    digits=4,
    licence="LicenseRef-S-Lab-1.0",
    weights=("fastervqa",),
    program="vsreval",
)
def fastervqa(pred: Path, *, protocol: str = "vsreval-v1", seed: int = 0, weights: Mapping[str, Path]) -> float:
    """FasterVQA's score of a clip (Wu et al., arXiv 2210.05357), by the program vsreval; for non-commercial use.

    32 frames in 8 groups, 7x7 fragments of 32 pixels each. Frames are encoded and fragments are seeded as :func:`metrics.dover.dover`
    says; unseeded, the score moves by 0.009 to 0.031 a clip from run to run.

    Args:
        pred: folder of PNG frames, or a video file (.mp4 .mkv .avi .mov).
        protocol: the program's name of how it prepares clips.
        seed: fixed in the program.
        weights: "fastervqa", the authors' file.
    Returns:
        the score in [0, 1].
    Raises:
        MissingError: the program is not installed.
        MetricError: it failed, or is another version than 0.1.0.
    """
    return score("fastervqa", pred, weights, protocol, seed)
