"""Schedule against the closed forms in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qvsr.config import ScheduleSettings
from qvsr.models.schedule import Schedule, spaced_timesteps


@pytest.mark.parametrize("steps", [2, 3, 10, 50, 999, 1000])
def test_spacing_keeps_both_ends(steps: int) -> None:
    kept = spaced_timesteps(1000, steps)
    assert len(kept) == steps
    assert kept[0] == 0
    assert kept[-1] == 999
    gaps = np.diff(kept)
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("total", "sections", "message"),
    [
        (10, 11, "steps '11': 11 steps asked of a section of 10; ask for 10 or fewer"),
        (1000, "ddim7,3", "steps 'ddim7,3' is not a number of steps; use 50, '10,15,20' or 'ddim50'"),
        (1000, "ddim501", "steps 'ddim501': no whole stride takes exactly 501 of 1000 steps; use 501 without 'ddim'"),
        (1000, "fifty", "steps 'fifty' is not a number of steps; use 50, '10,15,20' or 'ddim50'"),
        (1000, 0, "steps '0' is not a number of steps; use 50, '10,15,20' or 'ddim50'"),
    ],
)
def test_impossible_spacing_is_refused(total: int, sections: int | str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        spaced_timesteps(total, sections)
    assert str(caught.value) == message


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_respacing_keeps_the_noise_level(steps: int) -> None:
    full = Schedule(ScheduleSettings())
    short = full.respace(steps)
    # 1 - beta is rounded to float32 once a step, so the product drifts by at most steps * 6e-8 relative.
    torch.testing.assert_close(short.alphas_cumprod, full.alphas_cumprod[list(short.timesteps)], rtol=1e-5, atol=0)


def test_one_step_starts_at_the_noisiest_timestep() -> None:
    full = Schedule(ScheduleSettings())
    assert full.for_sampling(1).timesteps == (999,)
    assert full.for_sampling(10).timesteps == full.respace(10).timesteps


def test_posterior_is_bayes_rule() -> None:
    """The product of two Gaussians in x_{i-1}, q(x_i | x_{i-1}) q(x_{i-1} | x_0), in float64."""
    schedule = Schedule(ScheduleSettings()).respace(20)
    x0, x = 0.7, -1.3
    for i in range(1, 20):
        beta, prev = float(schedule.betas[i]), float(schedule.alphas_cumprod_prev[i])
        precision = (1 - beta) / beta + 1 / (1 - prev)
        mean = (np.sqrt(1 - beta) * x / beta + np.sqrt(prev) * x0 / (1 - prev)) / precision
        assert float(schedule.posterior_variance[i]) == pytest.approx(1 / precision, rel=1e-4)
        assert float(schedule.posterior_mean(torch.tensor(x0), torch.tensor(x), i)) == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_prediction_undoes_noising(parameterization: str) -> None:
    schedule = Schedule(ScheduleSettings(parameterization=parameterization))
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 5, 6, generator=generator)
    for index in (0, 400, 999):
        x = schedule.add_noise(x0, noise, index)
        found, eps = schedule.predict(x, schedule.target(x0, noise, index), index)
        # eps is divided by sqrt(acp) = 0.07 at the last step, which magnifies float32 rounding 15 times.
        torch.testing.assert_close(found, x0, rtol=0, atol=2e-5)
        torch.testing.assert_close(eps, noise, rtol=0, atol=2e-5)


def test_a_step_for_every_row() -> None:
    schedule = Schedule(ScheduleSettings(parameterization="v"))
    x0, noise = torch.ones(3, 2, 4, 4), torch.full((3, 2, 4, 4), 0.5)
    steps = torch.tensor([0, 500, 999])
    rows = schedule.add_noise(x0, noise, steps)
    for row, step in enumerate(steps.tolist()):
        torch.testing.assert_close(rows[row], schedule.add_noise(x0[row], noise[row], step), rtol=1e-6, atol=0)
