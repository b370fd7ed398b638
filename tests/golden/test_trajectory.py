"""Sampling from fixed noise with overlapping tiles, every step against the reference's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from golden import assert_close, load
from networks import diffusion, set_name, stored_motion

from qvsr.config import SamplingSettings
from qvsr.models.sampler import trajectory
from qvsr.models.schedule import Schedule


@pytest.mark.parametrize("name", ["plain", "guided"])
def test_trajectory(name: str) -> None:
    meta, tensors = load("trajectory")
    backbone = diffusion(set_name(meta["weights"]), tensors["context"])
    steps = meta["steps"]
    assert_close(Schedule(backbone.settings.schedule).start(tensors["init_latent"], tensors["init_noise"]), tensors["x_T"], meta, "x_T")

    def draw(kind: str, shape: Sequence[int], step: int) -> torch.Tensor:
        return tensors["init_noise"] if kind == "start" else tensors["noise"][steps - 1 - step]

    sampling = SamplingSettings(
        steps=steps, tile=meta["tile_size"], tile_overlap=meta["tile_overlap"], guidance_scale=meta["guidance_scale"]
    )
    motion = stored_motion(tensors) if name == "guided" else None
    latents = list(trajectory(backbone, tensors["init_latent"], sampling, draw, motion))
    assert len(latents) == len(tensors[f"{name}.latents"])
    for step, (actual, expected) in enumerate(zip(latents, tensors[f"{name}.latents"], strict=True)):
        assert_close(actual, expected, meta, f"{name}, step {step}")
