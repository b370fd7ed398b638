"""Natural image quality evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from metrics._frames import MetricError, check_frames
from metrics._pyiqa import check_size, check_values, each_frame, network
from qvsr.registry import METRICS

BLOCK = 96
COLOURS = {"yiq": "yiq", "ycbcr": "ycbcr"}


class Niqe(nn.Module):
    """pyiqa's NIQE with a model from a file; NaN for a frame whose blocks have no covariance."""

    def __init__(self, weights: Mapping[str, Path], colour: str, crop: int) -> None:
        super().__init__()
        from pyiqa.archs.niqe_arch import NIQE

        file = weights["niqe"]
        try:
            self.network = NIQE(color_space=colour, crop_border=crop, pretrained_model_path=str(file))
        except Exception as error:  # of scipy's reader of MATLAB files, which unpickles nothing; it has several
            raise MetricError(f"niqe: {file.name} cannot be read as the model ({' '.join(str(error).split())}); get it again") from None

    def forward(self, frame: Tensor) -> Tensor:
        try:
            return self.network(frame)
        except torch.linalg.LinAlgError:
            return torch.tensor(torch.nan)


@METRICS.add(
    "niqe",
    unit="",
    higher_is_better=False,
    needs="none",
    frames="each",
    digits=4,
    licence="PolyForm-Noncommercial-1.0.0",
    weights=("niqe",),
)
def niqe(pred_TCHW: Tensor, *, colour: str = "yiq", crop: int = 0, weights: Mapping[str, Path]) -> Tensor:
    """NIQE of each frame (Mittal et al., IEEE Signal Processing Letters 20(3), 2013), by pyiqa.

    The distance between the statistics of the frame's blocks of 96x96 luma pixels, at full and half size, and those of undistorted
    photographs. What does not fill a block (right, bottom) is left out.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1].
        colour: the luma of "yiq" (0.299 R + 0.587 G + 0.114 B, 0 to 255, pyiqa's default) or of "ycbcr" (16 to 235, as MATLAB), rounded.
        crop: pixels left out at every border.
        weights: "niqe", pyiqa's file of the model.
    Returns:
        niqe_T >= 0, float64.
    Raises:
        MetricError: NaN, values outside [0, 1], fewer than two blocks (a covariance needs two: 96x192 pixels), a frame without two
            blocks that vary, such as a constant one, a damaged file of weights.
    """
    check_frames("niqe", pred_TCHW)
    if colour not in COLOURS:
        raise MetricError(f"niqe: no colour {colour!r}; known: {', '.join(COLOURS)}")
    check_size("niqe", pred_TCHW, BLOCK + 2 * crop, BLOCK + 2 * crop)
    height, width = (size - 2 * crop for size in pred_TCHW.shape[-2:])
    if (height // BLOCK) * (width // BLOCK) < 2:
        raise MetricError(f"niqe: frames are {height}x{width} without their border, one block of {BLOCK}x{BLOCK}; two are needed")
    return check_values("niqe", each_frame(network(Niqe, weights, colour=colour, crop=crop), pred_TCHW), "fewer than two blocks vary")
