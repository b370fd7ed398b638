"""PSNR, SSIM, GMSD and SSIM of gradients against pyiqa, scikit-image and float64 numpy; what is refused."""

from __future__ import annotations

import itertools
import math

import cv2
import numpy as np
import pyiqa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyiqa.archs.ssim_arch import ssim as pyiqa_ssim
from scipy.ndimage import correlate, gaussian_filter, sobel
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import metrics  # noqa: F401 (fills the registry)
from metrics import _ssim
from metrics._frames import MetricError, planes
from metrics.gmsd import gmsd
from metrics.psnr import psnr
from metrics.psnr_fp import psnr_fp
from metrics.ssim import ssim
from metrics.ssim_fp import ssim_fp
from metrics.ssim_gradient import gradient_magnitude, ssim_gradient
from qvsr.registry import METRICS


def clip_pair(frames: int = 3, height: int = 33, width: int = 42, seed: int = 0, noise: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Two clips of 8-bit frames as floats: smooth structure, and the same with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = [127 + 80 * np.sin(x / (3 + c) + t) * np.cos(y / (4 + c)) for t in range(frames) for c in range(3)]
    target = np.clip(np.array(base).reshape(frames, 3, height, width) + rng.integers(-20, 20, (frames, 3, height, width)), 0, 255).round()
    pred = np.clip(target + rng.integers(-noise, noise + 1, target.shape), 0, 255)
    return tuple(torch.from_numpy(a / 255).float() for a in (pred, target))


def test_psnr_is_the_formula_in_float64() -> None:
    pred, target = clip_pair()
    mse = ((pred.double() - target.double()) ** 2).flatten(1).mean(1).numpy()
    np.testing.assert_allclose(psnr(pred, target).numpy(), -10 * np.log10(mse), rtol=1e-12)  # the same arithmetic
    for t in range(len(pred)):
        other = peak_signal_noise_ratio(target[t].double().numpy(), pred[t].double().numpy(), data_range=1.0)
        assert psnr(pred, target)[t].item() == pytest.approx(other, rel=1e-12)  # the same arithmetic


def without_ties(frames: torch.Tensor) -> torch.Tensor:
    """Pixels whose luma lies half-way between two integers, which pyiqa's float32 may round either way, made black."""
    parts = torch.tensor([299.0, 587.0, 114.0]).view(3, 1, 1) * (frames * 255).round()
    return frames * ((parts.sum(1, keepdim=True) % 1000) != 500)


def pyiqa_values(name: str, pred: torch.Tensor, target: torch.Tensor, **options: float) -> np.ndarray:
    """pyiqa frame by frame, in float64."""
    metric = pyiqa.create_metric(name, device="cpu", **options)
    return np.array([metric(pred[t : t + 1].double(), target[t : t + 1].double()).item() for t in range(len(pred))])


def test_psnr_is_pyiqa_s() -> None:
    pred, target = clip_pair()
    for crop in (0, 3):
        np.testing.assert_allclose(psnr(pred, target, crop=crop), pyiqa_values("psnr", pred, target, eps=0.0, crop_border=crop), rtol=1e-12)
        expected = pyiqa_values("psnry", pred, target, crop_border=crop)
        np.testing.assert_allclose(psnr(pred, target, colour="y", eps=1e-8, crop=crop), expected, rtol=1e-7)  # its weights are float32


def test_ssim_is_pyiqa_s() -> None:
    pred, target = (without_ties(clip) for clip in clip_pair())
    for crop in (0, 3):
        for colour, name in (("rgb", "ssimc"), ("y", "ssim")):
            expected = pyiqa_values(name, pred, target, crop_border=crop)
            np.testing.assert_allclose(ssim(pred, target, colour=colour, crop=crop), expected, atol=1e-7)  # its window is float32


def test_ssim_is_pyiqa_s_to_rounding_once_its_window_is_in_float64() -> None:
    first, second = (x[0].double() * 255 for x in clip_pair(height=90))  # more than one strip of rows
    window = torch.from_numpy(np.outer(_ssim.gaussian(), _ssim.gaussian())).expand(3, 1, 11, 11)
    expected = pyiqa_ssim(first[None], second[None], win=window, data_range=255).item()
    value = np.mean([_ssim.structural_similarity(a.numpy(), b.numpy(), 255) for a, b in zip(first, second, strict=True)])
    assert value == pytest.approx(expected, rel=1e-12)  # float64 sums in another order


def test_gmsd_is_pyiqa_s() -> None:
    pred, target = (without_ties(clip) for clip in clip_pair())
    np.testing.assert_allclose(gmsd(pred, target), pyiqa_values("gmsd", pred, target), rtol=1e-7)  # its kernels are float32


def test_ssim_of_gradients_is_pyiqa_s_ssim_of_them() -> None:
    pred, target = clip_pair(noise=25)
    for t in range(len(pred)):
        a, b = (torch.from_numpy(reference_gradients(x[t].double().numpy()))[None, None] for x in (pred, target))
        expected = pyiqa_ssim(a, b, data_range=1.0).item()
        assert ssim_gradient(pred, target)[t].item() == pytest.approx(expected, abs=1e-7)  # its window is float32


def test_psnr_of_tiny_errors_is_not_capped() -> None:
    target = torch.full((1, 3, 16, 16), 0.5)
    pred = target.clone()
    pred[0, 0, 0, 0] += 1 / 255
    expected = 10 * math.log10(3 * 256 * 255**2)
    assert psnr(pred, target).item() == pytest.approx(expected, rel=1e-5)  # 1/255 in float32
    assert psnr(pred, target, eps=1e-8).item() < 76 < expected


def test_ssim_agrees_with_scikit_image() -> None:
    pred, target = clip_pair()
    for t in range(len(pred)):
        a, b = ((x[t].permute(1, 2, 0).double().numpy() * 255).round() for x in (pred, target))
        other = structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=2, K1=0.01, K2=0.03
        )
        assert ssim(pred, target)[t].item() == pytest.approx(other, rel=1e-12)  # float64 sums in another order


