"""Measuring one clip: every frame is decoded once for all metrics, a few at a time, so that memory does not grow with the clip.

A metric of single frames gets chunks of frames; one of pairs gets the last frame of the chunk before as well; one of whole clips
(``frames="clip"``) gets the path and reads the files itself. Values do not depend on how a clip is cut into chunks.

Values may be kept in a folder, by content: SHA-256 of the pixels, the signature, the source of the metric, versions of packages. To know the
pixels they must be decoded: with such a folder a clip is decoded to find its values; a long one once more if a value is missing.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qvsr
from qvsr.data import assets
from qvsr.data.clips import PixelDigest, Source, read_source
from qvsr.protocols import WEIGHTS, Protocol
from qvsr.provenance import ROOT, atomic_path, file_digest, versions
from qvsr.registry import METRICS, Entry
from qvsr.results import Context, ResultError, Row, mean

if TYPE_CHECKING:
    from torch import Tensor

    from qvsr.data.clips import Frames

CHUNK = 8 * 1280 * 720  # pixels of the frames that are held at a time, of each side
KEPT = 24 * 1280 * 720  # pixels up to which a clip that was read for its digest stays in memory, as bytes, of each side
SIDES = {"pred": "the prediction", "gt": "the ground truth", "fp": "the full-precision output"}


@dataclass
class _Side:
    """One of the clips that are compared: frames of a file, or of a tensor in memory."""

    frames: int
    size: tuple[int, int]
    source: Source | None = None
    frames_TCHW: Tensor | None = None
    sha256: str = field(default="", init=False)  # known after the first reading
    kept: list[Frames] = field(default_factory=list, init=False)  # HWC uint8, of a short clip that was read for its digest

    @classmethod
    def of(cls, clip: Source | Tensor) -> _Side:
        if isinstance(clip, Source):
            return cls(clip.frames, clip.size, source=clip)
        return cls(clip.shape[0], (clip.shape[-1], clip.shape[-2]), frames_TCHW=clip)

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.size[0]}x{self.size[1]}"

    def read(self) -> Iterator[Tensor]:
        """CHW float32 in [0, 1], one by one."""
        import torch

        if self.source is None:
            assert self.frames_TCHW is not None
            yield from self.frames_TCHW
            return
        value = PixelDigest(self.frames, self.size)
        for frame_HWC in self.kept or read_source(self.source, value):
            yield torch.from_numpy(frame_HWC).permute(2, 0, 1).float().div(255)
        self.sha256 = self.sha256 or value.hexdigest()

    def hash(self) -> str:
        """SHA-256 of the pixels; reads them, if nobody has."""
        if self.source is not None and not self.sha256:
            value = PixelDigest(self.frames, self.size)
            short = self.frames * self.size[0] * self.size[1] <= KEPT
            self.kept = [frame_HWC for frame_HWC in read_source(self.source, value) if short]
            self.sha256 = value.hexdigest()
        return self.sha256

    def facts(self) -> dict[str, Any]:
        """What a row says about it; nothing of frames in memory."""
        if self.source is None:
            return {}
        return self.source.facts() | ({"sha256": self.sha256} if self.sha256 else {})


def measure_clip(
    pred: Source | Tensor,
    gt: Source | Tensor | None,
    fp: Source | Tensor | None,
    metrics: Sequence[str],
    context: Context,
    protocol: Protocol,
    *,
    require_all: bool = False,
    cache: Path | None = None,
    chunk: int | None = None,
) -> list[Row]:
    """All metrics of one restored clip, in the given order.

    The metrics must be registered (import the package `metrics` first).

    Args:
        pred: restored frames as saved: files, or TCHW, RGB in [0, 1].
        gt: ground truth likewise; None if no metric needs it.
        fp: what full precision restored from the same input and noise; None if no metric needs it.
        metrics: names.
        context: identity of the clip and of what restored it.
        protocol: fixes the options of each metric.
        require_all: a metric whose weights are not there is an error; else a row without a value that says why.
        cache: folder of values by content; for files only.
        chunk: frames that are held at a time; None: by their size, :data:`CHUNK`.
    Raises:
        ResultError: a metric needs frames that are not given, or gives NaN; frames of different number or size.
        ValueError: what a metric refuses, with the clip's name in front.
    """
    clip = ", ".join(filter(None, (f"{context.dataset}/{context.clip}".lstrip("/"), f"{context.method} {context.bits}".strip())))
    given = {name: _Side.of(one) for name, one in (("pred", pred), ("gt", gt), ("fp", fp)) if one is not None}
    asked = [METRICS[name] for name in metrics]
    for metric in asked:
        _check(metric, given, clip, protocol)
    needed = {"pred", *(metric.facts["needs"] for metric in asked)}
    sides = {name: side for name, side in given.items() if name in needed}
    frames, size, cut = _common(sides, clip, protocol)

    missing: dict[str, str] = {}
    calls: dict[str, dict[str, Any]] = {}
    for metric in asked:
        try:
            calls[metric.name] = protocol.options(metric) | _weights(metric, protocol)
        except assets.MissingError as error:
            missing[metric.name] = str(error)
    stored = _Stored(cache, asked, sides, (frames, size), protocol) if cache is not None and isinstance(pred, Source) else None
    values = {name: found for name in calls if stored is not None and (found := stored.get(name)) is not None}

    todo = [metric for metric in asked if metric.name in calls and metric.name not in values]
    for metric in todo:
        if metric.facts["frames"] == "clip":
            try:
                values[metric.name] = (_whole(metric, pred, calls[metric.name], clip),)
            except assets.MissingError as error:  # a program that is not there
                missing[metric.name] = str(error)
    if missing and require_all:
        raise ResultError("; ".join(f"{clip}: {name} has no value: {reason}" for name, reason in missing.items()))
    streamed = [metric for metric in todo if metric.facts["frames"] != "clip"]
    if streamed:
        values |= _stream(streamed, calls, sides, frames, size, chunk or max(1, CHUNK // (size[0] * size[1])), clip)
    for name, found in values.items():
        if any(math.isnan(value) for value in found):
            raise ResultError(f"{clip}: {name} is NaN; such a clip has no value")
    if stored is not None:
        stored.put(values)

    if cut:
        context = context.model_copy(update={"provenance": context.provenance | {"cut": cut}})
    inputs = {name: facts for name, side in sides.items() if (facts := side.facts())}
    return [_row(metric, values.get(metric.name), missing.get(metric.name, ""), frames, inputs, context, protocol) for metric in asked]


def _row(
    metric: Entry,
    values: tuple[float, ...] | None,
    missing: str,
    frames: int,
    inputs: Mapping[str, dict[str, Any]],
    context: Context,
    protocol: Protocol,
) -> Row:
    value, digits = None if values is None else mean(values), protocol.metrics[metric.name].clip_digits
    return Row(
        **context.model_dump(),
        metric=metric.name,
        value=value if value is None or digits is None else round(value, digits),
        missing=missing,
        per_frame=() if values is None or metric.facts["frames"] == "clip" else values,
        frames=frames,
        signature=protocol.signature(metric.name),
        inputs={name: facts for name, facts in inputs.items() if name in ("pred", metric.facts["needs"])},
    )


def _check(metric: Entry, given: Mapping[str, _Side], clip: str, protocol: Protocol) -> None:
    """Refuse what cannot be measured before a frame is read."""
    protocol.options(metric)
    protocol.check_installed(metric.name)
    needs = metric.facts["needs"]
    if needs != "none" and needs not in given:
        raise ResultError(f"{clip}: {metric.name} needs {SIDES[needs]}, which is not given; leave {metric.name} out of metrics or give it")


def _common(sides: Mapping[str, _Side], clip: str, protocol: Protocol) -> tuple[int, tuple[int, int], str]:
    """Frames and size that are measured, and how the sides were cut to them, in words.

    Raises:
        ResultError: sides of different number or size of frames, under a protocol that cuts nothing.
    """
    pred = sides["pred"]
    frames = min(side.frames for side in sides.values())
    size = min(side.size[0] for side in sides.values()), min(side.size[1] for side in sides.values())
    for name, side in sides.items():
        if (side.frames, side.size) != (pred.frames, pred.size) and protocol.frames != "common":
            raise ResultError(
                f"{clip}: {SIDES['pred']} has {pred}, {SIDES[name]} {side}; check upscale and the clips, "
                f"nothing is cut under protocol {protocol.name} (its frames: {protocol.frames})"
            )
    cut = [f"{name} of {side}" for name, side in sides.items() if (side.frames, side.size) != (frames, size)]
    return frames, size, f"{', '.join(cut)} cut to {frames} frames of {size[0]}x{size[1]}" if cut else ""


def _weights(metric: Entry, protocol: Protocol) -> dict[str, Any]:
    """The keyword by which a metric gets its files; they are those that the protocol names."""
    names = protocol.metrics[metric.name].weights
    return {WEIGHTS: assets.paths(names)} if names else {}


def _stream(
    metrics: Sequence[Entry],
    calls: Mapping[str, Mapping[str, Any]],
    sides: Mapping[str, _Side],
    frames: int,
    size: tuple[int, int],
    chunk: int,
    clip: str,
) -> dict[str, tuple[float, ...]]:
    """Values of metrics of frames and of pairs of frames."""
    found: dict[str, list[float]] = {metric.name: [] for metric in metrics}
    for first, overlap, chunks_TCHW in _chunks(sides, frames, size, chunk):
        for metric in metrics:
            pairs = metric.facts["frames"] == "pairs"
            begin = 0 if pairs else overlap
            if pairs and frames > 1 == len(chunks_TCHW["pred"]):
                continue  # a chunk of one frame, and the first: its pair comes with the next
            operands = [chunks_TCHW[name][begin:] for name in ("pred", metric.facts["needs"]) if name in chunks_TCHW]
            try:
                values = [float(value) for value in metric(*operands, **calls[metric.name])]
            except ValueError as error:
                start = first - overlap + begin
                counted = f" (frames are counted from frame {start} of the clip)" if start else ""
                raise type(error)(f"{clip}: {error}{counted}") from error
            expected = len(operands[0]) - pairs
            if len(values) != expected:
                raise ResultError(
                    f"{clip}: {metric.name} gives {len(values)} values for {len(operands[0])} frames, {expected} are expected"
                )
            found[metric.name] += values
    return {name: tuple(values) for name, values in found.items()}


def _chunks(sides: Mapping[str, _Side], frames: int, size: tuple[int, int], chunk: int) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Index of the first new frame, number of frames (0 or 1) that were in the chunk before, and frames by side.

    All sides are read to their ends, also where they are cut: a damaged frame is found, and the digest is of the whole.
    """
    import torch

    readers = {name: side.read() for name, side in sides.items()}
    width, height = size
    held: dict[str, list[Tensor]] = {name: [] for name in sides}
    for first in range(0, frames, chunk):
        for name, reader in readers.items():
            fresh = min(chunk, frames - first)
            held[name] += [frame_CHW[:, :height, :width] for frame_CHW in itertools.islice(reader, fresh)]
        # contiguous whatever the strides of its parts: sums in another order would be other values
        yield first, int(first > 0), {name: torch.stack(one).contiguous() for name, one in held.items()}
        held = {name: one[-1:] for name, one in held.items()}
    for reader in readers.values():
        for _ in reader:
            pass


