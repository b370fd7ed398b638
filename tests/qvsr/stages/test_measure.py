"""The measure stage on one clip and on folders of clips."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import metrics  # noqa: F401 (fills the registry)
from qvsr.config import load
from qvsr.data.clips import ClipError, write_clip
from qvsr.provenance import ROOT
from qvsr.stages import measure as stage

SHAPE = (3, 48, 40, 3)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two clips, predicted and true."""
    generator = np.random.default_rng(0)
    for clip in ("walk", "bikes"):
        for role in ("pred", "gt"):
            write_clip(tmp_path / role / clip, generator.integers(0, 256, SHAPE, dtype=np.uint8), {"source": clip, "fps": None})
    return tmp_path


def measure(folders: Path, pred: str, out: str, *clips: str) -> dict[tuple[str, str], float]:
    config = load(ROOT / "config" / "default.yaml", {"metrics": ["psnr", "gmsd"]})
    stage.run(config, folders / "pred" / pred, folders / "gt" / pred, None, clips, "", "any", "W4A4", "simulated", folders / out)
    return lines(folders / out)


def lines(file: Path) -> dict[tuple[str, str], float]:
    return {(row["clip"], row["metric"]): row["value"] for row in map(json.loads, file.read_text().splitlines())}


def test_a_folder_of_clips_gives_what_its_clips_give(folders: Path) -> None:
    single = measure(folders, "bikes", "bikes.jsonl") | measure(folders, "walk", "walk.jsonl")
    assert measure(folders, ".", "all.jsonl") == single
    assert set(single) == {(clip, metric) for clip in ("bikes", "walk") for metric in ("psnr", "gmsd")}


def test_psnr_by_hand_and_only_the_named_clips(folders: Path) -> None:
    found = measure(folders, ".", "out.jsonl", "walk")
    assert {clip for clip, _ in found} == {"walk"}
    generator = np.random.default_rng(0)
    pred, gt = (generator.integers(0, 256, SHAPE, dtype=np.uint8).astype(np.float64) / 255 for _ in range(2))
    expected = np.mean([-10 * np.log10(np.mean((p - g) ** 2)) for p, g in zip(pred, gt, strict=True)])
    assert found["walk", "psnr"] == pytest.approx(expected, abs=1e-4)


def test_a_clip_that_is_not_there_is_named_and_nothing_is_written(folders: Path) -> None:
    with pytest.raises(ClipError, match="stroll"):
        measure(folders, ".", "out.jsonl", "walk", "stroll")
    assert not (folders / "out.jsonl").exists()
