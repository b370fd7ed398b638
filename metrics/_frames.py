"""What every metric asks of its frames, and what metrics that are computed here make of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


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


def check_size(metric: str, frames_TCHW: Tensor, smallest: int, why: str, crop: int = 0) -> None:
    """Refuse frames whose sides, less `crop` pixels at every border, are below `smallest`.

    >>> check_size("ssim", torch.zeros(1, 3, 20, 30), 11, "for the window", crop=5)
    Traceback (most recent call last):
    ...
    metrics._frames.MetricError: ssim: frames are 20x30 with crop 5; at least 11x11 is needed for the window
    """
    height, width = frames_TCHW.shape[-2:]
    if crop < 0:
        raise MetricError(f"{metric}: crop is {crop}; 0 or more pixels can be left out at every border")
    if min(height, width) - 2 * crop < smallest:
        cropped = f" with crop {crop}" if crop else ""
        raise MetricError(f"{metric}: frames are {height}x{width}{cropped}; at least {smallest}x{smallest} is needed {why}")


def frame_by_frame(metric: Callable[[Tensor, Tensor], Tensor | float], pred_TCHW: Tensor, target_TCHW: Tensor) -> Tensor:
    """Apply a metric to one frame after the other: memory does not grow with the clip, nor do values depend on where it is cut.

    Args:
        metric: of two batches of one frame, (1, 3, H, W); its value is a number or a tensor of one element.
    Returns:
        value_T in float64.
    """
    values = [float(metric(pred_TCHW[t : t + 1], target_TCHW[t : t + 1])) for t in range(pred_TCHW.shape[0])]
    return torch.tensor(values, dtype=torch.float64)


# Weights of R, G, B and what is added to them, for values in [0, 1].
LUMA = {
    "y": (0.299, 0.587, 0.114, 0.0),  # full range
    "y_limited": (0.257, 0.504, 0.098, 16 / 256),  # 16 to 235 in 8 bit, with the digits of QuantVSR's evaluation script
}


def planes(metric: str, frame_1CHW: Tensor, colour: str, crop: int = 0) -> Array:
    """One frame in the colour space that a protocol names, for metrics that compute in float64.

    Args:
        frame_1CHW: RGB in [0, 1].
        colour: "rgb", or a key of `LUMA`.
        crop: pixels left out at every border.
    Returns:
        CHW float64 in [0, 1], three planes or one; never a view of the frame.
    """
    if colour != "rgb" and colour not in LUMA:
        raise MetricError(f"{metric}: no colour {colour!r}; known: rgb, {', '.join(LUMA)}")
    height, width = frame_1CHW.shape[-2:]
    frame_CHW = frame_1CHW[0, :, crop : height - crop, crop : width - crop].cpu().numpy().astype(np.float64)
    return frame_CHW if colour == "rgb" else luma(frame_CHW, colour)[None]


def luma(frame_CHW: Array, colour: str = "y") -> Array:
    """Luma HW of an RGB frame in float64, not rounded.

    Channel by channel, in this order: a matrix product may add in another, and where the luma of 8-bit colours lies half-way between two
    integers (a pixel in a thousand) the machine would decide how it is rounded.
    """
    red, green, blue, offset = LUMA[colour]
    value: Array = red * frame_CHW[0] + green * frame_CHW[1] + blue * frame_CHW[2]
    return value + offset if offset else value