def reference_gmsd(pred: np.ndarray, target: np.ndarray) -> float:
    """From the paper's equations 1 to 5 in float64, with scipy's correlation."""
    maps = []
    for image in (pred, target):
        luma = np.round(255 * np.tensordot([0.299, 0.587, 0.114], image, 1))
        height, width = (size // 2 * 2 for size in luma.shape)
        small = luma[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))
        prewitt = np.array([[1, 0, -1]] * 3) / 3
        maps.append(np.hypot(correlate(small, prewitt, mode="constant"), correlate(small, prewitt.T, mode="constant")))
    similarity = (2 * maps[0] * maps[1] + 170) / (maps[0] ** 2 + maps[1] ** 2 + 170)
    return float(similarity.std(ddof=1))


def test_gmsd_is_the_paper_s_equations() -> None:
    pred, target = clip_pair()
    for t in range(len(pred)):
        expected = reference_gmsd(pred[t].double().numpy(), target[t].double().numpy())
        assert gmsd(pred, target)[t].item() == pytest.approx(expected, abs=2e-5)  # lumas at a half may round the other way


def reference_gradients(image_CHW: np.ndarray) -> np.ndarray:
    """Sobel magnitudes of the luma by scipy, in float64, without the border that it pads."""
    luma = np.tensordot([0.299, 0.587, 0.114], image_CHW, 1)
    return (np.hypot(sobel(luma, 0), sobel(luma, 1)) / 4)[1:-1, 1:-1]


