"""Structural similarity."""

from __future__ import annotations

from torch import Tensor

from metrics._frames import MetricError, check_pair, frame_by_frame, name_for_colour, pyiqa_metric
from qvsr.registry import METRICS

PYIQA = {"rgb": "ssimc", "y": "ssim"}
WINDOW = 11  # of the Gaussian, pixels; only windows that lie inside the frame count


@METRICS.add("ssim", unit="", higher_is_better=True, needs="gt", frames="each", digits=4, licence="PolyForm-Noncommercial-1.0.0")
def ssim(pred_TCHW: Tensor, target_TCHW: Tensor, *, colour: str = "rgb", crop: int = 0) -> Tensor:
    """Structural similarity of each frame (Wang et al., IEEE TIP 13(4), 2004), by pyiqa in float64.

    Gaussian window 11x11, sigma 1.5, K = (0.01, 0.03), values rounded to 0..255, valid region only, no downsampling,
    negative contrast-structure terms set to 0.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1].
        target_TCHW: ground truth, same shape and range.
        colour: "rgb": mean over the three channels (pyiqa's ``ssimc``); "y": on the rounded luma 0.299 R + 0.587 G +
            0.114 B, which is what pyiqa's ``ssim`` and therefore most recent papers compute.
        crop: pixels left out at every border.
    Returns:
        ssim_T in [0, 1], float64; 1 where a frame is reproduced exactly.
    Raises:
        MetricError: shapes differ, NaN, values outside [0, 1], frames smaller than the window.

    >>> import torch
    >>> x = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    >>> ssim(x, x)
    tensor([1.], dtype=torch.float64)
    """
    check_pair("ssim", pred_TCHW, target_TCHW)
    height, width = pred_TCHW.shape[-2:]
    if min(height, width) - 2 * crop < WINDOW:
        raise MetricError(f"ssim: frames are {height}x{width} with crop {crop}, the window needs {WINDOW}x{WINDOW} pixels")
    metric = pyiqa_metric(name_for_colour("ssim", colour, PYIQA), (("crop_border", crop),))
    return frame_by_frame(metric, pred_TCHW, target_TCHW)
