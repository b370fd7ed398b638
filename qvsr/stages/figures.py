"""The pictures of a run: one frame side by side, and fidelity by bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qvsr import plan, results
from qvsr.config import Config
from qvsr.data.clips import read_clip
from qvsr.provenance import atomic_path


def run(config: Config, measured: Sequence[Path], out: Path) -> None:
    """Write all pictures into one folder.

    Args:
        measured: JSON-lines files of the measure stage, every clip of every row. The frames are read from the run's own folders.
    """
    from qvsr.report.figures import by_bits, comparison

    rows = results.read(*measured)
    valued = {row.metric for row in rows if row.value is not None}
    shown = next((name for name in ("psnr_fp", *config.metrics) if name in config.metrics and name in valued), None)
    with atomic_path(out) as partial:
        partial.mkdir()
        dataset, clip = plan.Plan(config).picture()
        panels, frame = comparison_panels(config, rows, dataset, clip)
        comparison(partial / "comparison.png", panels, caption=f"{dataset}/{clip}, frame {frame}")
        if shown is not None and plan.Plan(config).quantized():
            by_bits(partial / f"{shown}.png", rows, shown, config.methods)


def comparison_panels(config: Config, rows: Sequence[results.Row], dataset: str, clip: str) -> tuple[list, int]:
    """Panels for the middle frame of a clip: ground truth, bicubic, full precision, each method at the lowest bits.

    Returns:
        the panels and the number of the frame.
    """
    from qvsr.report.figures import Panel, frame_value, lowest_bits

    run, lowest, panels = plan.Plan(config), lowest_bits(config.bits), []
    rows = [row for row in rows if row.seed == config.seed]  # that of the frames which are shown
    for method, bits in run.rows():
        if bits not in (plan.UNQUANTIZED_BITS, lowest):
            continue
        frames_THWC = read_clip(Path(run.frames(dataset, clip, method, bits))).frames_THWC
        frame = len(frames_THWC) // 2
        measured = "psnr" in config.metrics and method != plan.GROUND_TRUTH
        value = frame_value(rows, "psnr", dataset, clip, method, bits, frame) if measured else None
        of = f" ({config.backbone.name})" if method == "full_precision" else "" if bits == plan.UNQUANTIZED_BITS else f" {bits}"
        panels.append(Panel(method.replace("_", " ") + of, frames_THWC[frame], value))
    return panels, frame
