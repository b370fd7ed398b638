"""tOF and flicker: values worked out by hand, what they are blind to, what is refused."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics._frames import MetricError
from metrics.flicker import flicker
from metrics.tof import tof


def panning(steps: list[int], size: int = 96) -> torch.Tensor:
    """A texture that has moved by so many pixels to the left in each frame."""
    noise = np.random.default_rng(0).random((size, size + 32, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5)
    image = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return torch.from_numpy(np.stack([image[:, step : step + size] for step in steps])).permute(0, 3, 1, 2).contiguous()


def test_tof_is_the_difference_of_two_known_motions() -> None:
    still, slow, fast = panning([0, 0, 0]), panning([0, 2, 4]), panning([0, 5, 10])
    assert tof(slow, still).tolist() == pytest.approx([2, 2], abs=0.3)  # what comes in at the right border is not found
    assert tof(fast, slow).tolist() == pytest.approx([3, 3], abs=0.3)
    upright = tof(slow.transpose(2, 3), still.transpose(2, 3))
    assert upright.tolist() == pytest.approx([2, 2], abs=0.3)
    both = tof(slow, slow.transpose(2, 3))  # 2 to the left against 2 up: the end points are sqrt(8) apart, not 4
    assert both.tolist() == pytest.approx([math.sqrt(8)] * 2, abs=0.3)


def test_tof_is_blind_to_what_does_not_move() -> None:
    clip = panning([0, 2, 4])
    assert tof(0.5 * clip + 0.2, clip).max() < 0.1
    assert torch.equal(tof(clip, clip), torch.zeros(2, dtype=torch.float64))
    dark, bright = torch.full((2, 3, 32, 32), 0.2), torch.full((2, 3, 32, 32), 0.7)
    assert tof(dark, bright).item() == 0  # nothing to follow in either


def test_tof_of_a_pair_does_not_depend_on_the_others() -> None:
    pred, target = panning([0, 2, 4, 7]), panning([0, 1, 3, 4])
    assert torch.equal(torch.cat([tof(pred[t : t + 2], target[t : t + 2]) for t in range(3)]), tof(pred, target))
    assert tof(pred, target, preset="fast").shape == (3,) and not torch.equal(tof(pred, target, preset="fast"), tof(pred, target))


def test_flicker_by_hand() -> None:
    target = torch.zeros(4, 3, 2, 2)
    pred = target.clone()
    pred[1, 0, 0, 0] = 12 / 255  # one of twelve values is 12 grey levels brighter in one frame
    pred[3] = 5 / 255
    assert flicker(pred, target).tolist() == pytest.approx([1, 1, 5], rel=1e-6)  # float32 of 12/255
    assert flicker(1 - pred, 1 - target).tolist() == pytest.approx([1, 1, 5], rel=1e-4)  # float32 near 1
    extremes = flicker(torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)]), torch.stack([torch.ones(3, 2, 2), torch.zeros(3, 2, 2)]))
    assert extremes.item() == 510


def test_flicker_is_blind_to_an_error_that_stays() -> None:
    target = panning([0, 2, 4]) * 0.5
    assert torch.equal(flicker(target, target), torch.zeros(2, dtype=torch.float64))
    assert flicker(target + 0.25, target).max() < 1e-4  # grey levels; float32 sums
    assert flicker(target[:1].repeat(3, 1, 1, 1), target).min() > 1  # a picture that stands still where the target moves


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(2, 5))
def test_flicker_is_symmetric_and_cut_anywhere(seed: int, frames: int) -> None:
    pred, target = torch.rand((2, frames, 3, 5, 7), generator=torch.Generator().manual_seed(seed))
    whole = flicker(pred, target)
    assert torch.equal(flicker(target, pred), whole)
    assert torch.equal(torch.cat([flicker(pred[t : t + 2], target[t : t + 2]) for t in range(frames - 1)]), whole)


@pytest.mark.parametrize("metric", [tof, flicker])
def test_what_is_refused(metric) -> None:
    clip, name = torch.rand(2, 3, 40, 40), metric.__name__
    with pytest.raises(MetricError, match=f"{name}: 1 frame; a pair of frames is needed"):
        metric(clip[:1], clip[:1])
    with pytest.raises(MetricError, match=rf"{name}: prediction is \(2, 3, 40, 40\), target \(2, 3, 40, 41\)"):
        metric(clip, torch.rand(2, 3, 40, 41))
    broken = clip.clone()
    broken[1, 0, 0, 0] = math.nan
    with pytest.raises(MetricError, match=f"{name}: prediction has NaN in frame 1"):
        metric(broken, clip)


def test_tof_refuses_small_frames_and_unknown_presets() -> None:
    clip = torch.rand(2, 3, 31, 40)
    with pytest.raises(MetricError, match="tof: frames are 31x40; at least 32x32 is needed for optical flow"):
        tof(clip, clip)
    with pytest.raises(MetricError, match="tof: no preset 'slow'; known: ultrafast, fast, medium"):
        tof(torch.rand(2, 3, 40, 40), torch.rand(2, 3, 40, 40), preset="slow")
