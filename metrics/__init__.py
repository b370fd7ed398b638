"""Metrics: one file each, a pure function on frames, registered with its facts in `qvsr.registry.METRICS`.

Facts of every metric: ``unit``, ``higher_is_better``, ``needs`` ("gt", "fp" or "none"), ``frames`` ("each": T values; "pairs": T - 1 values;
"clip": one value, of the whole clip), ``digits`` (decimals shown in tables) and ``licence`` (SPDX, the strictest of the code and weights that
compute it). Where they apply: ``weights`` (names in config/assets.yaml; the function gets their paths as keyword ``weights``) and
``version`` (of a metric that is computed here and not by a package; raised whenever values change) and ``program`` (the package that
computes it lives in an environment of its own, and the function calls it: it gets the path of the clip instead of frames).
"""

from metrics import (
    clipiqa,
    dists,
    dover,
    ewarp,
    ewarp_dis,
    fastervqa,
    flicker,
    gmsd,
    lpips,
    maniqa,
    musiq,
    niqe,
    psnr,
    psnr_fp,
    ssim,
    ssim_fp,
    ssim_gradient,
    tof,
)

__all__ = [
    "clipiqa",
    "dists",
    "dover",
    "ewarp",
    "ewarp_dis",
    "fastervqa",
    "flicker",
    "gmsd",
    "lpips",
    "maniqa",
    "musiq",
    "niqe",
    "psnr",
    "psnr_fp",
    "ssim",
    "ssim_fp",
    "ssim_gradient",
    "tof",
]
