"""Warping error (E*warp) with the optical flow of RAFT."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metrics._frames import MetricError, check_frames
from metrics._warp import check_scaled_size, warping_errors
from qvsr.registry import METRICS

ASSET = "raft-things"
IMAGES = {"0-1": 2 / 255, "0-255": 2.0}  # what frames in [0, 1] are multiplied by before 1 is taken off
SMALLEST = 128  # pixels of a side, for the coarsest of four levels of correlation at an eighth of the resolution


@functools.lru_cache(maxsize=1)  # chunks of a clip, and clips, come one by one
def _network(path: Path, changed_ns: int) -> nn.Module:
    """RAFT from a file of weights; `changed_ns`, the file's time, makes it be read again when it is replaced."""
    from qvsr.models.flow import load_raft  # with torchvision, heavy

    return load_raft(path)


@METRICS.add(
    "ewarp",
    unit="1e-3",
    higher_is_better=False,
    needs="none",
    frames="pairs",
    digits=2,
    licence="BSD-3-Clause",
    weights=("raft-things",),  # a literal: it is read without importing this file
)
def ewarp(
    pred_TCHW: Tensor,
    *,
    images: str = "0-255",
    scale: float = 0.5,
    channels: str = "sum",
    unseen: str = "refuse",
    updates: int = 20,
    weights: Mapping[str, Path],
) -> Tensor:
    """Warping error of each pair of adjacent frames times 1000, occlusions left out: E*warp as QuantVSR and DOVE report it.

    Frames shrunken (bilinear, no antialiasing, sizes rounded down), borders replicated to multiples of 8, forward and backward flow of the
    prediction's own frames by torchvision's RAFT (large) with the published weights for FlyingThings3D (arXiv 2003.12039), the next frame
    warped to this one, squared differences over the pixels visible in both, means over pairs. A pixel is left out where the flows do not
    cancel or the forward flow jumps (arXiv 1604.08610). No ground truth: blurred frames score well, so read it beside a measure of fidelity.

    Shrunken frames below 128 pixels a side are too small for the coarsest level of RAFT's correlations; they are extended by replicated
    borders for the flow alone, which is then cut back.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1], at least two; sides of at least 8 pixels once shrunken.
        images: range of what RAFT, which divides by 255, is fed with. "0-255" is what it was trained with; "0-1" is what the released
            script does: the network sees values in [-1, -0.992], an almost constant picture, and its flows say little.
        scale: of height and width before anything is computed; 0.5 in the released script.
        channels: "sum" over R, G, B divided by the number of visible pixels, as in the released script; "mean" is a third of it.
        unseen: what a pair without any visible pixel (a scene cut) gives: "zero", a perfect score, as in the released script; or "refuse".
        updates: iterations of RAFT.
        weights: path of "raft-things": the published .pth, or .safetensors.
    Returns:
        error_T of T - 1 pairs, float64, in 1e-3; 0 where nothing moves and nothing changes, and for constant frames.
    Raises:
        MetricError: one frame only, frames too small, NaN, an unknown option, no pixel visible in both frames of a pair.
        qvsr.models.flow.FlowError: a file that does not hold RAFT.
    """
    check_frames("ewarp", pred_TCHW)
    if images not in IMAGES:
        raise MetricError(f"ewarp: no range of images {images!r}; known: {', '.join(IMAGES)}")
    if updates < 1:
        raise MetricError(f"ewarp: updates is {updates}; at least 1 is needed")
    check_scaled_size("ewarp", pred_TCHW, scale, 8)
    path = Path(weights[ASSET])
    if not path.is_file():
        raise MetricError(f"ewarp: no weights at {path}; get them with: python -m qvsr assets fetch {ASSET}")
    network = _network(path, path.stat().st_mtime_ns).to(pred_TCHW.device)

    @torch.no_grad()
    def flows(this_CHW: Tensor, following_CHW: Tensor) -> tuple[Tensor, Tensor]:
        height, width = this_CHW.shape[-2:]
        right, down = max(SMALLEST - width, 0), max(SMALLEST - height, 0)
        pair = F.pad(torch.stack([this_CHW, following_CHW]) * IMAGES[images] - 1, (0, right, 0, down), "replicate")
        forward, backward = network(pair, pair.flip(0), num_flow_updates=updates)[-1][..., :height, :width]
        return forward, backward

    return warping_errors("ewarp", pred_TCHW, flows, scale=scale, channels=channels, unseen=unseen)
