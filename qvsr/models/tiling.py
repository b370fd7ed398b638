"""Cutting images and latents into overlapping tiles, and putting them together again."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANCE = 0.01  # of the Gaussian tile weight, in units of the tile's side squared (arXiv 2312.00853)


class Box(NamedTuple):
    """A tile: rows top … bottom-1, columns left … right-1. Bottom and right may lie beyond an image smaller than the tile."""

    top: int
    bottom: int
    left: int
    right: int

    def cut(self, x: Tensor) -> Tensor:
        """The tile's part of a tensor (…, H, W), as a view."""
        return x[..., self.top : self.bottom, self.left : self.right]


def starts(length: int, tile: int, stride: int) -> list[int]:
    """First positions of tiles along one side: every `stride`, and the last one moved back to end with the side.

    >>> starts(60, 24, 18), starts(20, 24, 18)
    ([0, 18, 36], [0])
    """
    if length <= tile:
        return [0]
    return list(dict.fromkeys(min(start, length - tile) for start in range(0, length, stride)))


def reduced_starts(length: int, tile: int, stride: int, factor: int) -> list[int]:
    """Where the tiles of an image lie in a map that is `factor` times smaller (flow beside the image).

    Tile and stride are divided without remainder, as published, so inner tiles of a long side drift by less than a pixel
    of the map for every tile (stride 750: 93 instead of 93.75). There is always one position for every tile of the image.
    >>> reduced_starts(1920, 960, 750, 8), starts(1920, 960, 750)
    ([0, 93, 120], [0, 750, 960])
    """
    count = len(starts(length, tile, stride))
    last = max(length // factor - tile // factor, 0)
    return [min(number * (stride // factor), last) for number in range(count - 1)] + [last]


def boxes(height: int, width: int, tile: int | tuple[int, int], stride: int) -> list[Box]:
    """All tiles of a plane; the row changes fastest.

    Args:
        tile: side, or height and width.
        stride: distance of neighbouring tiles; at most the tile's side, else there are gaps.
    """
    tile_h, tile_w = (tile, tile) if isinstance(tile, int) else tile
    return [Box(top, top + tile_h, left, left + tile_w) for left in starts(width, tile_w, stride) for top in starts(height, tile_h, stride)]


def reduced_boxes(height: int, width: int, tile: int, stride: int, factor: int) -> list[Box]:
    """The tiles of :func:`boxes` in a map `factor` times smaller, in the same order."""
    side = tile // factor
    return [
        Box(top, top + side, left, left + side)
        for left in reduced_starts(width, tile, stride, factor)
        for top in reduced_starts(height, tile, stride, factor)
    ]


def latent_boxes(height: int, width: int, tile: int, overlap: int) -> list[Box]:
    """Tiles of a latent, each `overlap` wide over its neighbours, the last of a row or column moved back to the border.

    Along a side shorter than the tile there is one tile of the side's length; the released script computes a negative
    offset there and fails.
    """
    stride = tile - overlap
    tops = [(top, top + min(tile, height)) for top in starts(height, tile, stride)]
    lefts = [(left, left + min(tile, width)) for left in starts(width, tile, stride)]
    return [Box(*rows, *columns) for columns in lefts for rows in tops]


def gaussian_weights(width: int, height: int) -> Tensor:
    """Blending weight of a latent tile.

    A Gaussian of variance 0.01 tile sides squared along each axis. Its middle is (width-1)/2 in x but height/2 in y: the
    published code is off by half a pixel in y, and its outputs depend on it.

    Returns:
        (height, width) float64, positive.
    """

    def bell(length: int, middle: float) -> Tensor:
        distance = (torch.arange(length, dtype=torch.float64) - middle) / length
        return torch.exp(-(distance**2) / (2 * VARIANCE)) / math.sqrt(2 * math.pi * VARIANCE)

    return torch.outer(bell(height, height / 2), bell(width, (width - 1) / 2))


class Blend:
    """Weighted average of overlapping tiles.

    Sums are float32 whatever the weights' type, as published; without weights it is the plain mean.

    Args:
        like: tensor (…, H, W) whose shape and device the result has.
    """

    def __init__(self, like: Tensor) -> None:
        self.total = torch.zeros(like.shape, device=like.device)
        self.weight = torch.zeros(like.shape[-2:], device=like.device)

    def add(self, box: Box, tile: Tensor, weight: Tensor | None = None) -> None:
        """Adds a tile (…, h, w); `weight` is (h, w)."""
        total, weights = box.cut(self.total), box.cut(self.weight)
        total += tile if weight is None else tile * weight
        weights += 1.0 if weight is None else weight

    def result(self) -> Tensor:
        """The average.

        Raises:
            ValueError: a pixel is covered by no tile.
        """
        if not (self.weight > 0).all():
            raise ValueError("tiles leave gaps: the stride is larger than the tile")
        return self.total / self.weight


def padded_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """Size after padding: if either side is no multiple, *both* grow to the next one, also the side that is one already.

    >>> padded_size(540, 960, 32), padded_size(512, 512, 32)
    ((544, 992), (512, 512))
    """
    if height % multiple == 0 and width % multiple == 0:
        return height, width
    return (height // multiple + 1) * multiple, (width // multiple + 1) * multiple


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Reflects an image at its right and bottom border until :func:`padded_size`.

    Along a side that is too short to be reflected (the border is at least as long as the side) the last row or column is
    repeated instead; the published code fails there.

    Args:
        x: (T, C, H, W).
    """
    height, width = padded_size(x.shape[-2], x.shape[-1], multiple)
    down, right = height - x.shape[-2], width - x.shape[-1]
    x = F.pad(x, (0, 0, 0, down), "reflect" if down < x.shape[-2] else "replicate")
    return F.pad(x, (0, right, 0, 0), "reflect" if right < x.shape[-1] else "replicate")
