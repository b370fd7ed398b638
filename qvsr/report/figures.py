"""Figures: the comparison picture and fidelity by bits. The same input gives the same PNG bytes (no date, no version inside)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvsr.registry import METRICS
from qvsr.report.tables import REFERENCES, bits_order, ordered, plural, row_order
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
    """One crop of the comparison picture.

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


def comparison(path: Path, panels: Sequence[Panel], caption: str = "", crop: int = 64, zoom: int = 3, columns: int = 5) -> None:
    """A strip of crops side by side, each pixel a square of `zoom` pixels; the whole first frame with the crop marked comes first.

    Args:
        path: PNG to write.
        panels: ground truth first, then bicubic, full precision and the methods.
        caption: a line below, such as the clip and the frame number.
        crop: side of the crop in pixels, cut where the first panel has most detail.
        zoom: nearest-neighbour enlargement of the crops.
        columns: crops in a row; more panels than that continue below.
    Raises:
        FigureError: no panels, or frames of different sizes.
    """
    if not panels:
        raise FigureError("the comparison picture needs at least one panel")
    shapes = {panel.frame_HWC.shape for panel in panels}
    if len(shapes) > 1:
        raise FigureError(f"the comparison picture needs frames of one size, found {sorted(shapes)}")
    if any(panel.psnr is not None for panel in panels):
        caption = f"{caption}; PSNR of the whole frame" if caption else "PSNR of the whole frame"
    crop = min(crop, *panels[0].frame_HWC.shape[:2])
    top, left = detailed_crop(panels[0].frame_HWC, crop)
    side, gap, margin, text = crop * zoom, 8, 12, 38  # pixels; `text` is the room for two lines below a crop
    rows = math.ceil(len(panels) / columns)
    block = rows * (side + text)
    height, width = panels[0].frame_HWC.shape[:2]
    overview_height = side
    overview_width = round(overview_height * width / height)
    total_width = 2 * margin + overview_width + min(columns, len(panels)) * (side + gap)
    total_height = 2 * margin + block + (18 if caption else 0)
    plt = _pyplot()
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(total_width / DPI, total_height / DPI), facecolor="white")

        def place(x: int, y: int, w: int, h: int) -> Axes:
            axes = figure.add_axes((x / total_width, 1 - (y + h) / total_height, w / total_width, h / total_height))
            axes.set_axis_off()
            return axes

        def write(x: int, y: int, words: str, **how: Any) -> None:
            figure.text(x / total_width, 1 - y / total_height, words, va="baseline", **how)

        axes = place(margin, margin, overview_width, overview_height)
        axes.imshow(panels[0].frame_HWC, interpolation="antialiased", aspect="auto")
        box = plt.Rectangle((left - 0.5, top - 0.5), crop, crop, fill=False, edgecolor="white", linewidth=2.2)
        axes.add_patch(box)
        axes.add_patch(plt.Rectangle((left - 0.5, top - 0.5), crop, crop, fill=False, edgecolor=COLOURS[1], linewidth=1.2))
        write(margin + overview_width // 2, margin + side + 15, "whole frame", ha="center", color=SOFT)
        for index, panel in enumerate(panels):
            x = margin + overview_width + gap + index % columns * (side + gap)
            y = margin + index // columns * (side + text)
            place(x, y, side, side).imshow(panel.frame_HWC[top : top + crop, left : left + crop], interpolation="nearest", aspect="auto")
            write(x + side // 2, y + side + 15, panel.label, ha="center")
            if panel.psnr is not None:
                value = "identical" if math.isinf(panel.psnr) else f"{panel.psnr:.2f} dB"
                write(x + side // 2, y + side + 28, value, ha="center", color=SOFT, fontsize=8)
        if caption:
            write(margin, total_height - margin, caption, ha="left", color=SOFT, fontsize=8)
        _save(figure, path)


def by_bits(path: Path, rows: Iterable[Row], metric: str = "psnr_fp", methods: Sequence[str] = ()) -> None:
    """A metric by bits, a line a method, with 95 % intervals over clips; a panel for each data set.

    Args:
        path: PNG to write.
        rows: result rows of any metrics; only quantized methods and `metric` are drawn.
        methods: their order; default: by name, our own last.
    Raises:
        FigureError: no row of the metric by a quantized method.
    """
    drawn = [row for row in rows if row.metric == metric and row.method not in REFERENCES]
    if not drawn:
        raise FigureError(f"no {metric} of a quantized method among the results; add {metric} to metrics and measure")
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
            limit = f", limit={own[0].limit}" if own[0].limit is not None else ""
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
        own = sorted((s for s in summaries if s.method == name and math.isfinite(s.value)), key=lambda s: levels.index(s.bits))
        if not own:
            continue
        x, y = [levels.index(s.bits) + dodge for s in own], [s.value for s in own]
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
