"""SSIM against the output of the full-precision network."""

from __future__ import annotations

from torch import Tensor

from metrics.ssim import ssim
from qvsr.registry import METRICS


@METRICS.add("ssim_fp", unit="", higher_is_better=True, needs="fp", frames="each", digits=4, licence="Apache-2.0", version="1")
def ssim_fp(pred_TCHW: Tensor, full_precision_TCHW: Tensor, *, colour: str = "rgb", crop: int = 0) -> Tensor:
    """Fidelity to full precision: :func:`metrics.ssim.ssim` with the full-precision output in place of the ground truth.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1].
        full_precision_TCHW: what the same network restores from the same input and noise in float32.
    Returns:
        ssim_T in [0, 1], float64; 1 where quantization changed no pixel (full precision itself).

    >>> import torch
    >>> x = torch.rand(1, 3, 16, 16)
    >>> ssim_fp(x, x)
    tensor([1.], dtype=torch.float64)
    """
    return ssim(pred_TCHW, full_precision_TCHW, colour=colour, crop=crop)
