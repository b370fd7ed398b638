"""The dataset commands on files, and how the draw of LQ frames comes from ``clip.json`` into result rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from skimage import data

import metrics  # noqa: F401 (fills the registry)
from qvsr import plan
from qvsr.config import load
from qvsr.data.clips import lq_draw, read_clip, write_clip
from qvsr.data.datasets import build_clip
from qvsr.data.published import DatasetError
from qvsr.provenance import ROOT
from qvsr.stages import dataset, measure, restore

PAPER = ROOT / "config" / "paper.yaml"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "qvsr", "dataset", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_one_clip_of_reds4_by_the_commands(tmp_path: Path) -> None:
    """At its real size: what a rehearsal does with `limit` and `frames`."""
    scene = np.tile(data.astronaut(), (2, 3, 1))
    frames = np.stack([scene[10 * t : 720 + 10 * t, :1280] for t in range(2)])
    write_clip(tmp_path / "archives" / "train_sharp" / "000", frames, {"source": "tiles"})
    chosen = [
        f"datasets.reds4.{one}" for one in (f"path={tmp_path / 'built'}", "limit=1", "frames=2", "lq=made", "degradation.preset=bicubic")
    ]
    options = ["--config", PAPER, *(part for one in chosen for part in ("--set", one))]
    built = command("build", "reds4", "--from", tmp_path / "archives", *options)
    assert built.returncode == 0, built.stderr
    assert "reds4/000: 2 frames of 1280x720, shift (+0.00, +0.00) LQ pixels" in built.stderr
    assert "warning: reds4: clip 000: 2 frames, REDS4 has 100" in built.stderr
    assert read_clip(tmp_path / "built" / "LQ" / "000").size == (320, 180)
    checked = command("check", "reds4", *options)
    assert (checked.returncode, checked.stderr.splitlines()[-1]) == (0, "reds4: 1 clip, no faults")
    (tmp_path / "built" / "LQ" / "000" / "00000001.png").unlink()
    checked = command("check", "reds4", *options)
    assert checked.returncode == 1
    assert checked.stderr.splitlines()[-1] == "error: 1 fault in reds4, named above"
    assert "fault: reds4: clip 000: " in checked.stderr and "1 frames, clip.json says 2" in checked.stderr


def test_every_set_that_is_missing_is_named_by_one_check() -> None:
    with pytest.raises(DatasetError, match="5 faults in reds4, spmcs, mvsr4x, udm10, reds30, named above"):
        dataset.check(load(PAPER, {"datasets": {name: {"path": "no/folder"} for name in load(PAPER).datasets}}), ())
    with pytest.raises(
        DatasetError, match="nothing to check: the settings have no dataset of kind reds4, spmcs, mvsr4x, udm10, reds30 or paired"
    ):
        dataset.check(load(ROOT / "config" / "default.yaml"), ())


@pytest.mark.parametrize("kind", ["folder", "paired"])
def test_rows_say_which_draw_of_lq_frames_they_are_of(tmp_path: Path, kind: str) -> None:
    frames = np.stack([data.astronaut()[:128, 60 + t : 188 + t] for t in range(2)])
    for part in ("GT", "LQ") if kind == "paired" else ("",):
        write_clip(tmp_path / "in" / part / "walk", frames[:, ::4, ::4] if part == "LQ" else frames, {"source": "photograph"})
    mine = {"kind": kind, "path": str(tmp_path / "in"), "frames": 2}
    config = plan.resolve([], {"datasets": {"mine": mine}, "evaluate": ["mine"], "metrics": ["psnr"], "picture": None})
    build_clip(config, "mine", "walk", tmp_path / "GT" / "walk", tmp_path / "LQ" / "walk")
    expected = lq_draw(read_clip(tmp_path / "LQ" / "walk").info)
    assert expected.startswith("mild 856b0902fe05468b" if kind == "folder" else "given ")
    restore.run(config, "bicubic", "W32A32", None, tmp_path / "LQ" / "walk", tmp_path / "out" / "walk")
    arguments = (["walk"], "mine", "bicubic", "W32A32", "simulated", tmp_path / "rows.jsonl")
    (row,) = measure.run(config, tmp_path / "out", tmp_path / "GT", None, *arguments)
    assert row.provenance["lq"] == expected
    (row,) = measure.run(config, tmp_path / "GT", tmp_path / "GT", None, *arguments)
    assert "lq" not in row.provenance  # the ground truth is of no draw


def test_a_clip_that_does_not_say_its_draw_has_none() -> None:
    assert [lq_draw(info) for info in ({}, {"recipe": "by hand"}, {"recipe": {"kind": "photographs"}})] == ["", "", ""]
