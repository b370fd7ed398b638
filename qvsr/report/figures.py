"""Figures: the comparison picture and fidelity by bits. The same input gives the same PNG bytes (no date, no version inside)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvsr.plan import REFERENCES, UNQUANTIZED_BITS
from qvsr.registry import METRICS
from qvsr.report.tables import bits_order, ordered, plural, row_order
from qvsr.results import Row, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
INK, SOFT = "#222222", "#8a8a8a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: told apart by most colour-blind readers
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same glyphs everywhere
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
}


class FigureError(ValueError):
    """What cannot be drawn; the message says what is missing."""


@dataclass(frozen=True)
class Panel:
    """One frame of the comparison picture.

    Attributes:
        label: such as "quantvsr W4A4".
        frame_HWC: the whole frame, uint8 RGB; all panels of a picture have one size.
        psnr: of this frame in dB; None leaves the second line empty (the ground truth).
    """

    label: str
    frame_HWC: np.ndarray
    psnr: float | None = None


def lowest_bits(bits: Iterable[str]) -> str:
    """The configuration with the fewest bits.

    >>> lowest_bits(["W8A8", "W4A4", "W4A8"])
    'W4A4'
    """
    return max(bits, key=bits_order)


def frame_value(rows: Iterable[Row], metric: str, dataset: str, clip: str, method: str, bits: str, frame: int) -> float:
    """One frame's value of a metric, from the stored rows.

    Raises:
        FigureError: no such row, or it keeps no values by frame.
    """
    for row in rows:
        if (row.metric, row.dataset, row.clip, row.method, row.bits) == (metric, dataset, clip, method, bits) and frame < len(
            row.per_frame
        ):
            return row.per_frame[frame]
    raise FigureError(
        f"no {metric} of frame {frame} of {dataset}/{clip} by {method} {bits} among the results; measure it with {metric} first"
    )


def detailed_crop(frame_HWC: np.ndarray, size: int) -> tuple[int, int]:
    """Top and left of the square window with the most gradient, on a grid of 8 pixels; the first one if several are equal."""
    grey = frame_HWC.astype(np.float64).mean(2)
    energy = np.zeros_like(grey)
    energy[:, 1:] += np.abs(np.diff(grey, axis=1))
    energy[1:] += np.abs(np.diff(grey, axis=0))
    total = np.pad(energy.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    height, width = grey.shape
    if size > min(height, width):
        raise FigureError(f"a crop of {size} pixels does not fit into frames of {height}x{width}")
    corners = [(top, left) for top in range(0, height - size + 1, 8) for left in range(0, width - size + 1, 8)]
    sums = [total[t + size, x + size] - total[t, x + size] - total[t + size, x] + total[t, x] for t, x in corners]
    return corners[int(np.argmax(sums))]


def comparison(path: Path, panels: Sequence[Panel], caption: str = "", crop: int = 128, zoom: int = 3, columns: int = 5) -> None:
    """A strip of frames side by side, each pixel a square of `zoom` pixels: what the files hold, nothing is resampled.

    Args:
        path: PNG to write.
        panels: ground truth first, then bicubic, full precision and the methods.
        caption: a line below, such as the clip and the frame number.
        crop: largest side in pixels; of a larger frame the square of this side with most detail in the first panel is shown.
        zoom: nearest-neighbour enlargement.
        columns: most panels in a row; more than that continue below, in rows as equal as can be.
    Raises:
        FigureError: no panels, or frames of different sizes.
    """
    from PIL import Image

    if not panels:
        raise FigureError("the comparison picture needs at least one panel")
    shapes = {panel.frame_HWC.shape for panel in panels}
    if len(shapes) > 1:
        raise FigureError(f"the comparison picture needs frames of one size, found {sorted(shapes)}")
    full_height, full_width = panels[0].frame_HWC.shape[:2]
    height, width, top, left = full_height, full_width, 0, 0
    notes = [caption, f"every pixel {zoom}×{zoom}"]
    if max(height, width) > crop:
        height = width = min(crop, full_height, full_width)
        top, left = detailed_crop(panels[0].frame_HWC, height)
        notes.append(f"{width}×{height} of {full_width}×{full_height} pixels, from row {top} and column {left}")
    if any(panel.psnr is not None for panel in panels):
        notes.append("PSNR of the whole frame")
    # pixels; a page shows such a strip at half its size, so the letters are twice as large as in the other figures
    gap, text = 12, 68
    rows = math.ceil(len(panels) / columns)
    columns = math.ceil(len(panels) / rows)  # eight panels are four and four, not five and three
    total_width = columns * (width * zoom + gap) + gap
    total_height = rows * (height * zoom + gap + text) + text // 2
    plt = _pyplot()
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(total_width / DPI, total_height / DPI), facecolor="white")

        def write(x: float, y: float, words: str, size: float, room: int, **how: Any) -> None:
            """Words whose baseline is `y` pixels from above, `size` pixels high, or less where `room` pixels of width need it."""
            size = min(size, room / (0.6 * len(words)))  # no text of this font is wider than that
            figure.text(x / total_width, 1 - y / total_height, words, va="baseline", fontsize=size * 72 / DPI, **how)

        corners = []
        for index, panel in enumerate(panels):
            x, y = gap + index % columns * (width * zoom + gap), gap + index // columns * (height * zoom + gap + text)
            corners.append((x, y))
            middle, below = x + width * zoom / 2, y + height * zoom
            write(middle, below + 30, panel.label, 25, width * zoom, ha="center")
            if panel.psnr is not None:
                value = "identical" if math.isinf(panel.psnr) else f"{panel.psnr:.2f} dB"
                write(middle, below + 60, value, 23, width * zoom, ha="center", color=SOFT)
        write(gap, total_height - gap, "; ".join(filter(None, notes)), 20, total_width - 2 * gap, ha="left", color=SOFT)
        figure.canvas.draw()
        picture_HWC = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
        plt.close(figure)
    # the frames go over matplotlib's pixels, which therefore cannot touch theirs
    for (x, y), panel in zip(corners, panels, strict=True):
        window = panel.frame_HWC[top : top + height, left : left + width]
        picture_HWC[y : y + height * zoom, x : x + width * zoom] = window.repeat(zoom, 0).repeat(zoom, 1)
    Image.fromarray(picture_HWC).save(path, format="png", optimize=True)


def by_bits(path: Path, rows: Iterable[Row], metric: str = "psnr_fp", methods: Sequence[str] = ()) -> None:
    """A metric by bits, a line a method, with 95 % intervals over clips; a panel for each data set.

    Args:
        path: PNG to write.
        rows: result rows of any metrics; only quantized methods and `metric` are drawn.
        methods: their order; default: by name, our own last.
    Raises:
        FigureError: no row of the metric by a quantized method.
    """
    drawn = [row for row in rows if row.metric == metric and row.method not in REFERENCES and row.bits != UNQUANTIZED_BITS]
    if not drawn:
        raise FigureError(f"no {metric} of a quantized method among the results; add {metric} to metrics and measure")
    if all(row.missing for row in drawn):
        raise FigureError(f"{metric} has no value to draw: {drawn[0].missing}")
    summaries = ordered(drawn, methods)
    datasets = list(dict.fromkeys((s.backbone, s.dataset) for s in summaries))
    names = sorted({s.method for s in summaries}, key=lambda name: row_order(name, "", methods))
    levels = sorted({s.bits for s in summaries}, key=bits_order)
    plt = _pyplot()
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(datasets), figsize=(4.6 * len(datasets), 3.2), sharey=True, squeeze=False)
        for axes, (backbone, dataset) in zip(grid[0], datasets, strict=True):
            own = [s for s in summaries if (s.backbone, s.dataset) == (backbone, dataset)]
            _draw_lines(axes, own, names, levels)
            limit = (f", {own[0].seeds} seeds" if own[0].seeds > 1 else "") + (
                f", limit={own[0].limit}" if own[0].limit is not None else ""
            )
            bars = "; bars: 95 % interval" if own[0].clips > 1 else ""
            axes.set_title(f"{dataset} ({plural(own[0].clips, 'clip')}{limit}{bars})", loc="left", fontsize=9)
        unit = METRICS[metric].facts["unit"]
        better = "higher" if METRICS[metric].facts["higher_is_better"] else "lower"
        grid[0][0].set_ylabel(f"{metric}{f' ({unit})' if unit else ''}, {better} is better")
        figure.tight_layout()
        _save(figure, path, 2 * DPI)


def _draw_lines(axes: Axes, summaries: Sequence[Summary], names: Sequence[str], levels: Sequence[str]) -> None:
    """Points with intervals, side by side within each precision, and each method's name at its last point."""
    ends: list[tuple[float, str, str]] = []
    for index, name in enumerate(names):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        dodge = 0.07 * (index - (len(names) - 1) / 2)  # intervals of several methods do not hide each other
        valued = [(s, s.value) for s in summaries if s.method == name and s.value is not None and math.isfinite(s.value)]
        valued.sort(key=lambda pair: levels.index(pair[0].bits))
        if not valued:
            continue
        own, y = [s for s, _ in valued], [value for _, value in valued]
        x = [levels.index(s.bits) + dodge for s in own]
        axes.plot(x, y, color=colour, linewidth=1.4, marker=marker, markersize=4.5, markeredgecolor="white", markeredgewidth=0.6, zorder=3)
        for at, s in zip(x, own, strict=True):
            if s.low is not None and s.high is not None:
                axes.plot([at, at], [s.low, s.high], color=colour, linewidth=1.1, alpha=0.45, solid_capstyle="butt", zorder=2)
        ends.append((y[-1], name, colour))
    axes.set_xticks(range(len(levels)), levels)
    axes.set_xlim(-0.3, len(levels) - 1 + 0.3)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    low, high = axes.get_ylim()
    spacing, last = 0.055 * (high - low), -math.inf
    for end, name, colour in sorted(ends):  # from below; a name that would cover the one before moves up
        last = max(end, last + spacing)
        axes.text(len(levels) - 1 + 0.3, last, name, color=colour, va="center", ha="left")


def _pyplot() -> Any:
    """pyplot with the drawing backend that needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})  # matplotlib's version would otherwise be in the file
    _pyplot().close(figure)
