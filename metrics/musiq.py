"""MUSIQ, a multi-scale image quality transformer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from metrics._frames import check_frames
from metrics._pyiqa import each_frame, fill, network, read_state
from qvsr.registry import METRICS


def build(weights: Mapping[str, Path]) -> nn.Module:
    from pyiqa.archs.musiq_arch import MUSIQ

    built = MUSIQ(pretrained=False)
    file = weights["musiq-koniq"]
    fill("musiq", built, read_state("musiq", file), file.name)
    return built


@METRICS.add(
    "musiq",
    unit="",
    higher_is_better=True,
    needs="none",
    frames="each",
    digits=2,
    licence="PolyForm-Noncommercial-1.0.0",
    weights=("musiq-koniq",),
)
def musiq(pred_TCHW: Tensor, *, weights: Mapping[str, Path]) -> Tensor:
    """MUSIQ of each frame (Ke et al., arXiv 2108.05997), trained on KonIQ-10k, by pyiqa.

    A transformer on patches of 32 pixels of the frame at its own size and at 384 and 224 pixels along the longer side.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1], at their own size.
        weights: "musiq-koniq", pyiqa's conversion of the authors' weights.
    Returns:
        musiq_T, float64, about 0 to 100 (mean opinion score); a constant frame has a value too.
    Raises:
        MetricError: NaN, values outside [0, 1], a damaged file of weights.
    """
    check_frames("musiq", pred_TCHW)
    return each_frame(network(build, weights), pred_TCHW)
