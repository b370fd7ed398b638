"""Structural similarity of gradients."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metrics._frames import check_pair, check_size, frame_by_frame, planes
from metrics._ssim import WINDOW, structural_similarity
from qvsr.registry import METRICS


def gradient_magnitude(frames_TCHW: Tensor) -> Tensor:
    """Sobel gradient magnitude of the luma, where the 3x3 kernel lies inside the frame.

    The kernel is divided by 4, so that a step of contrast 1 along a row or column has magnitude 1; no
    3x3 patch has more than sqrt(5) / 2 = 1.12.

    Args:
        frames_TCHW: RGB in [0, 1].
    Returns:
        ``(T, 1, H - 2, W - 2)``, float64.
    """
    import cv2

    smooth, difference = np.array([0.25, 0.5, 0.25]), np.array([1.0, 0.0, -1.0])
    magnitudes = []
    for frame_1CHW in frames_TCHW.split(1):
        luma_HW = planes("ssim_gradient", frame_1CHW, "y")[0]
        across = cv2.sepFilter2D(luma_HW, cv2.CV_64F, difference, smooth)[1:-1, 1:-1]
        down = cv2.sepFilter2D(luma_HW, cv2.CV_64F, smooth, difference)[1:-1, 1:-1]
        magnitudes.append(np.sqrt(across * across + down * down)[None])
    return torch.from_numpy(np.stack(magnitudes))


@METRICS.add("ssim_gradient", unit="", higher_is_better=True, needs="gt", frames="each", digits=4, licence="Apache-2.0", version="1")
def ssim_gradient(pred_TCHW: Tensor, target_TCHW: Tensor) -> Tensor:
    """Structural similarity of the gradient magnitudes of each frame, in float64.

    The idea is gradient-based structural similarity (Chen, Yang, Xie, ICIP 2006, doi:10.1109/ICIP.2006.313132): plain SSIM is lenient
    towards blur, the same comparison of gradients is not. G-SSIM itself compares luminance on the images, contrast and structure on their
    gradients; here, the simplified form, all three terms are compared on the gradients, as the usual SSIM of :func:`gradient_magnitude` of
    the luma 0.299 R + 0.587 G + 0.114 B:
    Gaussian window 11x11, sigma 1.5, K = (0.01, 0.03), data range 1 (the magnitude of a step of full contrast), valid region only, no
    downsampling, negative contrast-structure terms set to 0, nothing rounded.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1].
        target_TCHW: ground truth, same shape and range.
    Returns:
        ssim_T in [0, 1], float64; 1 where a frame is reproduced exactly, or up to a constant brightness (so for any two constant frames).
    Raises:
        MetricError: shapes differ, NaN, values outside [0, 1], frames smaller than 13x13.

    >>> x = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    >>> ssim_gradient(x, x)
    tensor([1.], dtype=torch.float64)
    """
    check_pair("ssim_gradient", pred_TCHW, target_TCHW)
    check_size("ssim_gradient", pred_TCHW, WINDOW + 2, "for the window on gradients of 3x3 pixels")

    def of_frame(pred_1CHW: Tensor, target_1CHW: Tensor) -> float:
        first, second = (gradient_magnitude(frame_1CHW)[0, 0].numpy() for frame_1CHW in (pred_1CHW, target_1CHW))
        return structural_similarity(first, second, 1.0)

    return frame_by_frame(of_frame, pred_TCHW, target_TCHW)
