"""Measured speed and memory of packed layers, one step of the U-Net or a whole clip, beside full precision; and the tables of such files.

A file is a list of rows, one a variant (:class:`qvsr.speed.timing.Row`); every row says device, threads, torch's version and the path of packed
layers. What else holds for all of them stands beside it in ``NAME.head.json``: versions, commit, cores, instructions, the machine's measured peaks,
load, what was asked for.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvsr import provenance
from qvsr.config import Config
from qvsr.provenance import atomic_path
from qvsr.registry import suggest
from qvsr.speed.timing import HEAD, KINDS, BenchError, Row
from qvsr.stages import doctor
from qvsr.stages.upscale import DEFAULT_MODEL

SECONDS, QUICK_SECONDS = {"layers": 5.0, "unet": 120.0, "clip": 60.0}, {"layers": 1.0, "unet": 2.0, "clip": 2.0}
ROUNDS, QUICK_ROUNDS = {"layers": 5, "unet": 5, "clip": 5}, {"layers": 3, "unet": 3, "clip": 1}
BUSY = 0.5  # of the cores, from which on the log says that others compute, too
log = logging.getLogger(__name__)


def check(kind: str, out: Path) -> None:
    """Refuse before anything is measured: a kind that is not known, or a file that cannot be written.

    Raises:
        BenchError: what was given, and what would work.
    """
    if kind not in KINDS:
        raise BenchError(suggest("benchmark", kind, KINDS))
    if out.suffix != ".json" or out.name.endswith(HEAD):
        raise BenchError(
            f"--out {out}: a name that ends in .json is needed, the facts about the machine are written beside it as NAME{HEAD}"
        )
    if out.is_dir():
        raise BenchError(f"--out {out} is a folder; give the name of a file")
    folder = next(one for one in out.absolute().parents if one.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BenchError(f"--out {out}: nothing can be written in {folder}; give a file in a folder of yours")


def run(
    config: Config,
    kind: str,
    out: Path,
    *,
    quick: bool = False,
    threads: int | None = None,
    seconds: float | None = None,
    model: Path = DEFAULT_MODEL,
) -> list[Row]:
    """Measure, and write rows and head; an older file of this name is replaced at the end.

    Args:
        kind: layers, unet or clip.
        quick: few layers, few rounds, one segment of the clip: a look, no result.
        threads: of torch; None: as many as there are cores.
        seconds: about, for the alternating rounds of a layer, of the U-Net, of the clip; None: :data:`SECONDS`.
        model: written by export, for the clip.
    """
    check(kind, out)
    import torch

    from qvsr.report.speed import rows_json
    from qvsr.speed import clip, layers, machine, unet

    threads = threads or machine.cores()
    torch.set_num_threads(threads)
    if kind == "clip":
        clip.check(config, model)
    path = doctor.layer_paths()[0]
    backend = "cpu" if path.execution == "packed" else path.execution
    facts = {"path": path.execution, "device": provenance.device(), "threads": threads, "torch": torch.__version__}
    before, begun = machine.load(), time.perf_counter()
    if before is not None and before > BUSY * machine.cores():
        log.warning("others compute here, too (load average %.1f, %d cores): ratios hold roughly, seconds do not", before, machine.cores())
    peaks = machine.Peaks.measure(*((0.2, 512, 2**22) if quick else ()))
    given = seconds or (QUICK_SECONDS if quick else SECONDS)[kind]
    rounds = (QUICK_ROUNDS if quick else ROUNDS)[kind]
    if kind == "layers":
        found = {shape: count for shape, count in layers.shapes(config).items() if shape.quantized}
        rows = layers.run(layers.handful(found) if quick else found, peaks, facts, backend, given, rounds)
    elif kind == "unet":
        rows = unet.run(config, peaks, facts, backend, given, rounds)
    else:
        rows = clip.run(config, model, facts, backend, given, rounds, config.sampling.frames_per_segment if quick else None)
    head: dict[str, Any] = {
        "kind": kind,
        "network": config.backbone.name,
        "quick": quick,
        **provenance.head(),
        "cores": machine.cores(),
        "features": doctor.cpu_features(),
        "reason": path.reason,
        "peaks": vars(peaks),
        "load": [before, machine.load()],
        "seconds": given,
        "rounds": rounds,
        "minutes": round((time.perf_counter() - begun) / 60, 1),
        **({"model": model.name} if kind == "clip" else {}),
    }
    with atomic_path(out.with_name(out.stem + HEAD)) as beside, atomic_path(out) as partial:
        beside.write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
        partial.write_text(rows_json(rows), encoding="utf-8")
    return rows


def summary(rows: Sequence[Row]) -> str:
    """The rows as a table for the terminal."""
    from qvsr.report.speed import clip_table, means_table, unet_table

    tables = {"unet": unet_table, "clip": clip_table}
    return "\n".join(tables.get(rows[0].kind, means_table)(rows))


def tables(files: Sequence[Path], out: Path) -> None:
    """Write the tables of files of :func:`run` into one folder: speed.md, a CSV of each kind, machine.json."""
    from qvsr.report.speed import Speed

    speed = Speed.of_files(files)
    with atomic_path(out) as partial:
        speed.write(partial)
