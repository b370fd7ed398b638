"""Simulated motion: known shifts are found again by phase correlation, nothing leaves the photograph, draws are seeded."""

import numpy as np
import pytest
from skimage import data
from skimage.registration import phase_cross_correlation

from qvsr.data import motion
from qvsr.data.motion import Motion, Photograph, draw_mask, draw_motion, load_photograph, no_motion, simulate_clip


@pytest.fixture(scope="module")
def photograph():
    return Photograph.of(data.astronaut())


@pytest.fixture(scope="module")
def other():
    return Photograph.of(data.coffee())


def camera(photograph, path, monkeypatch, seed=0, size=96):
    """Frames of a camera on a given path, without moving patches, brightness drift or standing still."""
    monkeypatch.setattr(motion, "draw_motion", lambda *arguments, **settings: path)
    monkeypatch.setattr(motion, "STATIC", 0.0)
    monkeypatch.setattr(motion, "OBJECTS", (1.0, 0.0, 0.0))
    monkeypatch.setattr(motion, "BRIGHTNESS", 0.0)
    return simulate_clip(photograph, photograph, len(path.shift_T2), size, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(4))
def test_a_pan_moves_the_picture_by_what_it_says(photograph, monkeypatch, seed):
    shift = np.array([[0, 0], [2.5, -1.25], [5.0, -2.5]])
    clip = camera(photograph, Motion(shift, np.zeros(3), np.ones(3)), monkeypatch, seed)
    for index in (1, 2):
        found, *_ = phase_cross_correlation(clip[0].mean(2), clip[index].mean(2), upsample_factor=20)
        assert abs(found[0] - shift[index, 1]) < 0.2  # rows
        assert min(abs(found[1] - sign * shift[index, 0]) for sign in (1, -1)) < 0.2  # columns, mirrored or not
    assert np.sign(found[0]) == -1


def test_subpixel_motion_blurs_no_frame(photograph, monkeypatch):
    shift = np.stack([np.linspace(0, 1, 5), np.zeros(5)], 1)
    clip = camera(photograph, Motion(shift, np.zeros(5), np.ones(5)), monkeypatch).astype(float)
    energy = np.array([np.abs(np.diff(frame, axis=1)).mean() for frame in clip])
    assert energy.max() / energy.min() < 1.06  # bilinear sampling alone loses 20 % at half a pixel


def test_zoom_and_rotation_leave_the_centre_where_it_is(photograph, monkeypatch):
    clip = camera(photograph, Motion(np.zeros((2, 2)), np.array([0, 0.02]), np.array([1, 1.01])), monkeypatch).astype(float)
    difference = np.abs(clip[1] - clip[0]).mean(2)
    assert difference[40:56, 40:56].mean() < difference[[0, -1]].mean()


def test_a_tripod_gives_equal_frames(photograph, other, monkeypatch):
    monkeypatch.setattr(motion, "STATIC", 1.0)
    monkeypatch.setattr(motion, "OBJECTS", (1.0, 0.0, 0.0))
    monkeypatch.setattr(motion, "BRIGHTNESS", 0.0)
    clip = simulate_clip(photograph, other, 3, 64, np.random.default_rng(0))
    assert (clip == clip[:1]).all()


def test_brightness_drifts_by_at_most_eight_percent(photograph, other, monkeypatch):
    monkeypatch.setattr(motion, "STATIC", 1.0)
    monkeypatch.setattr(motion, "OBJECTS", (1.0, 0.0, 0.0))
    monkeypatch.setattr(motion, "BRIGHTNESS", 1.0)
    clip = simulate_clip(photograph, other, 5, 64, np.random.default_rng(1)).astype(float)
    steps = np.diff(clip.mean((1, 2, 3)))
    assert (steps >= 0).all() or (steps <= 0).all()
    assert 0.001 < abs(clip[4].mean() / clip[0].mean() - 1) <= 0.085


def test_objects_move_against_the_background(photograph, other, monkeypatch):
    monkeypatch.setattr(motion, "STATIC", 1.0)
    monkeypatch.setattr(motion, "OBJECTS", (0.0, 0.0, 1.0))
    monkeypatch.setattr(motion, "BRIGHTNESS", 0.0)
    clip = simulate_clip(photograph, other, 5, 96, np.random.default_rng(3)).astype(int)
    changed = (np.abs(clip - clip[:1]).max(-1) > 8)[1:].any(0).mean()
    assert 0.01 < changed < 0.9


def test_the_window_stays_inside_the_photograph(monkeypatch):
    """Across a horizontal ramp no frame shows the mirrored border: brightness goes one way only."""
    monkeypatch.setattr(motion, "OBJECTS", (1.0, 0.0, 0.0))
    monkeypatch.setattr(motion, "BRIGHTNESS", 0.0)
    ramp = np.broadcast_to(np.linspace(0, 255, 600)[None, :, None], (400, 600, 3)).round().astype(np.uint8)
    for seed in range(20):
        clip = simulate_clip(Photograph.of(ramp), Photograph.of(ramp), 5, 64, np.random.default_rng(seed)).astype(int)
        steps = np.diff(clip[:, 32, :, 0], axis=1)
        assert (steps >= -1).all() or (steps <= 1).all(), seed


@pytest.mark.parametrize("size", [32, 128, 192])
def test_any_size_even_above_the_photographs(size):
    small = Photograph.of(data.astronaut()[:100, :80])
    for seed in range(5):
        clip = simulate_clip(small, small, 3, size, np.random.default_rng(seed))
        assert clip.shape == (3, size, size, 3)
        assert clip.dtype == np.uint8


def test_the_seed_decides_everything(photograph, other):
    draws = [simulate_clip(photograph, other, 4, 64, np.random.default_rng(seed)) for seed in (5, 5, 6)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def test_paths_start_at_rest_and_speeds_vary():
    rng = np.random.default_rng(0)
    paths = [draw_motion(5, rng) for _ in range(200)]
    for path in paths:
        assert path.shift_T2[0].tolist() == [0, 0]
        assert (path.angle_T[0], path.zoom_T[0]) == (0, 1)
    speeds = np.array([np.hypot(*path.shift_T2[-1]) / 4 for path in paths])
    assert speeds.max() < 12
    assert (speeds < 1).mean() > 0.15
    assert (speeds > 4).mean() > 0.1
    assert no_motion(3).shift_T2.max() == 0


def test_masks_are_blobs(photograph):
    for seed in range(10):
        mask = draw_mask(64, np.random.default_rng(seed))
        assert mask[[0, -1]].max() == mask[:, [0, -1]].max() == 0
        assert mask[32, 32] == 1
        assert 0.2 < mask.mean() < 0.8


def test_levels_are_reductions_by_the_square_root_of_two(photograph):
    assert [round(factor, 3) for factor in photograph.factors] == [1.0, 1.414, 2.0]
    level, factor = photograph.level(2.5)
    assert (level.shape, factor) == ((256, 256, 3), pytest.approx(2.0))
    np.testing.assert_allclose(level.mean((0, 1)), photograph.levels[0].mean((0, 1)), atol=0.5)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"a photograph is HWC uint8 RGB of at least 64x64, found uint8 \(32, 100, 3\)"):
        Photograph.of(np.zeros((32, 100, 3), np.uint8))
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"a.jpg cannot be read as an image"):
        load_photograph(tmp_path / "a.jpg")
