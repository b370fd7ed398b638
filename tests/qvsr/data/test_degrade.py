"""Degradation against SciPy, scikit-image and Pillow; determinism; what each preset does to a picture."""

import io
import itertools
import math

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage import data, metrics

from qvsr.config import DegradationSettings
from qvsr.data import degrade
from qvsr.data.degrade import DegradationError, degrade_clip, gaussian_kernel, generator, recipe_digest, resampling_matrix, sinc_kernel


@pytest.fixture(scope="module")
def clip():
    """Three frames of a photograph, panned by three pixels a frame."""
    image = data.astronaut()
    return np.stack([image[100:228, 150 + 3 * t : 278 + 3 * t] for t in range(3)])


@pytest.fixture(scope="module")
def frames(clip):
    return clip.astype(np.float32) / np.float32(255)


def moments(kernel):
    axis = np.arange(len(kernel)) - len(kernel) // 2
    x, y = np.meshgrid(axis, axis)
    return [(kernel * a * b).sum() for a, b in ((x, x), (x, y), (y, y))]


def test_gaussian_kernel_has_the_covariance_asked_for():
    xx, xy, yy = moments(gaussian_kernel(41, 3.0, 1.5, math.radians(30)))
    rotation = np.array([[math.cos(math.pi / 6), -math.sin(math.pi / 6)], [math.sin(math.pi / 6), math.cos(math.pi / 6)]])
    expected = rotation @ np.diag([9.0, 2.25]) @ rotation.T
    np.testing.assert_allclose([xx, xy, yy], [expected[0, 0], expected[0, 1], expected[1, 1]], rtol=1e-3)  # cut at 6 sigma


def test_plateau_is_flatter_than_the_gaussian():
    gaussian, plateau = gaussian_kernel(21, 2, 2, 0, beta=2.0), gaussian_kernel(21, 2, 2, 0, beta=2.0, plateau=True)
    assert plateau[10, 10] / plateau[10, 12] > 1
    assert plateau[10, 18] > gaussian[10, 18]  # a power tail against an exponential one


def test_sinc_kernel_passes_low_frequencies_and_stops_high_ones():
    response = np.abs(np.fft.fft2(np.fft.ifftshift(np.pad(sinc_kernel(21, math.pi / 2), ((54, 53), (54, 53))))))
    assert response[0, 0] == pytest.approx(1)
    assert response[0, 16] == pytest.approx(1, abs=0.1)  # a quarter of the sampling frequency is 32
    assert response[0, 56] < 0.05


def test_blur_is_scipys_convolution(frames):
    kernel = gaussian_kernel(9, 1.4, 0.7, 0.5)
    expected = np.dstack([ndimage.correlate(frames[0, ..., c], kernel, mode="mirror") for c in range(3)])
    np.testing.assert_allclose(degrade.blur(frames[0], kernel), expected, atol=2e-6)


@pytest.mark.parametrize(("kernel", "filter_"), [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)])
@pytest.mark.parametrize("size", [(32, 32), (45, 30)])
def test_antialiased_reduction_is_pillows(frames, kernel, filter_, size):
    reduced = degrade.reduce(frames[0], *size, kernel)
    for channel in range(3):
        expected = np.asarray(Image.fromarray(frames[0, ..., channel]).resize(size[::-1], filter_))
        np.testing.assert_allclose(reduced[..., channel], expected, atol=1e-5)


def test_resampling_rows_sum_to_one():
    assert resampling_matrix(50, 13, "bicubic").sum(1) == pytest.approx(1)


def test_bicubic_preset_is_pillows_reduction(clip):
    lq = degrade_clip(clip, DegradationSettings(preset="bicubic"), "a")
    channels = [Image.fromarray(clip[1, ..., c].astype(np.float32)).resize((32, 32), Image.Resampling.BICUBIC) for c in range(3)]
    expected = np.dstack(channels).clip(0, 255).round()
    assert np.abs(lq[1] - expected).max() <= 1  # halves may round either way
    assert np.mean(lq[1] != expected) < 0.01


