"""Sampling with a network that knows the answer, and guidance against its formula."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from oracle import oracle

from qvsr.config import SamplingSettings
from qvsr.models import sampler
from qvsr.models.noise import KeyedNoise
from qvsr.models.sampler import Motion, NetworkCall, guide, motion_loss, trajectory


def draw(kind: str, shape: Sequence[int], step: int) -> torch.Tensor:
    return KeyedNoise(0, "clip").draw(kind, shape, segment=0, patch=0, step=step)


def latent(height: int, width: int) -> torch.Tensor:
    return torch.randn(5, 3, height, width, generator=torch.Generator().manual_seed(3))


def random_motion(frames: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Motion:
    generator = torch.Generator().manual_seed(1)
    flows = torch.randn(2, 1, frames - 1, 2, height, width, generator=generator, dtype=dtype)
    masks = (torch.rand(2, 1, frames - 1, 1, height, width, generator=generator) < 0.2).to(dtype)
    return Motion(flows[0], flows[1], masks[0], masks[1])


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("concat_lq", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (8, 40)])
def test_a_perfect_network_leads_to_its_answer(parameterization: str, concat_lq: bool, steps: int, height: int, width: int) -> None:
    """Also on latents smaller than the tile in one or both directions."""
    backbone = oracle(parameterization, concat_lq)
    z = latent(height, width)
    *_, result = trajectory(backbone, z, SamplingSettings(steps=steps, tile=16, tile_overlap=8), draw)
    # x0 = x / sqrt(acp) - ... magnifies float32 rounding about 15 times at t = 999.
    torch.testing.assert_close(result, z, rtol=0, atol=1e-4)


def test_tiles_do_not_change_a_pointwise_network() -> None:
    z = latent(24, 40)
    whole = list(trajectory(oracle("v"), z, SamplingSettings(steps=3, tile=64, tile_overlap=32), draw))
    tiled = list(trajectory(oracle("v"), z, SamplingSettings(steps=3, tile=16, tile_overlap=8), draw))
    for a, b in zip(whole, tiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_every_call_is_observed() -> None:
    backbone, calls = oracle("v", concat_lq=True), list[NetworkCall]()
    z = latent(16, 24)
    list(trajectory(backbone, z, SamplingSettings(steps=3, tile=16, tile_overlap=8), draw, observe=calls.append))
    assert [(call.step, call.timestep, call.tile) for call in calls] == [(s, t, k) for s, t in ((2, 999), (1, 500), (0, 0)) for k in (0, 1)]
    for call in calls:
        assert call.x.shape == (5, 6, 16, 16)
        assert call.output.shape == (5, 3, 16, 16)
        left = 8 * call.tile
        assert torch.equal(call.lq_latent, z[..., left : left + 16])
        struct = backbone.structure(call.lq_latent, torch.tensor([call.timestep]))
        assert torch.equal(backbone.unet(call.x, torch.tensor([call.timestep]), backbone.context, struct), call.output)


def test_the_network_is_asked_once_for_calls_that_may_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """qvsr.kernels.graphs decides what is recorded; it is told each call's timestep, which it must not read back from a GPU."""
    backbone, asked, timesteps = oracle("v"), [], list[int]()

    def recorded(network):
        asked.append(network)

        def call(*arguments, timestep: int) -> torch.Tensor:
            timesteps.append(timestep)
            assert arguments[1].tolist() == [timestep]
            return network(*arguments)

        return call

    z, settings = latent(16, 24), SamplingSettings(steps=3, tile=16, tile_overlap=8)
    expected = list(trajectory(backbone, z, settings, draw))
    monkeypatch.setattr(sampler, "recorded", recorded)
    found = list(trajectory(backbone, z, settings, draw))
    assert len(asked) == 1 and asked[0] is backbone.unet and timesteps == [999, 999, 500, 500, 0, 0]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_last_step_adds_no_noise() -> None:
    def other(kind: str, shape: Sequence[int], step: int) -> torch.Tensor:
        return draw(kind, shape, step) + (100.0 if step == 0 else 0.0)

    sampling = SamplingSettings(steps=3, tile=16, tile_overlap=8)
    *_, one = trajectory(oracle(), latent(8, 8), sampling, draw)
    *_, two = trajectory(oracle(), latent(8, 8), sampling, other)
    assert torch.equal(one, two)


