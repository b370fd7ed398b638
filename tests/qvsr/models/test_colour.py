"""Colour fixes against numpy and scipy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch

from qvsr.models.colour import COLOUR_FIXES, adain, wavelet
from qvsr.registry import UnknownNameError


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    content, style = torch.randn(2, 2, 3, 37, 45, dtype=torch.float64, generator=generator)
    return content, 0.3 * style + 0.2


def test_adain_gives_the_styles_statistics() -> None:
    content, style = pair()
    c, s = content.numpy(), style.numpy()
    axes = {"axis": (-2, -1), "keepdims": True}
    expected = (c - c.mean(**axes)) / np.sqrt(c.var(ddof=1, **axes) + 1e-5) * np.sqrt(s.var(ddof=1, **axes) + 1e-5) + s.mean(**axes)
    np.testing.assert_allclose(adain(content, style).numpy(), expected, rtol=0, atol=1e-12)


def test_adain_of_a_flat_frame_is_the_styles_mean() -> None:
    _, style = pair()
    flat = adain(torch.ones_like(style), style)
    torch.testing.assert_close(flat, style.mean((-2, -1), keepdim=True).expand_as(style))


def blurred(x: np.ndarray, levels: int) -> np.ndarray:
    for level in range(levels):
        kernel = np.zeros(2 * 2**level + 1)
        kernel[[0, 2**level, -1]] = 0.25, 0.5, 0.25
        for axis in (-1, -2):
            x = scipy.ndimage.correlate1d(x, kernel, axis=axis, mode="nearest")
    return x


def test_wavelet_swaps_low_frequencies() -> None:
    content, style = pair()
    expected = content.numpy() - blurred(content.numpy(), 5) + blurred(style.numpy(), 5)
    np.testing.assert_allclose(wavelet(content, style).numpy(), expected, rtol=0, atol=1e-12)


def test_names() -> None:
    content, style = pair()
    assert COLOUR_FIXES["none"](content, style) is content
    with pytest.raises(UnknownNameError, match="no colour fix 'adian'; did you mean adain"):
        COLOUR_FIXES["adian"]
