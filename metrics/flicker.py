"""Flicker: how much the error changes from frame to frame."""

from __future__ import annotations

import torch
from torch import Tensor

from metrics._frames import MetricError, check_pair
from qvsr.registry import METRICS


@METRICS.add("flicker", unit="1/255", higher_is_better=False, needs="gt", frames="pairs", digits=2, licence="Apache-2.0", version="1")
def flicker(pred_TCHW: Tensor, target_TCHW: Tensor) -> Tensor:
    """Mean absolute change of the error between adjacent frames, |(p' - g') - (p - g)| over pixels and channels, in grey levels of 255.

    The same as the difference between the frame-to-frame changes of both clips, |(p' - p) - (g' - g)|: the first-order temporal difference
    of video matting (dtSSD, Erofeev et al., BMVC 2015), here with absolute values. No flow and no weights.

    Blind to any error that stays where it is, however large, such as a constant tint. An error that moves along with the picture, as blur
    does, counts wherever something moves, though nobody sees it flicker: compare it between methods, not between clips.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1], at least two.
        target_TCHW: ground truth, same shape and range.
    Returns:
        change_T in [0, 510] of T - 1 pairs, float64; 0 for the ground truth itself and for an error that stays. Constant frames and frames
        of any size are like any others.
    Raises:
        MetricError: one frame only, shapes differ, NaN, values outside [0, 1].

    >>> dark, bright = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.2)
    >>> flicker(bright, dark), flicker(torch.cat([dark[:1], bright[:1]]), dark).round(decimals=3)
    (tensor([0.], dtype=torch.float64), tensor([51.], dtype=torch.float64))
    """
    check_pair("flicker", pred_TCHW, target_TCHW)
    if pred_TCHW.shape[0] < 2:
        raise MetricError("flicker: 1 frame; a pair of frames is needed")
    values, following = [], pred_TCHW[0].double() - target_TCHW[0].double()
    for pred_CHW, target_CHW in zip(pred_TCHW[1:], target_TCHW[1:], strict=True):
        this, following = following, pred_CHW.double() - target_CHW.double()
        values.append(255 * (following - this).abs().mean().item())
    return torch.tensor(values, dtype=torch.float64)
