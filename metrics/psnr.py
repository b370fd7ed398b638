"""Peak signal-to-noise ratio."""

from __future__ import annotations

from torch import Tensor

from metrics._frames import check_pair, frame_by_frame, name_for_colour, pyiqa_metric
from qvsr.registry import METRICS

PYIQA = {"rgb": "psnr", "y": "psnry"}


@METRICS.add("psnr", unit="dB", higher_is_better=True, needs="gt", frames="each", digits=2, licence="PolyForm-Noncommercial-1.0.0")
def psnr(pred_TCHW: Tensor, target_TCHW: Tensor, *, colour: str = "rgb", crop: int = 0, eps: float = 0.0) -> Tensor:
    """Peak signal-to-noise ratio of each frame, 10 log10(1 / (mse + eps)), by pyiqa in float64.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1].
        target_TCHW: ground truth, same shape and range.
        colour: "rgb": one error over all three channels; "y": the luma 0.299 R + 0.587 G + 0.114 B, not rounded.
        crop: pixels left out at every border.
        eps: added to the mean squared error. pyiqa's own default of 1e-8 caps the value at 80 dB and takes 0.014 dB from
            55 dB, where the difference between 8-bit methods lies; 0 here.
    Returns:
        psnr_T in dB, float64; inf where a frame is reproduced exactly (if eps is 0).
    Raises:
        MetricError: shapes differ, NaN, values outside [0, 1].

    >>> import torch
    >>> psnr(torch.full((2, 3, 8, 8), 0.5), torch.full((2, 3, 8, 8), 0.6)).round(decimals=3)
    tensor([20., 20.], dtype=torch.float64)
    """
    check_pair("psnr", pred_TCHW, target_TCHW)
    metric = pyiqa_metric(name_for_colour("psnr", colour, PYIQA), (("crop_border", crop), ("eps", eps)))
    return frame_by_frame(metric, pred_TCHW.double(), target_TCHW.double())
