"""Writing videos: frames one by one, times and sound of the video that they come from.

The picture is H.264 (VP9 in a .webm file), nearly without visible loss, BT.709 and tagged so: players take untagged files of this size for that.
Encoders run on one thread: the same frames give the same bytes. Sound is copied packet by packet, never encoded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsr.data.clips import ClipError
from qvsr.provenance import atomic_path, is_disk_full

if TYPE_CHECKING:
    from qvsr.data.clips import Frames

# Without weighted prediction and the macroblock tree: with them x264 looks at what lies behind a frame's rows in memory, and on small frames up
# to half of the runs gave other bytes.
H264 = ("libx264", {"crf": "14", "preset": "medium", "x264-params": "weightp=0:no-mbtree=1"})
ENCODERS = {".mp4": H264, ".mkv": H264, ".mov": H264, ".m4v": H264, ".webm": ("libvpx-vp9", {"crf": "18", "b": "0", "cpu-used": "3"})}
BT709, LIMITED = 1, 1  # as FFmpeg numbers them


class VideoError(ClipError):
    """A video that cannot be written, or whose times cannot be kept; the message says what would work."""


@dataclass(frozen=True)
class Times:
    """When frames are shown.

    Attributes:
        rate: frames a second, on average.
        base: seconds of one tick.
        ticks: when each frame begins; empty: evenly, by the rate.
    """

    rate: Fraction
    base: Fraction
    ticks: tuple[int, ...] = ()

    @classmethod
    def even(cls, rate: Fraction) -> Times:
        return cls(rate, 1 / rate)

    def tick(self, frame: int) -> int:
        return self.ticks[frame] if self.ticks else frame


def read_times(path: Path, frames: int) -> Times:
    """Times of a video's frames, without decoding it.

    Args:
        frames: how many were decoded; where the file tells times of another number of frames, they are even.
    Raises:
        VideoError: a video that is turned by a mark in its file, which frames do not show, or one without a rate.
    """
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        found = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard and not packet.is_corrupt]
        rate, base = stream.average_rate or stream.guessed_rate, stream.time_base
    with av.open(str(path)) as container:
        turned = next(container.decode(video=0)).rotation
    if turned:
        raise VideoError(
            f"{path}: a mark in the file turns the picture by {turned} degrees; turn the frames themselves first, as ffmpeg does"
        )
    if not rate:
        raise VideoError(f"{path}: the video does not say how many frames a second it has; make a folder of its frames and give --fps")
    ticks = sorted(one for one in found if one is not None)
    if base is None or len(ticks) != len(found) or len(set(ticks)) != frames:
        return Times.even(rate)
    return Times(rate, base, tuple(ticks))


def write_video(path: Path, frames: Iterable[Frames], size: tuple[int, int], times: Times, sound_from: Path | None = None) -> None:
    """Write a video; it appears whole or not at all.

    Args:
        path: ends in one of :data:`ENCODERS`.
        frames: HWC uint8 RGB, one by one.
        size: width and height; both even.
        times: of at least as many frames.
        sound_from: a video whose sound is copied; None: none is.
    Raises:
        VideoError: an extension, a size or sound that the file cannot have.
        qvsr.provenance.DiskFullError: no room.
    """
    import av

    if path.suffix.lower() not in ENCODERS:
        raise VideoError(f"{path}: {path.suffix or 'no extension'} cannot be written; {', '.join(ENCODERS)} can, or a folder of frames")
    if size[0] % 2 or size[1] % 2:
        raise VideoError(f"{path}: a video of {size[0]}x{size[1]} cannot be written, both must be even; write a folder of frames")
    encoder, options = ENCODERS[path.suffix.lower()]
    with atomic_path(path) as partial:
        try:
            with ExitStack() as stack:
                container = stack.enter_context(av.open(str(partial), "w"))
                stream: Any = container.add_stream(encoder, rate=times.rate, options=options)
                stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
                context = stream.codec_context
                context.time_base, context.thread_count = times.base, 1
                context.colorspace = context.color_primaries = context.color_trc = BT709
                context.color_range = LIMITED
                sound = stack.enter_context(closing(_Sound(container, sound_from)))
                for index, frame_HWC in enumerate(frames):
                    converted = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
                    # into rows of their own: behind those of a conversion lies anything, and the encoder reads some of it
                    picture = av.VideoFrame.from_ndarray(converted.to_ndarray(), format="yuv420p")
                    picture.pts, picture.time_base = times.tick(index), times.base
                    picture.colorspace, picture.color_range = BT709, LIMITED
                    container.mux(stream.encode(picture))
                    sound.copy(float(times.tick(index) * times.base))
                container.mux(stream.encode(None))
                sound.copy(float("inf"))
        except (av.FFmpegError, ValueError) as error:  # a codec that a container does not know is a ValueError
            if is_disk_full(error) or isinstance(error, ClipError):
                raise
            raise VideoError(f"{path}: cannot be written ({getattr(error, 'strerror', '') or error}){_heard(sound_from, path)}") from None


def sound_codecs(path: Path) -> tuple[str, ...]:
    """Names of the codecs of a video's sound; empty where there is none."""
    import av

    with av.open(str(path)) as container:
        return tuple(stream.codec_context.name for stream in container.streams.audio)


def _heard(sound_from: Path | None, path: Path) -> str:
    codecs = sound_codecs(sound_from) if sound_from is not None else ()
    if not codecs:
        return ""
    return f"; the sound is {' and '.join(codecs)}, which a {path.suffix} file may not hold: .mkv holds any, --no-audio leaves it out"


class _Sound:
    """Packets of sound, handed on as the picture proceeds: nobody must hold all of them."""

    def __init__(self, container: Any, source: Path | None) -> None:
        import av

        self._out = container
        self._packets: Iterator[Any] = iter(())
        self._next: Any = None
        self._in: Any = None
        if source is None:
            return
        self._in = av.open(str(source))
        streams = list(self._in.streams.audio)
        if streams:
            copies = {stream.index: container.add_stream_from_template(stream) for stream in streams}
            self._packets = ((copies[packet.stream.index], packet) for packet in self._in.demux(streams) if packet.dts is not None)
            self._next = next(self._packets, None)

    def close(self) -> None:
        if self._in is not None:
            self._in.close()

    def copy(self, until: float) -> None:
        """Hand on what begins up to some second."""
        while self._next is not None and float(self._next[1].dts * self._next[1].time_base) <= until:
            stream, packet = self._next
            packet.stream = stream
            self._out.mux(packet)
            self._next = next(self._packets, None)
