"""The data sets of the paper: what is published about them, where their archives keep the clips, and the manifest of a built one.

Facts come from the papers, the released scripts and the authors' pages (arXiv 2508.04485, arXiv 2312.00853, arXiv 2505.16239). What was not
found stated there is not in ``certain``: a data set that differs from it is a warning, from the rest an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvsr.provenance import atomic_path

MANIFEST = "manifest.json"
FORMAT = 1


class DatasetError(ValueError):
    """A dataset that cannot be had as configured; one line with the key, what was found and what would work."""


@dataclass(frozen=True)
class Published:
    """A data set of the paper.

    Attributes:
        title: as the paper writes it.
        count: clips.
        frames: of a clip.
        size: width and height of the ground truth; None where it is not stated anywhere.
        clips: their names; empty where they are not published with the paper.
        certain: which of clips, frames and size are stated by the set's authors.
        gt, lq: where archives keep a clip's folder, as patterns below their folder; tried in turn.
        lq_at_gt_size: the published LQ frames may be as large as the ground truth.
        real: pairs of two lenses, not of a degradation.
    """

    title: str
    count: int
    frames: int
    size: tuple[int, int] | None
    clips: tuple[str, ...]
    certain: frozenset[str]
    gt: tuple[str, ...]
    lq: tuple[str, ...]
    lq_at_gt_size: bool = False
    real: bool = False


def _places(part: str, title: str, *more: str) -> tuple[str, ...]:
    """The authors' own copies are data/SET/{GT,LQ}/CLIP (released evaluation scripts); `more` are those of the sets' first authors."""
    return (f"{part}/{{clip}}", f"**/{title}/{part}/{{clip}}", *more)


PUBLISHED = {
    "reds4": Published(
        title="REDS4",
        count=4,
        frames=100,
        size=(1280, 720),
        clips=("000", "011", "015", "020"),  # of REDS' train part
        certain=frozenset({"clips", "frames", "size"}),
        gt=_places("GT", "REDS4", "**/train_sharp/{clip}"),
        lq=_places("LQ", "REDS4"),
    ),
    "spmcs": Published(
        title="SPMCS",
        count=30,
        frames=31,
        size=(960, 540),
        clips=(),
        certain=frozenset({"frames"}),
        gt=_places("GT", "SPMCS", "**/{clip}/truth"),
        lq=_places("LQ", "SPMCS"),
    ),
    "mvsr4x": Published(
        title="MVSR4x",
        count=15,
        frames=50,
        size=None,
        clips=(),
        certain=frozenset(),
        gt=_places("GT", "MVSR4x"),
        lq=_places("LQ", "MVSR4x"),
        lq_at_gt_size=True,
        real=True,
    ),
    "udm10": Published(
        title="UDM10",
        count=10,
        frames=32,
        size=(1272, 720),
        clips=(),
        certain=frozenset(),
        gt=_places("GT", "UDM10", "**/{clip}/truth"),
        lq=_places("LQ", "UDM10"),
    ),
    "reds30": Published(
        title="REDS30",
        count=30,
        frames=100,
        size=(1280, 720),
        clips=tuple(f"{index:03d}" for index in range(30)),  # taken to be REDS' validation part
        certain=frozenset({"size"}),
        gt=_places("GT", "REDS30", "**/val_sharp/{clip}"),
        lq=_places("LQ", "REDS30"),
    ),
}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What ``dataset build`` recorded; None where nothing was built.

    Raises:
        DatasetError: a file that is not such a record.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not JSON ({error}); restore it, or delete it and build the dataset again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not isinstance(manifest.get("clips"), dict):
        raise DatasetError(f"{path} is no record of format {FORMAT}; restore it, or delete it and build the dataset again")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the record; it appears whole or not at all."""
    with atomic_path(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
