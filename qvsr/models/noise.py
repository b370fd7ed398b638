"""Where random numbers come from: they belong to the clip, not to the process.

Every draw is a function of its key alone, so full precision and every method see the same noise, in any order of work, with
or without a stop in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class NoiseSource(Protocol):
    """Standard normal noise by key."""

    def draw(self, kind: str, shape: Sequence[int], *, segment: int, patch: int, step: int) -> Tensor:
        """Noise of one use.

        Args:
            kind: "posterior" (sample of the encoder's latent), "start" (x_T) or "step" (ancestral noise).
            shape: shape of the noise.
            segment: number of the segment in the clip.
            patch: number of the image tile in the segment.
            step: index of the sampling step, steps-1 … 0; -1 where there is none.
        Returns:
            float32 on the CPU.
        """
        ...


class KeyedNoise:
    """Noise from a CPU generator that is seeded anew for every draw, by SHA-256 of the draw's key.

    Args:
        seed: seed of the run.
        clip: name of the clip, such as "default/bikes"; clips differ in their noise.
    """

    def __init__(self, seed: int, clip: str) -> None:
        self.seed = seed
        self.clip = clip

    def draw(self, kind: str, shape: Sequence[int], *, segment: int, patch: int, step: int) -> Tensor:
        key = repr((self.seed, self.clip, segment, patch, kind, step)).encode()
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big", signed=True)
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(number))