def test_gaussian_noise_has_the_deviation_asked_for_and_gray_noise_one_value_a_pixel(frames):
    rng = np.random.default_rng(0)
    noise = [degrade.add_gaussian_noise(frame, 10, False, rng) - frame for frame in frames]
    assert np.std(noise) * 255 == pytest.approx(10, rel=0.02)
    gray = degrade.add_gaussian_noise(frames[0], 10, True, rng) - frames[0]
    assert np.abs(gray - gray[..., :1]).max() < 1e-6
    assert np.abs(noise[0] - noise[1]).max() > 0.01  # new for each frame


def test_poisson_noise_grows_with_brightness():
    levels = np.broadcast_to(np.linspace(0, 1, 256, dtype=np.float32)[None, :, None], (400, 256, 3))
    noise = degrade.add_poisson_noise(levels, 1.0, False, np.random.default_rng(0)) - levels
    deviation = noise.std(axis=(0, 2))
    np.testing.assert_allclose(deviation[64::64] ** 2, np.linspace(0, 1, 256)[64::64] / 256, rtol=0.15)  # variance of a count / 256


def test_jpeg_step_loses_what_pillows_jpeg_loses(clip, frames):
    step = degrade.compress_jpeg(frames[0], 40)
    buffer = io.BytesIO()
    Image.fromarray(clip[0]).save(buffer, "JPEG", quality=40)
    pillow = np.asarray(Image.open(buffer))
    ours = metrics.peak_signal_noise_ratio(clip[0], degrade.to_uint8(step))
    assert ours == pytest.approx(metrics.peak_signal_noise_ratio(clip[0], pillow), abs=0.5)


@pytest.mark.parametrize("codec", degrade.CODECS)
def test_video_step_keeps_frames_and_odd_sizes_and_obeys_the_bitrate(frames, codec):
    odd = np.concatenate([frames[:, :101, :99]] * 8)  # MPEG-4's rate control needs about 20 frames to take hold
    coarse, fine = (np.stack(degrade.compress_video(odd, codec, bitrate, 24)) for bitrate in (1e4, 2e6))
    assert coarse.shape == fine.shape == odd.shape
    assert np.abs(fine - odd).mean() < np.abs(coarse - odd).mean()
    np.testing.assert_array_equal(coarse, degrade.compress_video(odd, codec, 1e4, 24))


@pytest.mark.parametrize("preset", ["bicubic", "mild", "realbasicvsr"])
def test_same_seed_and_name_same_bytes_in_any_order(clip, preset):
    settings = DegradationSettings(preset=preset)
    first = {name: degrade_clip(clip, settings, name) for name in ("a", "b")}
    again = {name: degrade_clip(clip, settings, name) for name in ("b", "a")}
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert first[name].shape == (3, 32, 32, 3)
        assert first[name].dtype == np.uint8
    if preset != "bicubic":
        assert (first["a"] != first["b"]).any()
        assert (first["a"] != degrade_clip(clip, DegradationSettings(preset=preset, seed=1), "a")).any()


def test_the_published_preset_is_harder_than_mild_and_mild_than_bicubic(clip):
    """Mean over 8 draws: a single draw of the published preset may be light."""
    target = degrade_clip(clip, DegradationSettings(preset="bicubic"), "a")
    loss = {
        preset: np.mean(
            [metrics.mean_squared_error(target, degrade_clip(clip, DegradationSettings(preset=preset), str(k))) for k in range(8)]
        )
        for preset in ("mild", "realbasicvsr")
    }
    assert 0 < loss["mild"] < loss["realbasicvsr"]


