"""PSNR against the output of the full-precision network."""

from __future__ import annotations

from torch import Tensor

from metrics.psnr import psnr
from qvsr.registry import METRICS


@METRICS.add("psnr_fp", unit="dB", higher_is_better=True, needs="fp", frames="each", digits=2, licence="Apache-2.0", version="1")
def psnr_fp(pred_TCHW: Tensor, full_precision_TCHW: Tensor, *, colour: str = "rgb", crop: int = 0, eps: float = 0.0) -> Tensor:
    """Fidelity to full precision: :func:`metrics.psnr.psnr` with the full-precision output in place of the ground truth.

    It separates quantization methods even where the backbone itself is far from the ground truth.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1].
        full_precision_TCHW: what the same network restores from the same input and noise in float32.
    Returns:
        psnr_T in dB, float64; inf where quantization changed no pixel (full precision itself).

    >>> import torch
    >>> x = torch.rand(1, 3, 8, 8)
    >>> psnr_fp(x, x)
    tensor([inf], dtype=torch.float64)
    """
    return psnr(pred_TCHW, full_precision_TCHW, colour=colour, crop=crop, eps=eps)
