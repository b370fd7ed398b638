import re

import pytest

from qvsr.forecast import clips
from qvsr.plan import resolve
from qvsr.provenance import ROOT

PAPER = ROOT / "config" / "paper.yaml"


def test_a_limit_and_frames_cut_the_published_clips():
    config = resolve([PAPER], {"datasets": {"reds4": {"limit": 1, "frames": 5}}})
    assert clips.dataset_clips(config, "reds4", {}) == [clips.Clips(1, 5, 180, 320, "what is published")]
    assert clips.dataset_clips(config, "spmcs", {}) == [clips.Clips(30, 31, 135, 240, "what is published")]


def test_clips_that_are_here_are_looked_at(tmp_path):
    import cv2
    import numpy as np

    for part, height, width in (("GT", 128, 160), ("LQ", 32, 40)):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for frame in range(2):
                cv2.imwrite(str(tmp_path / part / name / f"{frame:08d}.png"), np.zeros((height, width, 3), np.uint8))
    config = resolve([PAPER], {"datasets": {"reds4": {"kind": "paired", "path": str(tmp_path), "frames": 2, "archives": []}}})
    assert clips.dataset_clips(config, "reds4", {}) == [clips.Clips(1, 2, 32, 40)] * 2


@pytest.mark.parametrize("text", ["mine", "mine=3x50x180", "mine=0x50x180x320", "=3x50x180x320"])
def test_clips_that_cannot_be_read(text):
    with pytest.raises(clips.PlanError, match=re.escape(f"--clips {text}: NAME=COUNTxFRAMESxHEIGHTxWIDTH is expected")):
        clips.parse_clips(text)


def test_the_published_sets_are_those_of_the_paper():
    """LQ frames of a quarter of the published sizes (arXiv 2508.04485 and the sets' own pages)."""
    found = {name: clips.published(name, 4) for name in ("reds4", "spmcs", "mvsr4x", "udm10", "reds30")}
    assert {name: (one.count, one.frames, one.height, one.width) for name, one in found.items()} == {
        "reds4": (4, 100, 180, 320),
        "spmcs": (30, 31, 135, 240),
        "mvsr4x": (15, 50, 180, 320),
        "udm10": (10, 32, 180, 318),
        "reds30": (30, 100, 180, 320),
    }
    assumed = [name for name, one in found.items() if one.source == "what is published; the size is assumed"]
    assert assumed == ["mvsr4x"]
    assert clips.published("vid4", 4) is None