def test_published_parameters():
    """methods.md's figures of arXiv 2111.12704 and 2312.00853."""
    first, second = degrade.RECIPES["realbasicvsr"]["stages"]
    assert first["blur"]["sizes"] == second["blur"]["sizes"] == list(range(7, 22, 2))
    assert sum(first["blur"]["kinds"].values()) == pytest.approx(1)
    assert (first["blur"]["sigma"], second["blur"]["sigma"]) == ([0.2, 3.0], [0.2, 1.5])
    assert (first["blur"]["probability"], second["blur"]["probability"]) == (1.0, 0.8)
    assert (first["resize"]["scale"], second["resize"]["scale"]) == ([0.15, 1.5], [0.3, 1.2])
    assert (first["noise"]["gaussian_sigma"], second["noise"]["gaussian_sigma"]) == ([1, 30], [1, 25])
    assert (first["jpeg"]["quality"], second["jpeg"]["quality"]) == ([30, 95], [30, 95])
    assert first["codec"]["bitrate"] == second["codec"]["bitrate"] == [1e4, 1e5]
    assert first["codec"]["rate"] == second["codec"]["rate"] == 1  # so that the bits of a second are those of a frame
    steps = {"sigma": 0.02, "angle": 0.31416, "beta_generalized": 0.05, "beta_plateau": 0.1, "cutoff": 0.0628}  # MGLD-VSR's settings
    assert first["blur"]["drift"] == second["blur"]["drift"] == steps
    assert (first["resize"]["drift"], second["resize"]["drift"]) == ({"scale": 0.015}, {"scale": 0.03})
    assert first["noise"]["drift"] == second["noise"]["drift"] == {"gaussian_sigma": 0.1, "poisson_scale": 0.005}
    assert first["jpeg"]["drift"] == second["jpeg"]["drift"] == {"quality": 3}


def test_every_kind_of_kernel_is_drawn_as_often_as_published():
    blur = degrade.RECIPES["realbasicvsr"]["stages"][0]["blur"]
    rng = np.random.default_rng(0)
    kernels = [degrade.draw_kernels(rng, blur, 1)[0] for _ in range(2000)]
    for kernel in kernels:
        assert kernel.sum() == pytest.approx(1)
        assert len(kernel) in blur["sizes"]
    ringing = np.mean([kernel.min() < -1e-6 for kernel in kernels])
    assert ringing == pytest.approx(0.1, abs=0.03)  # only sinc kernels have negative lobes


def test_the_default_recipe_and_bytes_stay_as_published_with_the_first_results(clip):
    """The committed numbers are of these LQ frames: the chain in its first form, step by step on the whole clip."""
    assert recipe_digest(DegradationSettings()) == "856b0902fe05468b"
    assert degrade.describe(DegradationSettings()) == {"preset": "mild", "seed": 0, "upscale": 4, "digest": "856b0902fe05468b"}
    for key in ("a", "b", "c"):
        rng = generator(0, key)
        rng.random()
        isotropic = rng.choice(2, p=[0.7, 0.3]) == 0
        size, sigma_x = int(rng.choice([7, 9, 11])), rng.uniform(0.6, 1.4)
        sigma_y, angle = (sigma_x, 0) if isotropic else (rng.uniform(0.6, 1.4), rng.uniform(-math.pi, math.pi))
        kernel = gaussian_kernel(size, sigma_x, sigma_y, angle).astype(np.float32)
        frames = [cv2.filter2D(frame / np.float32(255), -1, kernel, borderType=cv2.BORDER_REFLECT_101) for frame in clip]
        interpolation = rng.choice(["bilinear", "area", "bicubic"])
        frames = np.stack([degrade.reduce(frame, 32, 32, interpolation) for frame in frames])
        _, gray, sigma = rng.random(), rng.random() < 0.4, rng.uniform(1, 4)
        noise = rng.standard_normal((3, 32, 32, 1 if gray else 3), dtype=np.float32) * np.float32(sigma / 255)
        noisy = (np.clip(frames + noise, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(75, 96))]
        coded = [cv2.imencode(".jpg", np.ascontiguousarray(frame[..., ::-1]), quality)[1] for frame in noisy]
        expected = np.stack([cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1] for data in coded])
        np.testing.assert_array_equal(degrade_clip(clip, DegradationSettings(), key), expected)


def test_a_walk_keeps_its_steps_and_bounds():
    values = degrade.walk(np.random.default_rng(0), 0.5, 0.1, (0.4, 1.0), 400)
    assert np.abs(np.diff(values)).max() <= 0.1
    assert (min(values), max(values)) == (0.4, 1.0)  # both are reached in 400 steps
    assert degrade.walk(np.random.default_rng(0), 0.5, 0.0, (0, 1), 3) == [0.5] * 3


