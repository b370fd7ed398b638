"""Calibration samples from the full-precision run."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qvsr.config import Config
from qvsr.devices import moved, pick
from qvsr.plan import clip_name, settings_digest
from qvsr.progress import progress
from qvsr.provenance import atomic_path, code_digest

CODE = ("qvsr/data/calibration.py", "qvsr/models/**/*.py")


def run(config: Config, lq: Sequence[Path], out: Path) -> None:
    """Record calibration samples; what a killed run has recorded with the same settings and code is kept.

    Args:
        lq: clip folders of LQ frames.
        out: folder of samples and their manifest.
    """
    from qvsr.data.calibration import record
    from qvsr.data.clips import read_frames_TCHW
    from qvsr.models.checkpoints import load_backbone
    from qvsr.models.flow import estimator

    device = pick(config.device)
    backbone = moved(load_backbone(config.backbone), device)
    flow = estimator(config.sampling.flow, config.backbone.flow_weights, device)
    clips = [(clip_name(folder), read_frames_TCHW(folder)) for folder in lq]
    # The workflow empties `out` before it calls again, so the recording has a folder of its own until it is complete.
    key = f"{settings_digest(config, 'backbone', 'sampling', 'calibration', 'seed', 'threads', 'device')}{code_digest(*CODE)}{backbone.digest}"
    recording = out.with_name(f".recording-{key}-{out.name}")
    for old in recording.parent.glob(f".recording-*-{out.name}") if recording.parent.is_dir() else []:
        if old != recording:
            shutil.rmtree(old)
    with alone(recording), atomic_path(out) as partial:
        with progress("calibrate") as report:
            record(backbone, clips, config.sampling, config.calibration, recording, config.seed, flow, report)
        os.rename(recording, partial)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder, made if it is missing, against other processes; wait for the one that has it.

    Where only Snakemake was killed its jobs go on, and the run that replaces it starts the same job beside one of them.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            if folder.is_dir() and os.path.samestat(os.fstat(held), folder.stat()):  # else the other one has finished and moved it
                yield
                return
        finally:
            os.close(held)
