"""Peak signal-to-noise ratio."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from metrics._frames import check_pair, check_size, frame_by_frame, planes
from qvsr.registry import METRICS


@METRICS.add("psnr", unit="dB", higher_is_better=True, needs="gt", frames="each", digits=2, licence="Apache-2.0", version="1")
def psnr(pred_TCHW: Tensor, target_TCHW: Tensor, *, colour: str = "rgb", crop: int = 0, eps: float = 0.0) -> Tensor:
    """Peak signal-to-noise ratio of each frame, 10 log10(1 / (mse + eps)), in float64.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1].
        target_TCHW: ground truth, same shape and range.
        colour: "rgb": one error over all three channels; "y": the luma 0.299 R + 0.587 G + 0.114 B, not rounded;
            "y_limited": 0.257 R + 0.504 G + 0.098 B + 0.0625, not rounded (an option of QuantVSR's evaluation script).
        crop: pixels left out at every border.
        eps: added to the mean squared error. 1e-8, pyiqa's default and so that of most recent papers, caps the value at 80 dB and
            takes 0.014 dB from 55 dB, where the difference between 8-bit methods lies; 0 adds nothing.
    Returns:
        psnr_T in dB, float64; inf where a frame is reproduced exactly (if eps is 0). Constant frames are like any others.
    Raises:
        MetricError: shapes differ, NaN, values outside [0, 1], no pixel left by the crop, an unknown colour.

    >>> import torch
    >>> psnr(torch.full((2, 3, 8, 8), 0.5), torch.full((2, 3, 8, 8), 0.6)).round(decimals=3)
    tensor([20., 20.], dtype=torch.float64)
    """
    check_pair("psnr", pred_TCHW, target_TCHW)
    check_size("psnr", pred_TCHW, 1, "for an error", crop)

    def of_frame(pred_1CHW: Tensor, target_1CHW: Tensor) -> float:
        difference = (planes("psnr", pred_1CHW, colour, crop) - planes("psnr", target_1CHW, colour, crop)).ravel()
        error = float(difference @ difference) / difference.size + eps
        return -10 * float(np.log10(error)) if error else float("inf")

    return frame_by_frame(of_frame, pred_TCHW, target_TCHW)