@pytest.mark.parametrize("kind", list(degrade.RECIPES["realbasicvsr"]["stages"][0]["blur"]["kinds"]))
def test_kernels_drift_within_a_clip(kind):
    blur = {**degrade.RECIPES["realbasicvsr"]["stages"][0]["blur"], "kinds": {kind: 1.0}}
    kernels = degrade.draw_kernels(np.random.default_rng(3), blur, 5)
    assert len({kernel.shape for kernel in kernels}) == 1
    steps = [np.abs(after - before).sum() for before, after in itertools.pairwise(kernels)]
    assert all(0 < step < 0.5 for step in steps)  # of a kernel's whole weight of 1
    steady = degrade.draw_kernels(np.random.default_rng(3), {k: v for k, v in blur.items() if k != "drift"}, 5)
    np.testing.assert_array_equal(steady[0], steady[4])
    np.testing.assert_array_equal(steady[0], kernels[0])


def test_drift_and_order_are_other_recipes_and_other_frames(clip):
    made, digests = {}, set()
    for order in ("fixed", "shuffled"):
        for drift in ("all", "jpeg", "none"):
            settings = DegradationSettings(preset="realbasicvsr", order=order, drift=drift)
            made[order, drift] = np.stack([degrade_clip(clip, settings, str(key)) for key in range(4)])
            digests.add(recipe_digest(settings))
            assert degrade.describe(settings).items() >= {"order": order, "drift": drift, "digest": recipe_digest(settings)}.items()
    assert len(digests) == 6
    for order in ("fixed", "shuffled"):
        assert (made[order, "all"] != made[order, "none"]).any()
        assert (made[order, "jpeg"] != made[order, "none"]).any()
    assert (made["fixed", "none"] != made["shuffled", "none"]).any()


def test_shuffled_steps_put_the_codec_last_in_half_of_the_clips(clip, monkeypatch):
    sizes = []
    monkeypatch.setattr(degrade, "compress_video", lambda frames, *_: sizes.append(frames[0].shape) or list(frames))
    for key in range(40):
        degrade_clip(clip, DegradationSettings(preset="realbasicvsr", order="shuffled", drift="none"), str(key))
    last = [size == (32, 32, 3) for size in sizes[1::2]]
    assert 10 < sum(last) < 30  # within three standard deviations of half of 40


def test_frames_that_drifted_apart_become_one_size_in_the_video_step(frames):
    sizes = [frames[0], frames[1][:120, :116], frames[2]]
    assert [frame.shape for frame in degrade.compress_video(sizes, "libx264", 1e5, 1)] == [(128, 128, 3)] * 3


def test_a_frame_s_bits_are_those_of_a_second_at_one_frame_a_second(frames):
    """24 frames a second at the published bitrates leave each a 24th of the bits."""
    clip = np.concatenate([frames] * 4)
    slow, fast = (np.stack(degrade.compress_video(clip, "libx264", 2e4, rate)) for rate in (1, 24))
    assert np.abs(slow - clip).mean() < 0.7 * np.abs(fast - clip).mean()


def test_order_and_drift_belong_to_the_published_preset():
    for key, value in (("order", "shuffled"), ("drift", "none")):
        with pytest.raises(ValueError, match=f"{key} is read with preset realbasicvsr only; leave it out or set that"):
            DegradationSettings(**{key: value})


def test_recipe_digest_names_everything_that_decides():
    digests = {recipe_digest(DegradationSettings(preset=p, seed=s)) for p in ("mild", "bicubic", "realbasicvsr") for s in (0, 1)}
    assert len(digests) == 6
    assert all(len(one) == 16 for one in digests)


def test_recipe_digest_changes_with_a_number(monkeypatch):
    before = recipe_digest(DegradationSettings())
    monkeypatch.setitem(degrade.RECIPES["mild"]["stages"][0]["jpeg"], "quality", [75, 94])
    assert recipe_digest(DegradationSettings()) != before


def test_generator_depends_on_seed_and_name():
    draws = {generator(seed, name).random() for seed in (0, 1) for name in ("a", "b")}
    assert len(draws) == 4


def test_errors(clip):
    with pytest.raises(DegradationError, match=r"clip x: frames of 126x128 cannot be reduced by 4; crop to multiples of 4"):
        degrade_clip(clip[:, :, :126], DegradationSettings(), "x")
    wrong = DegradationSettings.model_construct(preset="harsh", seed=0)
    with pytest.raises(DegradationError, match="no degradation preset 'harsh'; known: bicubic, mild, realbasicvsr"):
        degrade_clip(clip, wrong, "x")
