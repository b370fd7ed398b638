"""Structural similarity."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from metrics._frames import check_pair, check_size, frame_by_frame, planes
from metrics._ssim import WINDOW, structural_similarity
from qvsr.registry import METRICS


@METRICS.add("ssim", unit="", higher_is_better=True, needs="gt", frames="each", digits=4, licence="Apache-2.0", version="1")
def ssim(pred_TCHW: Tensor, target_TCHW: Tensor, *, colour: str = "rgb", crop: int = 0) -> Tensor:
    """Structural similarity of each frame (Wang et al., IEEE TIP 13(4), 2004), in float64.

    Gaussian window 11x11, sigma 1.5, K = (0.01, 0.03), values rounded to 0..255, valid region only, no downsampling,
    negative contrast-structure terms set to 0. pyiqa's values differ by up to 1e-6: it keeps the window in float32.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1].
        target_TCHW: ground truth, same shape and range.
        colour: "rgb": mean over the three channels (pyiqa's ``ssimc``); "y": on the rounded luma 0.299 R + 0.587 G +
            0.114 B, which is what pyiqa's ``ssim`` and therefore most recent papers compute; "y_limited": on the rounded
            0.257 R + 0.504 G + 0.098 B + 0.0625 (an option of QuantVSR's evaluation script). A luma half-way between two
            integers may be rounded otherwise by pyiqa, which adds in float32: up to 2e-5 of a frame's value.
        crop: pixels left out at every border.
    Returns:
        ssim_T in [0, 1], float64; 1 where a frame is reproduced exactly. Two constant frames a and b have no structure to
        compare: (2ab + C1) / (a^2 + b^2 + C1).
    Raises:
        MetricError: shapes differ, NaN, values outside [0, 1], frames smaller than the window, an unknown colour.

    >>> import torch
    >>> x = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    >>> ssim(x, x)
    tensor([1.], dtype=torch.float64)
    """
    check_pair("ssim", pred_TCHW, target_TCHW)
    check_size("ssim", pred_TCHW, WINDOW, "for the window", crop)

    def of_frame(pred_1CHW: Tensor, target_1CHW: Tensor) -> float:
        pred_CHW, target_CHW = (np.rint(255 * planes("ssim", frame, colour, crop)) for frame in (pred_1CHW, target_1CHW))
        return sum(structural_similarity(a, b, 255) for a, b in zip(pred_CHW, target_CHW, strict=True)) / len(pred_CHW)

    return frame_by_frame(of_frame, pred_TCHW, target_TCHW)
