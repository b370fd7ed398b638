"""Files of random weights with a network's names and shapes, for metrics whose trained weights are not here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def fill(like: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of these shapes that keep the scale of what goes through them; norms start as ones.

    Tensors of about the same standard deviation (1 / sqrt of the summed inputs, to the next power of 2) are views of one buffer: a file of
    them is small, whatever the network.
    """
    levels = {key: _level(value) for key, value in like.items()}
    longest = {level: max(like[key].numel() for key in like if levels[key] == level) for level in set(levels.values())}
    generator = torch.Generator().manual_seed(seed)
    buffers = {level: 2.0**-level * torch.randn(longest[level] + 997, generator=generator) for level in sorted(longest)}
    state = {}
    for place, (key, value) in enumerate(sorted(like.items())):
        if not value.is_floating_point():
            state[key] = torch.zeros(value.shape, dtype=value.dtype)
        elif key.endswith("running_var") or (key.endswith("weight") and value.ndim == 1):
            state[key] = torch.ones(value.shape)
        else:
            first = 97 * place % 997
            state[key] = buffers[levels[key]][first : first + value.numel()].view(value.shape)
    return state


def _level(value: Tensor) -> int:
    return round(math.log2(value[0].numel()) / 2) if value.ndim > 1 else 4


def save(path: Path, state: Mapping[str, Tensor]) -> Path:
    torch.save(dict(state), path)
    return path
