"""Warping error between adjacent frames: what every E*warp shares, whatever its optical flow.

Flows are in pixels, channel 0 is x (to the right), channel 1 is y (down). Everything is in the arithmetic of its input;
thresholds are those of the released evaluation of QuantVSR and DOVE (after Ruder et al., arXiv 1604.08610).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics._frames import MetricError

CHANNELS = {"sum": 1, "mean": 3}  # what the sum over R, G, B is divided by
UNSEEN = ("zero", "refuse")


def shrink_and_pad(frames_TCHW: Tensor, scale: float = 0.5, multiple: int = 8) -> Tensor:
    """Bilinear reduction (no antialiasing, size rounded down, by exactly `scale` also then), then replicated borders up to a multiple.

    >>> shrink_and_pad(torch.zeros(1, 3, 253, 262)).shape
    torch.Size([1, 3, 128, 136])
    """
    if scale != 1:
        frames_TCHW = F.interpolate(frames_TCHW, scale_factor=scale, mode="bilinear", align_corners=False, recompute_scale_factor=False)
    down, right = ((-size) % multiple for size in frames_TCHW.shape[-2:])
    return F.pad(frames_TCHW, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")


def warp(image_CHW: Tensor, flow_2HW: Tensor) -> Tensor:
    """`image` sampled at (x, y) + flow: bilinear, coordinates outside are clamped to the border.

    Args:
        image_CHW: any channels.
        flow_2HW: displacement in pixels.
    Returns:
        image on the flow's grid, CHW.

    >>> warp(torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[[0.5, 0.5, 0.5]], [[0.0, 0.0, 0.0]]]))
    tensor([[[1.5000, 3.0000, 4.0000]]])
    """
    _, height, width = image_CHW.shape
    y = torch.arange(height, dtype=flow_2HW.dtype, device=flow_2HW.device).view(-1, 1) + flow_2HW[1]
    x = torch.arange(width, dtype=flow_2HW.dtype, device=flow_2HW.device).view(1, -1) + flow_2HW[0]
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    left, top = x.floor().clamp(max=max(width - 2, 0)), y.floor().clamp(max=max(height - 2, 0))
    right_weight, bottom_weight = x - left, y - top
    column, row = left.long(), top.long()
    next_column, next_row = (column + 1).clamp(max=width - 1), (row + 1).clamp(max=height - 1)
    upper = image_CHW[:, row, column] * (1 - right_weight) + image_CHW[:, row, next_column] * right_weight
    lower = image_CHW[:, next_row, column] * (1 - right_weight) + image_CHW[:, next_row, next_column] * right_weight
    return upper * (1 - bottom_weight) + lower * bottom_weight


def inconsistent(flow_forward_2HW: Tensor, flow_backward_warped_2HW: Tensor) -> Tensor:
    """Where going forth and back does not return: \\|f + b\\|^2 > 0.01 (\\|f\\|^2 + \\|b\\|^2) + 0.5.

    Args:
        flow_forward_2HW: from this frame to the next.
        flow_backward_warped_2HW: from the next frame to this one, sampled where the forward flow leads.
    Returns:
        bool HW.
    """
    f, b = flow_forward_2HW, flow_backward_warped_2HW
    return (f + b).square().sum(0) > 0.01 * (f.square().sum(0) + b.square().sum(0)) + 0.5


def motion_boundary(flow_forward_2HW: Tensor) -> Tensor:
    """Where the flow jumps: \\|d_x f\\|^2 + \\|d_y f\\|^2 > 0.01 \\|f\\|^2 + 0.002, by forward differences, 0 at the last column and row.

    Returns:
        bool HW.
    """
    f = flow_forward_2HW
    d_x = F.pad(f[:, :, 1:] - f[:, :, :-1], (0, 1))
    d_y = F.pad(f[:, 1:] - f[:, :-1], (0, 0, 0, 1))
    return d_x.square().sum(0) + d_y.square().sum(0) > 0.01 * f.square().sum(0) + 0.002


def occlusion(flow_forward_2HW: Tensor, flow_backward_2HW: Tensor) -> Tensor:
    """Pixels of this frame that are left out: inconsistent flows or a motion boundary of the forward flow. bool HW."""
    flow_backward_warped = warp(flow_backward_2HW, flow_forward_2HW)
    return inconsistent(flow_forward_2HW, flow_backward_warped) | motion_boundary(flow_forward_2HW)


def warping_error(image1_CHW: Tensor, image2_CHW: Tensor, flow_forward_2HW: Tensor, flow_backward_2HW: Tensor) -> tuple[float, int]:
    """Squared difference between a frame and its warped neighbour, over what is visible in both.

    Args:
        image1_CHW, image2_CHW: two adjacent frames in [0, 1].
        flow_forward_2HW: from image1 to image2; flow_backward_2HW: from image2 to image1.
    Returns:
        the sum over channels and visible pixels divided by the number of visible **pixels** (so C times a mean over
        channels), and that number. No pixel visible: (0, 0), and the caller decides what that means.
    """
    visible = ~occlusion(flow_forward_2HW, flow_backward_2HW)
    count = int(visible.sum())
    if count == 0:
        return 0.0, 0
    difference = (warp(image2_CHW, flow_forward_2HW) - image1_CHW) * visible
    return float(difference.double().square().sum() / count), count


def check_scaled_size(metric: str, frames_TCHW: Tensor, scale: float, smallest: int) -> None:
    """Refuse a scale that does not shrink, and frames that are too small once shrunken."""
    if not 0 < scale <= 1:
        raise MetricError(f"{metric}: scale is {scale:g}; above 0, at most 1 is needed")
    height, width = frames_TCHW.shape[-2:]
    if int(min(height, width) * scale) < smallest:
        needed = math.ceil(smallest / scale)
        raise MetricError(f"{metric}: frames are {height}x{width}; at least {needed}x{needed} is needed for optical flow")


def warping_errors(
    metric: str,
    frames_TCHW: Tensor,
    flows: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    scale: float,
    channels: str,
    unseen: str,
) -> Tensor:
    """E*warp of each pair of adjacent frames, times 1000, for any flow; two frames at a time, so memory does not grow with the clip.

    Args:
        frames_TCHW: in [0, 1].
        flows: forward and backward flow (2HW) of two frames (CHW in [0, 1], shrunken and padded).
        scale, channels, unseen: see :func:`metrics.ewarp.ewarp`.
    Returns:
        error_T of T - 1 pairs, float64, in 1e-3.
    """
    for option, value, known in (("channels", channels, tuple(CHANNELS)), ("unseen", unseen, UNSEEN)):
        if value not in known:
            raise MetricError(f"{metric}: {option} is {value!r}; known: {', '.join(known)}")
    if len(frames_TCHW) < 2:
        raise MetricError(f"{metric}: 1 frame; a pair of frames is needed")
    errors = []
    following = shrink_and_pad(frames_TCHW[:1].float(), scale)[0]
    for t in range(len(frames_TCHW) - 1):
        this, following = following, shrink_and_pad(frames_TCHW[t + 1 : t + 2].float(), scale)[0]
        error, visible = warping_error(this, following, *flows(this, following))
        if visible == 0 and unseen == "refuse":
            raise MetricError(f"{metric}: no pixel of frame {t} is found again in frame {t + 1}; is there a scene cut in this clip?")
        errors.append(1000 * error / CHANNELS[channels])
    return torch.tensor(errors, dtype=torch.float64)
