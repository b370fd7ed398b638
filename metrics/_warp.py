"""Warping error between adjacent frames: what every E*warp shares, whatever its optical flow.

Flows are in pixels, channel 0 is x (to the right), channel 1 is y (down). Everything is in the arithmetic of its input;
thresholds are those of the released evaluation of QuantVSR and DOVE (after Ruder et al., arXiv 1604.08610).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def halve_and_pad(frames_TCHW: Tensor, multiple: int = 8) -> Tensor:
    """Bilinear reduction by exactly 2 (no antialiasing, size rounded down), then replicated borders up to a multiple.

    >>> halve_and_pad(torch.zeros(1, 3, 253, 262)).shape
    torch.Size([1, 3, 128, 136])
    """
    half = F.interpolate(frames_TCHW, scale_factor=0.5, mode="bilinear", align_corners=False, recompute_scale_factor=False)
    down, right = ((-size) % multiple for size in half.shape[-2:])
    return F.pad(half, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")


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
    y = torch.arange(height, dtype=flow_2HW.dtype).view(-1, 1) + flow_2HW[1]
    x = torch.arange(width, dtype=flow_2HW.dtype).view(1, -1) + flow_2HW[0]
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
