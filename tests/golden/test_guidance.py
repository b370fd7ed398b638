"""Motion guidance against the reference's, quirks included."""

from __future__ import annotations

import torch
from golden import assert_close, load
from networks import stored_motion

from qvsr.config import ScheduleSettings
from qvsr.models.sampler import guide, motion_loss
from qvsr.models.schedule import Schedule


def test_loss_and_gradient() -> None:
    meta, tensors = load("guidance")
    latents = tensors["latents"].clone().requires_grad_(True)
    loss = motion_loss(latents, stored_motion(tensors))
    loss.backward()
    assert_close(loss.detach().view(1), tensors["loss"], meta, "loss")
    assert_close(latents.grad, tensors["grad"], meta, "gradient")


def test_guided() -> None:
    meta, tensors = load("guidance")
    schedule = Schedule(ScheduleSettings()).respace(meta["respaced_steps"])
    assert {f"guided.step{step}" for step in meta["step_indices"]} == {name for name in tensors if name.startswith("guided.")} != set()
    for step in meta["step_indices"]:
        log_variance = schedule.posterior_log_variance_clipped[step].item()
        with torch.no_grad():
            guided = guide(tensors["latents"], stored_motion(tensors), meta["guidance_scale"], log_variance)
        assert_close(guided, tensors[f"guided.step{step}"], meta, f"step {step}")
