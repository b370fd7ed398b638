"""Gradient magnitude similarity deviation."""

from __future__ import annotations

from torch import Tensor

from metrics._frames import MetricError, check_pair, frame_by_frame, pyiqa_metric
from qvsr.registry import METRICS


@METRICS.add("gmsd", unit="", higher_is_better=False, needs="gt", frames="each", digits=4, licence="PolyForm-Noncommercial-1.0.0")
def gmsd(pred_TCHW: Tensor, target_TCHW: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation of each frame (Xue et al., arXiv 1308.3052), by pyiqa.

    On the luma rounded to 0..255, averaged over 2x2 pixels; Prewitt gradients g; the sample standard deviation over the
    pixels of (2 g1 g2 + 170) / (g1^2 + g2^2 + 170).

    Args:
        pred_TCHW: restored frames, RGB in [0, 1].
        target_TCHW: ground truth, same shape and range.
    Returns:
        gmsd_T >= 0, float64; 0 where a frame is reproduced exactly, and also where the similarity is the same everywhere
        (two constant frames): the measure is blind to brightness.
    Raises:
        MetricError: shapes differ, NaN, values outside [0, 1], frames below 4x4.

    >>> import torch
    >>> x = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    >>> gmsd(x, x)
    tensor([0.], dtype=torch.float64)
    """
    check_pair("gmsd", pred_TCHW, target_TCHW)
    if min(pred_TCHW.shape[-2:]) < 4:
        raise MetricError(f"gmsd: frames are {pred_TCHW.shape[-2]}x{pred_TCHW.shape[-1]}, at least 4x4 is needed")
    return frame_by_frame(pyiqa_metric("gmsd"), pred_TCHW, target_TCHW)
