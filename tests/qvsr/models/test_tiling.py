"""Tiles cover, blending keeps what is there, padding is numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvsr.models.tiling import (
    Blend,
    boxes,
    gaussian_weights,
    latent_boxes,
    pad_to_multiple,
    padded_size,
    reduced_boxes,
    reduced_starts,
    starts,
)

SIDE = st.integers(1, 90)
TILE = st.integers(1, 40)


@given(length=SIDE, tile=TILE, part=st.floats(0.05, 1))
def test_starts_cover_without_overrun(length: int, tile: int, part: float) -> None:
    stride = max(1, round(tile * part))
    found = starts(length, tile, stride)
    assert found == sorted(set(found))
    assert found[0] == 0
    covered = {x for start in found for x in range(start, start + tile)}
    assert covered >= set(range(length))
    assert length < tile or found[-1] + tile == length


@given(length=st.integers(1, 60), tile=st.integers(1, 12), step=st.integers(1, 100), factor=st.sampled_from([4, 8]))
def test_reduced_tiles_match_one_to_one(length: int, tile: int, step: int, factor: int) -> None:
    """One position in the small map for every tile, inside it, and never more than the number of tiles away."""
    length, tile = length * 32, tile * 32
    stride = max(factor, min(step * 3, tile))
    large, small = starts(length, tile, stride), reduced_starts(length, tile, stride, factor)
    assert len(large) == len(small)
    for number, (a, b) in enumerate(zip(large, small, strict=True)):
        assert 0 <= b <= max(length // factor - tile // factor, 0)
        assert abs(a / factor - b) <= number + 1


def test_a_wide_image_has_as_many_flow_tiles_as_image_tiles() -> None:
    """At 3200 pixels the published rule cuts four image tiles but five flow tiles."""
    assert len(starts(3200, 960, 750)) == 4
    assert len(starts(400, 120, 93)) == 5
    assert reduced_starts(3200, 960, 750, 8) == [0, 93, 186, 280]
    assert len(boxes(3200, 3200, 960, 750)) == len(reduced_boxes(3200, 3200, 960, 750, 8)) == 16


@settings(max_examples=30, deadline=None)
@given(height=SIDE, width=SIDE, tile=st.integers(2, 40), overlap=st.integers(0, 39))
def test_blending_identical_tiles_is_the_identity(height: int, width: int, tile: int, overlap: int) -> None:
    image = torch.randn(2, height, width, generator=torch.Generator().manual_seed(0))
    tiles = latent_boxes(height, width, tile, min(overlap, tile - 1))
    weight = gaussian_weights(min(tile, width), min(tile, height))
    blend = Blend(image)
    for box in tiles:
        assert box.cut(image).shape[-2:] == weight.shape
        blend.add(box, box.cut(image), weight)
    # Sums of up to 40 x 40 float32 terms.
    torch.testing.assert_close(blend.result(), image, rtol=1e-5, atol=1e-5)


def test_a_latent_smaller_than_the_tile_is_one_tile() -> None:
    assert latent_boxes(8, 12, 64, 32) == [(0, 8, 0, 12)]
    assert latent_boxes(8, 96, 64, 32) == [(0, 8, 0, 64), (0, 8, 32, 96)]


def test_gaps_are_refused() -> None:
    blend = Blend(torch.zeros(1, 10, 10))
    for box in boxes(10, 10, 3, 5):
        blend.add(box, torch.ones(1, 3, 3))
    with pytest.raises(ValueError, match="tiles leave gaps: the stride is larger than the tile"):
        blend.result()


def test_weights_are_a_gaussian_off_centre_in_y() -> None:
    width, height = 10, 14
    x, y = np.arange(width)[None], np.arange(height)[:, None]
    expected = np.exp(-0.5 * (((x - 4.5) / width) ** 2 + ((y - 7) / height) ** 2) / 0.01) / (2 * np.pi * 0.01)
    np.testing.assert_allclose(gaussian_weights(width, height).numpy(), expected, rtol=1e-12)


@given(height=st.integers(1, 100), width=st.integers(1, 100), multiple=st.sampled_from([8, 32]))
def test_both_sides_grow_or_none(height: int, width: int, multiple: int) -> None:
    padded = padded_size(height, width, multiple)
    assert padded[0] % multiple == padded[1] % multiple == 0
    if height % multiple == 0 and width % multiple == 0:
        assert padded == (height, width)
    else:
        assert height < padded[0] <= height + multiple
        assert width < padded[1] <= width + multiple


@pytest.mark.parametrize(
    ("height", "width", "down", "right"), [(40, 64, "reflect", "reflect"), (12, 80, "edge", "reflect"), (3, 5, "edge", "edge")]
)
def test_padding_is_numpys(height: int, width: int, down: str, right: str) -> None:
    """Reflection where the side is long enough, else the last row or column again."""
    image = torch.randn(1, 2, height, width, generator=torch.Generator().manual_seed(0))
    new_h, new_w = padded_size(height, width, 32)
    expected = np.pad(image.numpy(), ((0, 0), (0, 0), (0, new_h - height), (0, 0)), mode=down)
    expected = np.pad(expected, ((0, 0), (0, 0), (0, 0), (0, new_w - width)), mode=right)
    np.testing.assert_array_equal(pad_to_multiple(image, 32).numpy(), expected)


def test_nothing_is_padded_that_fits() -> None:
    image = torch.randn(1, 3, 32, 64)
    assert torch.equal(pad_to_multiple(image, 32), image)