def test_ssim_of_gradients_is_scikit_image_s_on_scipy_s_gradients() -> None:
    pred, target = clip_pair(noise=25)
    for t in range(len(pred)):
        a, b = (reference_gradients(x[t].double().numpy()) for x in (pred, target))
        np.testing.assert_allclose(gradient_magnitude(pred)[t, 0].numpy(), a, atol=1e-14)  # the same arithmetic
        mean, map_ = structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, full=True)
        assert map_[5:-5, 5:-5].min() > 0  # else the floor at 0 would make another number of it
        assert ssim_gradient(pred, target)[t].item() == pytest.approx(mean, rel=1e-12)  # float64 sums in another order
        assert mean < 0.95  # a number that says something


def test_a_step_of_full_contrast_has_gradient_one_and_nothing_much_more() -> None:
    step = torch.zeros(1, 3, 16, 16)
    step[..., 8:] = 1
    assert gradient_magnitude(step).max().item() == pytest.approx(1, abs=1e-12)  # 0.299 + 0.587 + 0.114 in float64
    patches = torch.tensor(list(itertools.product((0.0, 1.0), repeat=9))).reshape(-1, 1, 3, 3)  # a convex function is largest at a corner
    assert gradient_magnitude(patches.expand(-1, 3, -1, -1)).max().item() == pytest.approx(math.sqrt(5) / 2, abs=1e-12)


def test_ssim_of_gradients_sees_blur_more_than_ssim_and_brightness_not_at_all() -> None:
    _, target = clip_pair()
    blurred = torch.from_numpy(gaussian_filter(target.numpy(), (0, 0, 1.0, 1.0)))
    assert ssim_gradient(blurred, target).max() < ssim(blurred, target).min()
    dark = target * 0.5
    torch.testing.assert_close(ssim_gradient(dark + 0.25, dark), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)  # float32 frames


def test_luma_is_another_number() -> None:
    pred, target = clip_pair()
    assert not torch.allclose(ssim(pred, target), ssim(pred, target, colour="y"), atol=1e-4)
    for metric, name in ((psnr, "psnr"), (ssim, "ssim")):
        with pytest.raises(MetricError, match=f"{name}: no colour 'hsv'; known: rgb, y, y_limited"):
            metric(pred, target, colour="hsv")


def test_limited_luma_of_black_and_white() -> None:
    black_and_white = torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2)
    assert planes("psnr", black_and_white, "y_limited")[0, 0] == pytest.approx([16 / 256, 16 / 256 + 0.859], abs=1e-12)


def test_constant_frames() -> None:
    dark, bright = torch.full((1, 3, 24, 24), 51 / 255), torch.full((1, 3, 24, 24), 102 / 255)
    assert psnr(dark, bright).item() == pytest.approx(20 * math.log10(5), rel=1e-6)  # float32 of 51/255
    c1 = (0.01 * 255) ** 2
    assert ssim(dark, bright).item() == pytest.approx((2 * 51 * 102 + c1) / (51**2 + 102**2 + c1), rel=1e-9)  # noise of the variances
    assert ssim_gradient(dark, bright).item() == pytest.approx(1, abs=1e-12)
    outermost = reference_gmsd(dark[0].double().numpy(), bright[0].double().numpy())  # of the 12x12 means: their step to the zeros beyond
    assert gmsd(dark, bright).item() == pytest.approx(outermost, rel=1e-9) and outermost > 0.01
    assert gmsd(dark, dark).item() == 0 and gmsd(torch.zeros_like(dark), torch.zeros_like(dark)).item() == 0


def test_fidelity_is_the_same_measure_against_another_clip() -> None:
    pred, target = clip_pair()
    assert torch.equal(psnr_fp(pred, target), psnr(pred, target))
    assert torch.equal(ssim_fp(pred, target), ssim(pred, target))
    assert METRICS["psnr_fp"].facts["needs"] == "fp"