def _whole(metric: Entry, pred: Source | Tensor, options: Mapping[str, Any], clip: str) -> float:
    """Value of a metric of whole clips."""
    if not isinstance(pred, Source):
        raise ResultError(f"{clip}: {metric.name} measures files, not frames in memory; leave it out")
    try:
        return float(metric(pred.path, **options))
    except assets.MissingError:
        raise
    except ValueError as error:
        raise type(error)(f"{clip}: {error}") from error


# --- values by content --------------------------------------------------------------------------------------------------


class _Stored:
    """Values of one clip's metrics in a folder, one file each.

    What cannot be read, or is not what was written, counts as not there and is written again.
    """

    def __init__(
        self, folder: Path, metrics: Sequence[Entry], sides: Mapping[str, _Side], cut: tuple[int, tuple[int, int]], protocol: Protocol
    ) -> None:
        self.folder = folder
        self.keys: dict[str, str] = {}
        self.found: set[str] = set()
        for metric in metrics:
            pixels = {name: side.hash() for name, side in sides.items() if name in ("pred", metric.facts["needs"])}
            what = [pixels, cut, protocol.signature(metric.name), source_digest(metric), qvsr.__version__, versions()]
            self.keys[metric.name] = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def _file(self, metric: str) -> Path:
        return self.folder / self.keys[metric][:2] / f"{self.keys[metric]}.json"

    def get(self, metric: str) -> tuple[float, ...] | None:
        try:
            data = json.loads(self._file(metric).read_text())
            values = tuple(float(value) for value in data["values"])
            whole = data["sha256"] == _sum(values) and values
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not whole:
            return None
        self.found.add(metric)
        return values

    def put(self, values: Mapping[str, tuple[float, ...]]) -> None:
        for metric, one in values.items():
            if metric not in self.found:
                data = {"metric": metric, "values": [str(value) for value in one], "sha256": _sum(one)}
                with atomic_path(self._file(metric)) as partial:
                    partial.write_text(json.dumps(data) + "\n")


def _sum(values: Sequence[float]) -> str:
    return hashlib.sha256(",".join(map(str, values)).encode()).hexdigest()


def source_digest(metric: Entry) -> str:
    """Digest of a metric's source: its file, and what that imports from `metrics` and `qvsr.models`."""
    return _source_digest(Path(inspect.getsourcefile(metric.function) or ""))


@functools.cache
def _source_digest(file: Path) -> str:
    files, waiting = set(), [file]
    while waiting:
        one = waiting.pop()
        if one not in files:
            files.add(one)
            waiting += _imported(one)
    return file_digest(*sorted(files))


def _imported(file: Path) -> list[Path]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    own = [name for name in sorted(names) if name.startswith(("metrics.", "qvsr.models."))]
    paths = [ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in own]
    return [path for path in paths if path.is_file()]
