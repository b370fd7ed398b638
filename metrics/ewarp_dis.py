"""Warping error (E*warp) with the optical flow of OpenCV's DIS: no weights needed."""

from __future__ import annotations

from torch import Tensor

from metrics._dis import SMALLEST, check_preset, dis_flow, grey
from metrics._frames import check_frames
from metrics._warp import check_scaled_size, warping_errors
from qvsr.registry import METRICS


@METRICS.add("ewarp_dis", unit="1e-3", higher_is_better=False, needs="none", frames="pairs", digits=2, licence="Apache-2.0")
def ewarp_dis(pred_TCHW: Tensor, *, preset: str = "medium", scale: float = 0.5, channels: str = "sum", unseen: str = "refuse") -> Tensor:
    """Warping error of each pair of adjacent frames times 1000, occlusions left out.

    :func:`metrics.ewarp.ewarp`, only the flow is another: DIS on the rounded luma of the same shrunken frames. Blurred frames score well:
    read it beside a measure of fidelity. Values of E*warp with another flow (RAFT) are not comparable.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1], at least two; sides of at least 32 pixels once shrunken.
        preset: of OpenCV's DIS, from fast to accurate: ultrafast, fast, medium.
        scale, channels, unseen: see :func:`metrics.ewarp.ewarp`.
    Returns:
        error_T of T - 1 pairs, float64, in 1e-3; 0 where nothing moves and nothing changes (constant frames among them).
    Raises:
        MetricError: one frame only, frames too small, NaN, an unknown option, or no pixel visible in both frames of a pair.

    >>> import torch
    >>> ewarp_dis(torch.rand(1, 3, 64, 64).repeat(3, 1, 1, 1))
    tensor([0., 0.], dtype=torch.float64)
    """
    check_frames("ewarp_dis", pred_TCHW)
    check_preset("ewarp_dis", preset)
    check_scaled_size("ewarp_dis", pred_TCHW, scale, SMALLEST)

    def flows(this_CHW: Tensor, following_CHW: Tensor) -> tuple[Tensor, Tensor]:
        this, following = grey(this_CHW), grey(following_CHW)
        return dis_flow(this, following, preset), dis_flow(following, this, preset)

    return warping_errors("ewarp_dis", pred_TCHW, flows, scale=scale, channels=channels, unseen=unseen)
