"""Temporal difference: how far the prediction moves otherwise than the ground truth."""

from __future__ import annotations

import torch
from torch import Tensor

from metrics._dis import SMALLEST, check_preset, dis_flow, grey
from metrics._frames import MetricError, check_pair, check_size
from qvsr.registry import METRICS


@METRICS.add("tof", unit="px", higher_is_better=False, needs="gt", frames="pairs", digits=3, licence="Apache-2.0")
def tof(pred_TCHW: Tensor, target_TCHW: Tensor, *, preset: str = "medium") -> Tensor:
    """Difference of the motion of each pair of adjacent frames: mean end-point error between the flows of prediction and ground truth.

    After tOF of TecoGAN (Chu et al., arXiv 1811.09393), which takes OpenCV's flow by Farneback; here it is DIS, at full resolution, on the
    rounded luma 0.299 R + 0.587 G + 0.114 B, every pixel counted. Values with another flow do not compare, nor with tables that print
    it times 10.

    Blind to any error that does not move: a wrong colour, a blur that stays. In flat regions the flow is a guess, so
    noise there counts.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1], at least two of at least 32x32 pixels.
        target_TCHW: ground truth, same shape and range.
        preset: of OpenCV's DIS, from fast to accurate: ultrafast, fast, medium.
    Returns:
        difference_T >= 0 of T - 1 pairs in pixels, float64; 0 for the ground truth itself, and between constant frames, whose flow is 0.
    Raises:
        MetricError: one frame only, shapes differ, NaN, values outside [0, 1], frames below 32x32, an unknown preset.

    >>> x = torch.rand(3, 3, 32, 32)
    >>> tof(x, x)
    tensor([0., 0.], dtype=torch.float64)
    """
    check_pair("tof", pred_TCHW, target_TCHW)
    check_preset("tof", preset)
    check_size("tof", pred_TCHW, SMALLEST, "for optical flow")
    if pred_TCHW.shape[0] < 2:
        raise MetricError("tof: 1 frame; a pair of frames is needed")
    values, following = [], (grey(pred_TCHW[0]), grey(target_TCHW[0]))
    for pred_CHW, target_CHW in zip(pred_TCHW[1:], target_TCHW[1:], strict=True):
        this, following = following, (grey(pred_CHW), grey(target_CHW))
        pred_flow_2HW, target_flow_2HW = (dis_flow(first, second, preset) for first, second in zip(this, following, strict=True))
        values.append((pred_flow_2HW - target_flow_2HW).double().norm(dim=0).mean().item())
    return torch.tensor(values, dtype=torch.float64)
