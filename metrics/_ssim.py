"""Structural similarity of two planes: what every SSIM here shares."""

from __future__ import annotations

import numpy as np

from metrics._frames import Array

WINDOW = 11  # pixels; only windows that lie inside the plane count
SIGMA = 1.5
ROWS = 32  # of windows at a time: the dozen maps of a strip stay in the cache, 1.5 times faster than whole maps of 1280x720


def gaussian() -> Array:
    """The window along one axis, sum 1; the window of two axes is its outer product with itself.

    >>> gaussian().round(4)[:6]
    array([0.001 , 0.0076, 0.036 , 0.1094, 0.213 , 0.266 ])
    """
    offset = np.arange(WINDOW) - WINDOW // 2
    weight = np.exp(-(offset**2) / (2 * SIGMA**2))
    normalised: Array = weight / weight.sum()
    return normalised


def local_mean(plane_HW: Array) -> Array:
    """Weighted mean in the window around each pixel, (H - 10, W - 10) float64, by OpenCV along one axis and then the other.

    22 products a pixel in place of the 121 of one convolution; sums of 1 to 1e-15.
    """
    import cv2

    border, weight = WINDOW // 2, gaussian()
    means = cv2.sepFilter2D(plane_HW, cv2.CV_64F, weight, weight).astype(np.float64, copy=False)
    return means[border:-border, border:-border]


def structural_similarity(first_HW: Array, second_HW: Array, data_range: float) -> float:
    """Mean SSIM of two planes (Wang et al., IEEE TIP 13(4), 2004, Eq. 13), in float64.

    Gaussian window 11x11 with sigma 1.5, K = (0.01, 0.03), valid region only, negative contrast-structure terms set to 0.
    The variances are needed as a sum alone, so four maps are filtered and not five.

    Args:
        first_HW, second_HW: sides of at least 11 pixels.
        data_range: largest minus smallest possible value.
    Returns:
        1 exactly for equal planes: every quotient is x / x.
    """
    height, width = (size - WINDOW + 1 for size in first_HW.shape)
    total = 0.0
    for top in range(0, height, ROWS):
        strip = slice(top, top + ROWS + WINDOW - 1)
        total += float(similarity_map(first_HW[strip], second_HW[strip], data_range).sum())
    return total / (height * width)


def similarity_map(first_HW: Array, second_HW: Array, data_range: float) -> Array:
    """SSIM of each window, (H - 10, W - 10)."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean1, mean2 = local_mean(first_HW), local_mean(second_HW)
    covariance, variances = local_mean(first_HW * second_HW), local_mean(first_HW * first_HW + second_HW * second_HW)
    product, squares = mean1 * mean2, mean1 * mean1 + mean2 * mean2
    covariance -= product
    variances -= squares
    contrast_structure = (2 * covariance + c2) / (variances + c2)
    luminance = (2 * product + c1) / (squares + c1)
    similarity: Array = luminance * np.maximum(contrast_structure, 0)
    return similarity