def test_the_same_bits_whatever_the_number_of_threads() -> None:
    pred, target = clip_pair(frames=1, height=200, width=300)
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        first = [metric(pred, target) for metric in (ssim, gmsd, ssim_gradient)]
        cv2.setNumThreads(4)
        assert all(torch.equal(metric(pred, target), value) for metric, value in zip((ssim, gmsd, ssim_gradient), first, strict=True))
    finally:
        cv2.setNumThreads(before)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(1, 3), height=st.integers(11, 24), width=st.integers(11, 24))
def test_a_clip_with_itself_is_ideal(seed: int, frames: int, height: int, width: int) -> None:
    clip = torch.rand((frames, 3, height, width), generator=torch.Generator().manual_seed(seed))
    assert torch.isposinf(psnr(clip, clip)).all() and psnr(clip, clip).shape == (frames,)
    assert torch.equal(ssim(clip, clip), torch.ones(frames, dtype=torch.float64))
    assert torch.equal(gmsd(clip, clip), torch.zeros(frames, dtype=torch.float64))
    if min(height, width) >= 13:
        assert torch.equal(ssim_gradient(clip, clip), torch.ones(frames, dtype=torch.float64))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_frame_does_not_depend_on_its_neighbours(seed: int) -> None:
    pred, target = clip_pair(frames=4, seed=seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    for metric in (psnr, ssim, gmsd, ssim_gradient):
        assert torch.equal(metric(pred, target)[order], metric(pred[order], target[order]))


@pytest.mark.parametrize("name", ["psnr", "ssim", "gmsd", "ssim_gradient", "psnr_fp", "ssim_fp"])
def test_what_is_refused(name: str) -> None:
    metric = METRICS[name]
    good = torch.rand(5, 3, 64, 64)
    with pytest.raises(
        MetricError, match=r"prediction is \(5, 3, 64, 64\), target \(5, 3, 64, 66\); check upscale and the clips, nothing is cropped"
    ):
        metric(good, torch.rand(5, 3, 64, 66))
    broken = good.clone()
    broken[3, 1, 5, 5] = math.nan
    with pytest.raises(MetricError, match="prediction has NaN in frame 3"):
        metric(broken, good)
    with pytest.raises(MetricError, match="target has NaN in frame 3"):
        metric(good, broken)
    with pytest.raises(MetricError, match=r"prediction is in \[.*\] in frame 0; \[0, 1\] is needed"):
        metric(good * 255, good)
    with pytest.raises(MetricError, match="uint8; floating point"):
        metric((good * 255).to(torch.uint8), (good * 255).to(torch.uint8))
    with pytest.raises(MetricError, match="at least one frame"):
        metric(good[:0], good[:0])


def test_frames_smaller_than_the_window() -> None:
    small = torch.rand(1, 3, 8, 40)
    with pytest.raises(MetricError, match="ssim: frames are 8x40; at least 11x11 is needed for the window"):
        ssim(small, small)
    with pytest.raises(MetricError, match="gmsd: frames are 3x40; at least 4x4 is needed for a deviation"):
        gmsd(small[:, :, :3], small[:, :, :3])
    with pytest.raises(MetricError, match="ssim_gradient: frames are 8x40; at least 13x13 is needed for the window"):
        ssim_gradient(small, small)
    with pytest.raises(MetricError, match="psnr: frames are 8x40 with crop 4; at least 1x1 is needed for an error"):
        psnr(small, small, crop=4)
    with pytest.raises(MetricError, match="psnr: crop is -1; 0 or more pixels"):
        psnr(small, small, crop=-1)
    assert psnr(small[:, :, :1, :1], small[:, :, :1, :1] * 0.5).isfinite().all()  # one pixel has an error


def test_every_metric_states_its_facts() -> None:
    needed = {"unit", "higher_is_better", "needs", "frames", "digits", "licence"}
    for name in METRICS:
        facts = METRICS[name].facts
        assert needed <= set(facts) <= needed | {"weights", "version", "program"}, name
        assert facts["needs"] in ("gt", "fp", "none") and facts["frames"] in ("each", "pairs", "clip"), name