def test_guidance_off_is_no_guidance() -> None:
    z, motion = latent(8, 8), random_motion(5, 8, 8)
    plain = list(trajectory(oracle(), z, SamplingSettings(steps=2), draw))
    off = list(trajectory(oracle(), z, SamplingSettings(steps=2, guidance_scale=0), draw, motion))
    on = list(trajectory(oracle(), z, SamplingSettings(steps=2), draw, motion))
    assert all(torch.equal(a, b) for a, b in zip(plain, off, strict=True))
    assert not torch.equal(plain[-1], on[-1])


def test_loss_of_two_frames_pulls_both_to_zero() -> None:
    """The published quirk, isolated: with two frames there are first rounds only, and their partner is zero."""
    x = latent(8, 8)[:2]
    still = Motion(*(torch.zeros(1, 1, channels, 8, 8) for channels in (2, 2, 1, 1)))
    torch.testing.assert_close(motion_loss(x, still), x[0].abs().mean() + x[1].abs().mean())


def test_loss_warps_with_the_flow_of_the_next_pair() -> None:
    """Frames that move by one pixel a step agree under the flow of any pair; a wrong flow at the first pair goes unseen."""
    x = latent(8, 8)[:3]
    right = Motion(*(torch.zeros(1, 2, channels, 8, 8) for channels in (2, 2, 1, 1)))
    wrong = Motion(right.forward.clone(), right.backward.clone(), right.forward_occluded, right.backward_occluded)
    wrong.forward[:, 0] = 100.0
    wrong.backward[:, -1] = 100.0
    torch.testing.assert_close(motion_loss(x, wrong), motion_loss(x, right))


def test_aligned_loss_is_zero_for_frames_that_follow_their_flow() -> None:
    """A scene that moves two columns to the right, then three: every pair agrees under its own flow, and under no other."""
    scene = torch.randn(1, 4, 8, 40, generator=torch.Generator().manual_seed(1))
    x = torch.cat([scene[..., left : left + 16] for left in (12, 10, 7)])
    forward = torch.zeros(1, 2, 2, 8, 16)
    forward[:, 0, 0], forward[:, 1, 0] = 2.0, 3.0
    columns = torch.arange(16)
    gone = torch.stack([columns + 2 > 15, columns + 3 > 15]).float().view(1, 2, 1, 1, 16).expand(-1, -1, -1, 8, -1)
    new = torch.stack([columns - 2 < 0, columns - 3 < 0]).float().view(1, 2, 1, 1, 16).expand(-1, -1, -1, 8, -1)
    motion = Motion(forward, -forward, gone, new)
    assert motion_loss(x, motion, "aligned") < 1e-6
    assert motion_loss(x, motion, "published") > 0.1
    assert motion_loss(x, Motion(forward.flip(1), -forward.flip(1), gone, new), "aligned") > 0.1


def test_gradient_is_that_of_finite_differences() -> None:
    x = torch.randn(6, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    motion = random_motion(3, 3, 4, torch.float64)
    two = Motion(
        *(
            value.expand(2, *value.shape[1:])
            for value in (motion.forward, motion.backward, motion.forward_occluded, motion.backward_occluded)
        )
    )
    for pairs in ("published", "aligned"):
        assert torch.autograd.gradcheck(lambda value, pairs=pairs: motion_loss(value, two, pairs), x)


def test_guidance_descends_and_works_without_gradients_around() -> None:
    x, motion = latent(8, 8), random_motion(5, 8, 8)
    with torch.no_grad():
        guided = guide(x, motion, scale=-10.0, log_variance=-2.0)
        assert not guided.requires_grad
        assert motion_loss(guided, motion) < motion_loss(x, motion)
