"""Gradient magnitude similarity deviation."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from metrics._frames import Array, check_pair, check_size, frame_by_frame, planes
from qvsr.registry import METRICS

STABILITY = 170.0  # the paper's c, for values of 0..255


def half(luma_HW: Array) -> Array:
    """Means of 2x2 pixels; an odd last row or column is left out."""
    height, width = (size // 2 * 2 for size in luma_HW.shape)
    even, odd = luma_HW[0:height:2], luma_HW[1:height:2]
    rows = even + odd
    means: Array = (rows[:, 0:width:2] + rows[:, 1:width:2]) / 4
    return means


def gradient_magnitude(image_HW: Array) -> Array:
    """Prewitt gradients, kernels divided by 3, zeros beyond the border."""
    import cv2

    smooth, difference = np.full(3, 1 / 3), np.array([1.0, 0.0, -1.0])
    across = cv2.sepFilter2D(image_HW, cv2.CV_64F, difference, smooth, borderType=cv2.BORDER_CONSTANT)
    down = cv2.sepFilter2D(image_HW, cv2.CV_64F, smooth, difference, borderType=cv2.BORDER_CONSTANT)
    magnitude: Array = np.sqrt(across * across + down * down)
    return magnitude


@METRICS.add("gmsd", unit="", higher_is_better=False, needs="gt", frames="each", digits=4, licence="Apache-2.0", version="1")
def gmsd(pred_TCHW: Tensor, target_TCHW: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation of each frame (Xue et al., arXiv 1308.3052), in float64.

    On the luma 0.299 R + 0.587 G + 0.114 B rounded to 0..255, averaged over 2x2 pixels; Prewitt gradients g with zeros beyond the border; the
    sample standard deviation over the pixels of (2 g1 g2 + 170) / (g1^2 + g2^2 + 170). A luma half-way between two integers may be
    rounded otherwise by packages that add in float32: up to 2e-5 of a frame's value.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1].
        target_TCHW: ground truth, same shape and range.
    Returns:
        gmsd_T >= 0, float64; 0 where a frame is reproduced exactly, and wherever the similarity is the same everywhere. Blind to
        brightness but for the outermost pixels, whose gradient is that to the zeros beyond.
    Raises:
        MetricError: shapes differ, NaN, values outside [0, 1], frames below 4x4.

    >>> import torch
    >>> x = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    >>> gmsd(x, x)
    tensor([0.], dtype=torch.float64)
    """
    check_pair("gmsd", pred_TCHW, target_TCHW)
    check_size("gmsd", pred_TCHW, 4, "for a deviation")

    def of_frame(pred_1CHW: Tensor, target_1CHW: Tensor) -> float:
        g1, g2 = (gradient_magnitude(half(np.rint(255 * planes("gmsd", x, "y")[0]))) for x in (pred_1CHW, target_1CHW))
        similarity = (2 * g1 * g2 + STABILITY) / (g1 * g1 + g2 * g2 + STABILITY)
        return float(similarity.std(ddof=1))

    return frame_by_frame(of_frame, pred_TCHW, target_TCHW)
