"""A video or a folder of frames to one of four times the size, segment by segment, with an exported model.

Nothing of the length of the clip is held in memory. Every finished segment is kept as PNG files in a hidden folder beside the output
(``.NAME.upscale``) with what was asked for; the same command goes on with them. The output appears whole under its name at the end, or not
at all, and the folder goes.

The noise is keyed by the clip's name, which is that of the file without its extension or of the folder, unless another is given: two runs agree,
also when the file was moved, and two clips differ. For the same name, seed, model and number of threads the frames are those of the
restore stage, byte for byte.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsr.data import clips
from qvsr.provenance import ROOT, DiskFullError, atomic_path, code_digest
from qvsr.registry import suggest

if TYPE_CHECKING:
    from torch import Tensor

    from qvsr.config import SamplingSettings
    from qvsr.data.clips import Frames, Source
    from qvsr.data.video import Times
    from qvsr.models.noise import NoiseSource
    from qvsr.quant.exported import Model

DEFAULT_MODEL = ROOT / "weights" / "mgld-mini-quantvsr-W4A4.safetensors"
PRECISIONS = ("float32", "bfloat16")
CODE = ("qvsr/models/**/*.py", "qvsr/quant/**/*.py", "qvsr/kernels/**/*.py", "qvsr/kernels/csrc/cpu/*")
PNG_SHARE = 0.35  # of the bytes of raw frames, at least: restored frames of the small model took 0.37 to 0.78
STATE = "state.json"
log = logging.getLogger(__name__)


class UpscaleError(ValueError):
    """An input, an output or a state of a stopped run that upscaling cannot go on with; the message says what would work."""


class StoppedError(Exception):
    """Ctrl-C; the message says how to go on."""


def run(
    source: Path,
    out: Path,
    model_file: Path = DEFAULT_MODEL,
    *,
    execution: str = "auto",
    precision: str = "float32",
    seed: int = 42,
    steps: int | None = None,
    clip: str = "",
    fps: float | None = None,
    audio: bool = True,
    overwrite: bool = False,
    device: str = "cpu",
) -> str:
    """Upscale one clip; returns the execution that was used.

    Args:
        source: a video, or a folder of PNG or JPEG frames.
        out: a video by its extension, or a folder of PNG frames.
        model_file: written by the export stage.
        execution: packed, simulated, or auto (:func:`qvsr.quant.apply.choose_execution`).
        precision: float32, or bfloat16 for what the U-Net does not quantize (:func:`qvsr.quant.apply.set_precision`).
        seed: of the noise.
        steps: of sampling; None: the model's.
        clip: what the noise is keyed by; empty: the name of `source`.
        fps: of a video made of a folder that does not say it.
        audio: copy the sound of a video.
        overwrite: replace `out`, and a stopped run that was given other options.
    Raises:
        UpscaleError, ClipError, ModelError, RestoreError: an input that is no clip, an output that is there, a model that is none.
        StoppedError: Ctrl-C.
        DiskFullError: no room for the frames.
    """
    import torch

    from qvsr.quant import apply, exported

    check_out(source, out, overwrite)
    opened = clips.open_clip(source)
    if not opened.frames:
        raise UpscaleError(f"{source}: the video has no frames; give one that has")
    times = times_of(opened, fps) if out.suffix else None
    content = read_through(opened)
    execution = apply.choose_execution(execution, device)
    if precision not in PRECISIONS:
        raise UpscaleError(suggest("precision", precision, PRECISIONS))
    model = exported.load(model_file, execution)
    if precision != "float32":
        apply.set_precision(model.backbone.unet, getattr(torch, precision))
    sampling = model.sampling if steps is None else model.sampling.model_copy(update={"steps": steps})
    if not 1 <= sampling.steps <= model.backbone.settings.schedule.timesteps:
        raise UpscaleError(f"--steps {sampling.steps}: from 1 to {model.backbone.settings.schedule.timesteps} work")
    asked = {
        "input": content,
        "model": model.header["digest"],
        "execution": execution,
        "precision": precision,
        "seed": seed,
        "steps": sampling.steps,
        "clip": clip or opened.name,
        "threads": torch.get_num_threads(),
        "device": device,
        "code": code_digest(*CODE),
    }
    with Work.begin(out, asked, opened.frames, sampling, overwrite) as work:
        work.check_room(opened.size, sampling.upscale)
        try:
            restore(opened, content, model, sampling, work, asked)
            assemble(out, opened, sampling, work, times, model, asked, audio)
        except KeyboardInterrupt:
            raise StoppedError(f"stopped: {work.kept()} are kept in {work.folder}; the same command goes on with them") from None
        except DiskFullError as error:
            raise DiskFullError(
                f"{out}: no space left ({shutil.disk_usage(work.folder).free / 1e6:.1f} MB free); {work.kept()} are kept in {work.folder}: "
                "free some space, then run the same command"
            ) from error
        work.remove()
    return execution


def check_out(source: Path, out: Path, overwrite: bool) -> None:
    """Refuse an output that cannot be written, or must not be."""
    from qvsr.data.video import ENCODERS

    if out.suffix and out.suffix.lower() not in ENCODERS and not out.is_dir():
        raise UpscaleError(
            f"{out}: {out.suffix} cannot be written; {', '.join(ENCODERS)} can, or a folder of frames, a name without extension"
        )
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise UpscaleError(f"{out} is the input or lies in it; give another place")
    if not out.exists():
        return
    if not overwrite:
        raise UpscaleError(f"{out} exists; give another name, or --overwrite")
    if out.is_dir() != (not out.suffix):
        raise UpscaleError(
            f"{out} is a {'folder' if out.is_dir() else 'file'}, which a {'video' if out.suffix else 'folder of frames'} cannot replace"
        )
    strange = [one.name for one in sorted(out.iterdir()) if one.suffix != ".png" and one.name != clips.INFO] if out.is_dir() else []
    if strange:
        raise UpscaleError(f"{out} holds more than frames ({strange[0]}): it is not overwritten; give another folder")


def times_of(source: Source, fps: float | None) -> Times:
    """When the frames of a video output are shown: as in the input, unless a rate is given."""
    from qvsr.data.video import Times, read_times

    if not source.path.is_dir():
        if fps:
            raise UpscaleError(f"{source.path} is a video, which keeps its own times: --fps is for folders of frames")
        return read_times(source.path, source.frames)
    rate = fps or source.info.get("fps")
    if not rate:
        raise UpscaleError(f"{source.path}: the folder of frames does not say how many frames a second it has; give --fps")
    return Times.even(Fraction(rate).limit_denominator(1001))


def read_through(source: Source) -> str:
    """Decode everything once, before hours of work: SHA-256 of all pixels. A damaged frame or a change of size is an error now."""
    pixels = clips.PixelDigest(source.frames, source.size)
    for _ in clips.read_source(source, pixels):
        pass
    return pixels.hexdigest()


def restore(source: Source, content: str, model: Model, sampling: SamplingSettings, work: Work, asked: dict[str, Any]) -> None:
    """Restore every segment that is not there yet."""
    from qvsr.data.assets import find
    from qvsr.devices import moved, pick
    from qvsr.models.flow import estimator
    from qvsr.models.noise import KeyedNoise
    from qvsr.models.pipeline import network_calls, restore_segments, to_uint8
    from qvsr.progress import progress

    device = pick(asked["device"])
    backbone = moved(model.backbone, device)
    flow = estimator(sampling.flow, find("raft-things") if sampling.flow == "raft" else None, device)
    noise = KeyedNoise(asked["seed"], asked["clip"])
    missing = work.missing()
    if len(missing) < work.segments:
        log.info("%s are there from a stopped run", work.kept())
    one = network_calls(source.size[1], source.size[0], work.length, sampling, backbone.settings.first_stage.factor)
    pixels, done = clips.PixelDigest(source.frames, source.size), 0
    with progress(f"upscale {source.name}") as report:

        def called(calls: int, _all: int) -> None:
            report(done + calls, one * len(missing))

        for number, frames in enumerate(_groups(clips.read_source(source, pixels), work.length)):
            if number not in missing:
                continue
            where = f"{source.name}, segment {number}"
            (restored,) = restore_segments(backbone, _tensor(frames), sampling, _From(noise, number), flow, progress=called, clip=where)
            work.keep(number, to_uint8(restored, sampling.rounding).numpy())
            done += one
    if pixels.hexdigest() != content:
        raise UpscaleError(f"{source.path} has changed while it was read; run the same command with --overwrite")


def assemble(
    out: Path,
    source: Source,
    sampling: SamplingSettings,
    work: Work,
    times: Times | None,
    model: Model,
    asked: dict[str, Any],
    audio: bool,
) -> None:
    """The output from the kept frames, whole or not at all."""
    size = (source.size[0] * sampling.upscale, source.size[1] * sampling.upscale)
    if times is not None:
        from qvsr.data.video import write_video

        write_video(out, map(clips.read_png, work.files()), size, times, source.path if audio and not source.path.is_dir() else None)
        return
    made = model.header["quantized"]
    pixels = clips.PixelDigest(source.frames, size)
    with atomic_path(out) as partial:
        partial.mkdir()
        for file in work.files():
            pixels.add(clips.read_png(file))
            _link(file, partial / file.name)
        info = {
            "source": asked["clip"],
            "fps": source.info.get("fps"),
            "method": made["method"],
            "bits": made["bits"],
            "frames": source.frames,
        }
        info |= {
            "size": list(size),
            "sha256": pixels.hexdigest(),
            **{key: asked[key] for key in ("model", "execution", "precision", "seed", "steps")},
        }
        (partial / clips.INFO).write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")


@dataclass(frozen=True)
class Work:
    """The folder of finished segments beside an output.

    Attributes:
        frames: of the whole clip.
        length: frames of a segment.
    """

    folder: Path
    out: Path
    frames: int
    length: int

    @classmethod
    @contextmanager
    def begin(cls, out: Path, asked: dict[str, Any], frames: int, sampling: SamplingSettings, overwrite: bool) -> Iterator[Work]:
        """The folder of a new run, or of one that was stopped and was asked for the same; no other process may use it meanwhile.

        Raises:
            UpscaleError: a run of other options was stopped here, or one goes on.
        """
        folder = out.parent / f".{out.name}.upscale"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UpscaleError(f"{out}: another process is making it; wait for that, or give another name") from None
            work = cls(folder, out, frames, sampling.frames_per_segment)
            asked = {**asked, "frames": frames, "length": work.length}
            before = json.loads((folder / STATE).read_text()) if (folder / STATE).is_file() else None
            if before is not None and before != asked:
                key = next(key for key in asked if before.get(key) != asked[key])
                if not overwrite:
                    raise UpscaleError(
                        f"{out}: a stopped run is kept in {folder}, but its {key} was {before.get(key)}, now {asked[key]}: give the same options "
                        "and files to go on with it, or --overwrite to begin anew"
                    )
                before = None
            if before is None:
                for old in folder.iterdir():
                    if old.is_dir():
                        shutil.rmtree(old)
                with atomic_path(folder / STATE) as partial:
                    partial.write_text(json.dumps(asked, indent=1, sort_keys=True) + "\n")
            try:
                yield work
            finally:
                if folder.is_dir() and not any(one.is_dir() for one in folder.iterdir()):
                    shutil.rmtree(folder)  # nothing to go on with

    @property
    def segments(self) -> int:
        return -(-self.frames // self.length)

    def _folder(self, segment: int) -> Path:
        return self.folder / f"{segment:08d}"

    def numbers(self, segment: int) -> range:
        """Numbers of a segment's frames in the clip."""
        return range(segment * self.length, min((segment + 1) * self.length, self.frames))

    def missing(self) -> set[int]:
        """Segments that are not there; one with a frame that cannot be read is removed."""
        found = set()
        for segment in range(self.segments):
            folder = self._folder(segment)
            try:
                for number in self.numbers(segment):
                    clips.read_png(folder / clips.frame_name(number))
            except clips.ClipError:
                found.add(segment)
                shutil.rmtree(folder, ignore_errors=True)
        return found

    def keep(self, segment: int, frames_THWC: Frames) -> None:
        """Write the frames of a segment, all or none."""
        with atomic_path(self._folder(segment)) as partial:
            partial.mkdir()
            for number, frame in zip(self.numbers(segment), frames_THWC, strict=True):
                (partial / clips.frame_name(number)).write_bytes(clips.encode_png(frame))

    def files(self) -> Iterator[Path]:
        """Files of all frames in order."""
        for segment in range(self.segments):
            for number in self.numbers(segment):
                yield self._folder(segment) / clips.frame_name(number)

    def kept(self) -> str:
        """How many frames are there, for messages."""
        there = sum(len(self.numbers(segment)) for segment in range(self.segments) if self._folder(segment).is_dir())
        return f"{there} of {self.frames} frames"

    def check_room(self, size: tuple[int, int], upscale: int) -> None:
        """Refuse to begin what cannot end: there must be room for the frames that are missing."""
        there = sum(self._folder(segment).is_dir() for segment in range(self.segments)) * self.length
        needed = max(0, self.frames - there) * size[0] * size[1] * upscale**2 * 3 * PNG_SHARE
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise DiskFullError(
                f"{self.out}: no space left for its frames: at least {needed / 1e6:.1f} MB are needed beside it, {free / 1e6:.1f} MB are free"
            )

    def remove(self) -> None:
        """The output is there: the segments are no longer needed."""
        shutil.rmtree(self.folder)


class _From:
    """Noise of a clip that is restored in pieces: the piece's first segment has a number of its own."""

    def __init__(self, noise: NoiseSource, first: int) -> None:
        self._noise, self._first = noise, first

    def draw(self, kind: str, shape: Sequence[int], *, segment: int, patch: int, step: int) -> Tensor:
        return self._noise.draw(kind, shape, segment=self._first + segment, patch=patch, step=step)


def _groups(frames: Iterator[Frames], length: int) -> Iterator[list[Frames]]:
    group: list[Frames] = []
    for frame in frames:
        group.append(frame)
        if len(group) == length:
            yield group
            group = []
    if group:
        yield group


def _tensor(frames: list[Frames]) -> Tensor:
    """Frames as the restore stage hands them to the networks: TCHW float32 in [0, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float().div(255).contiguous()


def _link(file: Path, to: Path) -> None:
    """A second name for a file, or a copy where the file system has none: a stopped run keeps what it had."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
