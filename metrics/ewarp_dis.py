"""Warping error (E*warp) with the optical flow of OpenCV's DIS: no weights needed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metrics._frames import MetricError, check_frames
from metrics._warp import halve_and_pad, warping_error
from qvsr.registry import METRICS

SMALLEST = 32  # pixels of a side at half resolution: below, DIS of OpenCV 5.0.0 reads outside its pyramid and may crash
PRESETS = ("ultrafast", "fast", "medium")


def dis_flow(first_HW: np.ndarray, second_HW: np.ndarray, preset: str = "medium") -> Tensor:
    """Dense optical flow from `first` to `second` (Kroeger et al., arXiv 1603.03590), the same on every call.

    Args:
        first_HW, second_HW: uint8 grey images with sides of at least 32 pixels.
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


def grey(frames_TCHW: Tensor) -> np.ndarray:
    """Luma of RGB frames in [0, 1] as THW uint8, rounded."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    luma = torch.einsum("tchw,c->thw", frames_TCHW.double(), weights)
    return (luma * 255).round().clamp(0, 255).to(torch.uint8).numpy()


@METRICS.add("ewarp_dis", unit="1e-3", higher_is_better=False, needs="none", frames="pairs", digits=2, licence="Apache-2.0")
def ewarp_dis(pred_TCHW: Tensor, *, preset: str = "medium") -> Tensor:
    """Warping error of each pair of adjacent frames times 1000, occlusions left out.

    The definition of the released E*warp, only the flow is another: frames at half resolution (bilinear), borders replicated to
    multiples of 8, forward and backward flow of the prediction's own frames, the next frame warped to this one, the squared
    difference summed over the three channels and divided by the number of pixels visible in both. Blurred frames score well:
    read it beside a measure of fidelity. Values of E*warp with another flow (RAFT) are not comparable.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1], at least two of at least 64x64 pixels.
        preset: of OpenCV's DIS, from fast to accurate: ultrafast, fast, medium.
    Returns:
        error_T of T - 1 pairs, float64, in 1e-3; 0 where nothing moves and nothing changes.
    Raises:
        MetricError: one frame only, frames too small, NaN, or no pixel visible in both frames of a pair (a scene cut);
            the released script counts such a pair as a perfect 0.

    >>> ewarp_dis(torch.rand(1, 3, 64, 64).repeat(3, 1, 1, 1))
    tensor([0., 0.], dtype=torch.float64)
    """
    check_frames("ewarp_dis", pred_TCHW)
    if preset not in PRESETS:
        raise MetricError(f"ewarp_dis: no preset {preset!r}; known: {', '.join(PRESETS)}")
    frames, _, height, width = pred_TCHW.shape
    if frames < 2:
        raise MetricError("ewarp_dis: 1 frame; a pair of frames is needed")
    if min(height, width) < 2 * SMALLEST:
        raise MetricError(f"ewarp_dis: frames are {height}x{width}; at least {2 * SMALLEST}x{2 * SMALLEST} is needed for optical flow")
    errors = []
    following = halve_and_pad(pred_TCHW[:1].float())
    for t in range(frames - 1):  # two frames at a time: memory does not grow with the clip
        this, following = following, halve_and_pad(pred_TCHW[t + 1 : t + 2].float())
        this_grey, following_grey = grey(this)[0], grey(following)[0]
        forward, backward = dis_flow(this_grey, following_grey, preset), dis_flow(following_grey, this_grey, preset)
        error, visible = warping_error(this[0], following[0], forward, backward)
        if visible == 0:
            raise MetricError(f"ewarp_dis: no pixel of frame {t} is found again in frame {t + 1}; is there a scene cut in this clip?")
        errors.append(1000 * error)
    return torch.tensor(errors, dtype=torch.float64)
