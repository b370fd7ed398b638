"""Warping error: known motions, an independent warp, determinism, what is refused."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from metrics._dis import dis_flow, grey
from metrics._frames import MetricError
from metrics._warp import occlusion, shrink_and_pad, warp, warping_error
from metrics.ewarp_dis import ewarp_dis


def texture(height: int = 160, width: int = 176, seed: int = 0) -> np.ndarray:
    """Smooth random RGB texture in [0, 1], HWC."""
    noise = np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5)
    return (smooth - smooth.min()) / (smooth.max() - smooth.min())


def panning(frames: int = 4, step: int = 4) -> torch.Tensor:
    """A camera that moves by `step` pixels a frame."""
    image = texture()
    return torch.from_numpy(np.stack([image[8:136, step * t : step * t + 144] for t in range(frames)])).permute(0, 3, 1, 2).contiguous()


def test_warp_is_scipy_s_interpolation() -> None:
    rng = np.random.default_rng(1)
    image, flow = rng.random((3, 20, 30)).astype(np.float32), rng.uniform(-6, 6, (2, 20, 30)).astype(np.float32)
    y, x = np.mgrid[0:20, 0:30].astype(np.float32)
    expected = np.stack([map_coordinates(c, [y + flow[1], x + flow[0]], order=1, mode="nearest") for c in image])
    actual = warp(torch.from_numpy(image), torch.from_numpy(flow)).numpy()
    np.testing.assert_allclose(actual, expected, atol=5e-6)  # float32 coordinates up to 30


def test_half_resolution_is_the_mean_of_four() -> None:
    frames = torch.rand(2, 3, 32, 48)
    torch.testing.assert_close(shrink_and_pad(frames), frames.unflatten(3, (24, 2)).unflatten(2, (16, 2)).mean((3, 5)))


def test_full_resolution_is_only_padded() -> None:
    frames = torch.rand(1, 3, 30, 33)
    padded = shrink_and_pad(frames, scale=1)
    assert padded.shape == (1, 3, 32, 40) and torch.equal(padded[:, :, 1:31, 3:36], frames)


def test_flow_finds_a_known_motion() -> None:
    first, second = (grey(frame) for frame in shrink_and_pad(panning(2, 4)))
    flow = dis_flow(first, second)
    inner = flow[:, 8:-8, 8:-8]
    assert abs(inner[0].median().item() + 2) < 0.05 and abs(inner[1].median().item()) < 0.05  # half of 4 px, to the left


def test_motion_costs_little_and_flicker_costs_its_square() -> None:
    clip = panning()
    still = ewarp_dis(clip)
    assert still.shape == (3,) and still.max() < 2.0  # interpolation error of a smooth texture only
    flicker = clip.clone()
    flicker[1::2] = (flicker[1::2] * 0.8).clamp(0, 1)
    assert ewarp_dis(flicker).min() > 10 * still.max()


def test_error_is_summed_over_channels_and_divided_by_visible_pixels() -> None:
    nothing = torch.zeros(2, 16, 16)
    error, visible = warping_error(torch.zeros(3, 16, 16), torch.full((3, 16, 16), 0.1), nothing, nothing)
    assert visible == 256 and error == pytest.approx(3 * 0.01, rel=1e-6)  # float32 of 0.1


def test_occluded_pixels_are_left_out() -> None:
    forward, backward = torch.zeros(2, 16, 16), torch.zeros(2, 16, 16)
    backward[0, :, 8:] = 3.0  # the way back does not return: inconsistent on the right half
    assert occlusion(forward, backward)[:, 8:].all() and not occlusion(forward, backward)[:, :8].any()
    image2 = torch.zeros(3, 16, 16)
    image2[:, :, 8:] = 1.0
    assert warping_error(torch.zeros(3, 16, 16), image2, forward, backward) == (0.0, 128)


def test_the_same_bytes_on_every_call_and_any_number_of_threads() -> None:
    clip = panning()
    first = ewarp_dis(clip)
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(4)
        assert torch.equal(ewarp_dis(clip), first)
        assert cv2.getNumThreads() == 4
    finally:
        cv2.setNumThreads(before)
    assert torch.equal(ewarp_dis(clip[1:]), first[1:])  # no state from earlier pairs


def test_a_still_clip_is_ideal() -> None:
    assert torch.equal(ewarp_dis(panning(1).repeat(3, 1, 1, 1)), torch.zeros(2, dtype=torch.float64))
    assert torch.equal(ewarp_dis(torch.full((2, 3, 64, 64), 0.3)), torch.zeros(1, dtype=torch.float64))


def test_what_is_refused() -> None:
    clip = panning(2)
    with pytest.raises(MetricError, match="ewarp_dis: 1 frame; a pair of frames is needed"):
        ewarp_dis(clip[:1])
    with pytest.raises(MetricError, match="ewarp_dis: frames are 48x144; at least 64x64 is needed for optical flow"):
        ewarp_dis(clip[:, :, :48])
    with pytest.raises(MetricError, match="ewarp_dis: no preset 'slow'; known: ultrafast, fast, medium"):
        ewarp_dis(clip, preset="slow")
    with pytest.raises(MetricError, match="ewarp_dis: prediction has NaN in frame 1"):
        ewarp_dis(torch.cat([clip[:1], clip[:1] * float("nan")]))
    with pytest.raises(MetricError, match="ewarp_dis: scale is 2; above 0, at most 1 is needed"):
        ewarp_dis(clip, scale=2)
    with pytest.raises(MetricError, match="ewarp_dis: channels is 'rgb'; known: sum, mean"):
        ewarp_dis(clip, channels="rgb")
    with pytest.raises(MetricError, match="ewarp_dis: unseen is 'skip'; known: zero, refuse"):
        ewarp_dis(clip, unseen="skip")


def test_the_mean_over_channels_is_a_third_of_the_sum() -> None:
    clip = panning(2)
    torch.testing.assert_close(3 * ewarp_dis(clip, channels="mean"), ewarp_dis(clip), rtol=1e-12, atol=0)  # float64 rounding


def test_at_full_resolution_small_frames_suffice_and_the_value_is_another() -> None:
    clip = panning(2)
    assert ewarp_dis(clip[:, :, :48], scale=1).shape == (1,)
    assert abs(ewarp_dis(clip, scale=1) / ewarp_dis(clip) - 1) > 0.05


def test_a_pair_without_common_pixels_is_no_perfect_score(monkeypatch: pytest.MonkeyPatch) -> None:
    away = torch.full((2, 64, 72), 40.0)
    monkeypatch.setattr("metrics.ewarp_dis.dis_flow", lambda *_: away)
    with pytest.raises(MetricError, match="no pixel of frame 0 is found again in frame 1; is there a scene cut"):
        ewarp_dis(panning(2))
    assert ewarp_dis(panning(3), unseen="zero").tolist() == [0.0, 0.0]  # what the released script makes of it
