"""Optical flow by OpenCV's DIS, for metrics that need a flow and no weights."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metrics._frames import MetricError, luma

SMALLEST = 32  # pixels of a side: below, DIS of OpenCV 5.0.0 reads outside its pyramid and may crash
PRESETS = ("ultrafast", "fast", "medium")
Grey = NDArray[np.uint8]


def check_preset(metric: str, preset: str) -> None:
    """Refuse a preset that DIS does not have."""
    if preset not in PRESETS:
        raise MetricError(f"{metric}: no preset {preset!r}; known: {', '.join(PRESETS)}")


def grey(frame_CHW: Tensor) -> Grey:
    """Luma of an RGB frame in [0, 1] as HW uint8, rounded."""
    rounded: Grey = np.rint(255 * luma(frame_CHW.cpu().double().numpy())).clip(0, 255).astype(np.uint8)
    return rounded


def dis_flow(first_HW: Grey, second_HW: Grey, preset: str = "medium") -> Tensor:
    """Dense optical flow from `first` to `second` (Kroeger et al., arXiv 1603.03590), the same on every call.

    Args:
        first_HW, second_HW: grey images with sides of at least 32 pixels.
    Returns:
        flow_2HW in pixels, channel 0 is x.
    """
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the stripes of several threads meet differently
    try:
        # A new object each time: an old one keeps buffers, and its result would depend on what came before.
        flow_HW2 = cv2.DISOpticalFlow_create(PRESETS.index(preset)).calc(first_HW, second_HW, None)
    finally:
        cv2.setNumThreads(threads)
    return torch.from_numpy(flow_HW2).permute(2, 0, 1)
