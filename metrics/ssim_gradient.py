"""Structural similarity of gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics._frames import MetricError, check_pair, frame_by_frame
from qvsr.registry import METRICS

SMALLEST = 13  # pixels of a side: the 11x11 window of SSIM on gradients that 3x3 pixels give


def gradient_magnitude(frames_TCHW: Tensor) -> Tensor:
    """Sobel gradient magnitude of the luma, where the 3x3 kernel lies inside the frame.

    The kernel is divided by 4, so that a step of contrast 1 along a row or column has magnitude 1; no
    3x3 patch has more than sqrt(5) / 2 = 1.12.

    Args:
        frames_TCHW: RGB in [0, 1].
    Returns:
        ``(T, 1, H - 2, W - 2)``, float64.
    """
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    luma = torch.einsum("tchw,c->thw", frames_TCHW.double(), weights)[:, None]
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], dtype=torch.float64) / 4
    across, down = F.conv2d(luma, torch.stack([sobel, sobel.T])[:, None]).unbind(1)
    return torch.hypot(across, down)[:, None]


@METRICS.add("ssim_gradient", unit="", higher_is_better=True, needs="gt", frames="each", digits=4, licence="PolyForm-Noncommercial-1.0.0")
def ssim_gradient(pred_TCHW: Tensor, target_TCHW: Tensor) -> Tensor:
    """Structural similarity of the gradient magnitudes of each frame, by pyiqa's ``ssim`` in float64.

    The idea is gradient-based structural similarity (Chen, Yang, Xie, ICIP 2006, doi:10.1109/ICIP.2006.313132): plain SSIM is lenient
    towards blur, the same comparison of gradients is not. G-SSIM itself compares luminance on the images, contrast and structure on their
    gradients; here, the simplified form, all three terms are compared on the gradients, as the usual SSIM of :func:`gradient_magnitude`:
    Gaussian window 11x11, sigma 1.5, K = (0.01, 0.03), data range 1 (the magnitude of a step of full contrast), valid region only, no
    downsampling, negative contrast-structure terms set to 0, nothing rounded.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1].
        target_TCHW: ground truth, same shape and range.
    Returns:
        ssim_T in [0, 1], float64; 1 where a frame is reproduced exactly, or up to a constant brightness.
    Raises:
        MetricError: shapes differ, NaN, values outside [0, 1], frames smaller than 13x13.

    >>> x = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    >>> ssim_gradient(x, x)
    tensor([1.], dtype=torch.float64)
    """
    check_pair("ssim_gradient", pred_TCHW, target_TCHW)
    height, width = pred_TCHW.shape[-2:]
    if min(height, width) < SMALLEST:
        raise MetricError(f"ssim_gradient: frames are {height}x{width}, at least {SMALLEST}x{SMALLEST} is needed")
    from pyiqa.archs.ssim_arch import ssim  # heavy, and only needed where something is measured

    return frame_by_frame(lambda x, y: ssim(gradient_magnitude(x), gradient_magnitude(y), data_range=1.0), pred_TCHW, target_TCHW)
