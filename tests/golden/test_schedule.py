"""Timesteps, buffers, x_T and tile weights against the reference's."""

from __future__ import annotations

import torch
from golden import assert_close, load

from qvsr.config import ScheduleSettings
from qvsr.models.schedule import Process, Schedule, spaced_timesteps
from qvsr.models.tiling import gaussian_weights


def published(meta: dict) -> Schedule:
    facts = meta["beta_schedule"]
    return Schedule(ScheduleSettings(**{key: facts[key] for key in ("timesteps", "linear_start", "linear_end")}))


def test_timesteps() -> None:
    meta, _ = load("schedule")
    for sections, expected in meta["timesteps"].items():
        assert spaced_timesteps(meta["beta_schedule"]["timesteps"], sections) == expected, sections


def test_buffers() -> None:
    meta, tensors = load("schedule")
    full = published(meta)
    checked = 0
    for name, expected in tensors.items():
        group, _, buffer = name.partition(".")
        if group == f"full{len(full)}" or group.startswith("steps"):
            process: Process = full if group.startswith("full") else full.respace(group.removeprefix("steps"))
            assert_close(getattr(process, buffer), expected, meta, name)
            checked += 1
    assert checked and checked == sum("." in name and not name.startswith("tile_weights") for name in tensors)


def test_start() -> None:
    meta, tensors = load("schedule")
    assert_close(published(meta).start(tensors["init_latent"], tensors["init_noise"]), tensors["x_T"], meta, "x_T")


def test_tile_weights() -> None:
    meta, tensors = load("schedule")
    for width, height in meta["tile_weights_w_h"]:
        weights = gaussian_weights(width, height)
        assert weights.dtype == torch.float64
        assert_close(weights, tensors[f"tile_weights.w{width}_h{height}"], meta, f"{width}x{height}")
