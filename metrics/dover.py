"""DOVER, an aesthetic and technical judgement of a video."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from metrics._vsreval import score
from qvsr.registry import METRICS


@METRICS.add(
    "dover",
    unit="",
    higher_is_better=True,
    needs="none",
    frames="clip",
    digits=4,
    licence="LicenseRef-S-Lab-1.0",
    weights=("dover",),
    program="vsreval",
)
def dover(pred: Path, *, protocol: str = "vsreval-v1", seed: int = 0, weights: Mapping[str, Path]) -> float:
    """DOVER's overall score of a clip (Wu et al., arXiv 2211.04894), by the program vsreval; for non-commercial use.

    The fused score 1 / (1 + exp(-x)) of the technical branch (three clips of 32 frames, every second one, 7x7 fragments of 32 pixels)
    and the aesthetic branch (32 frames at 224 pixels); short clips are repeated. What the program does before and beside that:

    - Frames are encoded as H.264 yuv444p, lossless but for the rounding from RGB to YUV (at most one level), and read back.
    - The fragments' places are drawn from a fixed seed, the same for every clip of a size; the authors' script does not seed them, and
      its score moves by 0.004 to 0.007 a clip from run to run.
    - Frames are resized without antialiasing, as DOVER was built.

    Args:
        pred: folder of PNG frames, or a video file (.mp4 .mkv .avi .mov).
        protocol: the program's name of the above.
        seed: fixed in the program.
        weights: "dover", the authors' file.
    Returns:
        the score in [0, 1].
    Raises:
        MissingError: the program is not installed.
        MetricError: it failed, or is another version than 0.1.0.
    """
    return score("dover", pred, weights, protocol, seed)
