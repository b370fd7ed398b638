"""What every metric asks of its frames, and how frames reach pyiqa."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class MetricError(ValueError):
    """Frames that a metric cannot measure; the message names the metric, what was found and what would work."""


def check_frames(metric: str, frames_TCHW: Tensor, what: str = "prediction") -> None:
    """Refuse what is not a clip of RGB frames in [0, 1].

    Raises:
        MetricError: not (T, 3, H, W), no frame, NaN or a value outside [0, 1] (the first such frame is named).
    """
    if frames_TCHW.ndim != 4 or frames_TCHW.shape[1] != 3 or frames_TCHW.shape[0] == 0:
        raise MetricError(f"{metric}: {what} is {tuple(frames_TCHW.shape)}; (T, 3, H, W) with at least one frame is needed")
    if not frames_TCHW.is_floating_point():
        raise MetricError(f"{metric}: {what} is {frames_TCHW.dtype}; floating point in [0, 1] is needed (8-bit frames divided by 255)")
    for t, frame in enumerate(frames_TCHW):
        low, high = (float(bound) for bound in frame.aminmax())
        if low != low or high != high:
            raise MetricError(f"{metric}: {what} has NaN in frame {t}; nothing is left out of a mean, restore this clip again")
        if low < 0 or high > 1:
            raise MetricError(f"{metric}: {what} is in [{low:g}, {high:g}] in frame {t}; [0, 1] is needed")


def check_pair(metric: str, pred_TCHW: Tensor, target_TCHW: Tensor, target: str = "target") -> None:
    """Refuse two clips of different size; each is checked by itself too.

    >>> check_pair("psnr", torch.zeros(5, 3, 64, 64), torch.zeros(5, 3, 64, 66))
    Traceback (most recent call last):
    ...
    metrics._frames.MetricError: psnr: prediction is (5, 3, 64, 64), target (5, 3, 64, 66); check upscale and the clips, nothing is cropped for you
    """
    if pred_TCHW.shape != target_TCHW.shape:
        raise MetricError(
            f"{metric}: prediction is {tuple(pred_TCHW.shape)}, {target} {tuple(target_TCHW.shape)}; "
            "check upscale and the clips, nothing is cropped for you"
        )
    check_frames(metric, pred_TCHW)
    check_frames(metric, target_TCHW, target)


@functools.lru_cache(maxsize=16)
def pyiqa_metric(name: str, options: tuple[tuple[str, Any], ...] = ()) -> Callable[[Tensor, Tensor], Tensor]:
    """A pyiqa metric on the CPU, built once; `options` go to its constructor. None of the metrics used here has weights."""
    import pyiqa  # heavy, and only needed where something is measured

    return pyiqa.create_metric(name, device=torch.device("cpu"), **dict(options))


def frame_by_frame(metric: Callable[[Tensor, Tensor], Tensor], pred_TCHW: Tensor, target_TCHW: Tensor) -> Tensor:
    """Apply a metric of batches to one frame after the other: memory does not grow with the clip, nor do values depend on its length.

    Returns:
        value_T in float64.
    """
    values = [metric(pred_TCHW[t : t + 1], target_TCHW[t : t + 1]).reshape(()).double() for t in range(pred_TCHW.shape[0])]
    return torch.stack(values)


def name_for_colour(metric: str, colour: str, names: dict[str, str]) -> str:
    """pyiqa's name of a metric for a colour space."""
    if colour not in names:
        raise MetricError(f"{metric}: no colour {colour!r}; known: {', '.join(names)}")
    return names[colour]
