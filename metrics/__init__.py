"""Metrics: one file each, a pure function on frames, registered with its facts in `qvsr.registry.METRICS`.

Facts of every metric: ``unit``, ``higher_is_better``, ``needs`` ("gt", "fp" or "none"), ``frames`` ("each": T values;
"pairs": T - 1 values) and ``digits`` (decimals shown in tables).
"""

from metrics import ewarp_dis, gmsd, psnr, psnr_fp, ssim, ssim_fp, ssim_gradient

__all__ = ["ewarp_dis", "gmsd", "psnr", "psnr_fp", "ssim", "ssim_fp", "ssim_gradient"]
