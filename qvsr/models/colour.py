"""Colour correction of restored frames by their low-quality input (arXiv 2305.07015, Sec. 3.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qvsr.registry import Registry

COLOUR_FIXES = Registry("colour fix")


@COLOUR_FIXES.add("adain")
def adain(content_TCHW: Tensor, style_TCHW: Tensor) -> Tensor:
    """Gives every frame and channel the mean and spread of the style.

    Args:
        content_TCHW: restored frames, any range.
        style_TCHW: upscaled input, same shape.
    Returns:
        (content - mean) / std * style std + style mean, with std = sqrt(unbiased variance + 1e-5).
    """
    mean, std = _statistics(content_TCHW)
    style_mean, style_std = _statistics(style_TCHW)
    return (content_TCHW - mean) / std * style_std + style_mean


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, dim=(-2, -1), keepdim=True, correction=1)
    return mean, (variance + 1e-5).sqrt()


@COLOUR_FIXES.add("wavelet")
def wavelet(content_TCHW: Tensor, style_TCHW: Tensor, levels: int = 5) -> Tensor:
    """Detail of the content on the low frequencies of the style.

    An undecimated wavelet with the 3x3 kernel [1 2 1; 2 4 2; 1 2 1] / 16, dilated by 1, 2, 4, … and replicated borders.

    Args:
        content_TCHW: restored frames, any range.
        style_TCHW: upscaled input, same shape.
        levels: how many blurs make the low frequencies.
    """
    return content_TCHW - _low(content_TCHW, levels) + _low(style_TCHW, levels)


def _low(x: Tensor, levels: int) -> Tensor:
    line = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    kernel = torch.outer(line, line).expand(x.shape[1], 1, 3, 3)
    for level in range(levels):
        radius = 2**level
        x = F.conv2d(F.pad(x, (radius,) * 4, "replicate"), kernel, groups=x.shape[1], dilation=radius)
    return x


@COLOUR_FIXES.add("none")
def unchanged(content_TCHW: Tensor, style_TCHW: Tensor) -> Tensor:
    """Leaves the frames as they are."""
    return content_TCHW
