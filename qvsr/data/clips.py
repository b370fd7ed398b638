"""Clips on disk: the only reader and writer of frames.

A clip is a folder of ``00000000.png``, ``00000001.png``, … (RGB, 8 bit) and ``clip.json`` with ``source``, ``fps``, ``frames``,
``size`` ([width, height]), ``sha256`` of all pixels, and whatever else its maker wants to keep (a recipe, a method).
``clip.json`` may be missing where frames come from another program; where it is there, the frames must agree with it.
Nothing is repaired: a clip that is not whole is an error that names the file, what was found and what to do.

What is measured may come from any program, as a folder of PNG or JPEG or as a video: :func:`open_clip` says what it is, and
:func:`read_source` reads it frame by frame.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsr.provenance import atomic_path

if TYPE_CHECKING:
    import numpy as np
    from av import VideoFormat, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream
    from numpy.typing import NDArray
    from torch import Tensor

    Frames = NDArray[np.uint8]

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".y4m", ".ts")
INFO = "clip.json"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}
_COMPRESSION = 4  # zlib level; 9 takes four times as long for 2 % less


class ClipError(ValueError):
    """A clip that is not whole, or does not fit; one line with the file, what was found and what would work."""


@dataclass(frozen=True)
class Clip:
    """Frames and what is known about them.

    Attributes:
        frames_THWC: uint8 RGB.
        info: the content of ``clip.json``; only ``frames``, ``size`` and ``source`` where the file is missing.
    """

    frames_THWC: Frames
    info: dict[str, Any]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return int(self.frames_THWC.shape[2]), int(self.frames_THWC.shape[1])


def frame_name(index: int) -> str:
    """File name of a frame.

    >>> frame_name(7)
    '00000007.png'
    """
    return f"{index:08d}.png"


class PixelDigest:
    """SHA-256 of a clip's shape and pixels, frame by frame; the same for any compression of the files.

    >>> import numpy as np
    >>> frames = np.zeros((2, 4, 6, 3), np.uint8)
    >>> value = PixelDigest(2, (6, 4))
    >>> for frame in frames:
    ...     value.add(frame)
    >>> value.hexdigest() == digest(frames)
    True
    """

    def __init__(self, frames: int, size: tuple[int, int]) -> None:
        self._value = hashlib.sha256(repr((frames, size[1], size[0], 3)).encode())

    def add(self, frame_HWC: Frames) -> None:
        import numpy as np

        self._value.update(np.ascontiguousarray(frame_HWC).data)

    def hexdigest(self) -> str:
        return self._value.hexdigest()


def digest(frames_THWC: Frames) -> str:
    """SHA-256 of a clip's shape and pixels, as :class:`PixelDigest`."""
    value = PixelDigest(len(frames_THWC), (frames_THWC.shape[2], frames_THWC.shape[1]))
    for frame in frames_THWC:
        value.add(frame)
    return value.hexdigest()


# --- writing ----------------------------------------------------------------------------------------------------------


def write_clip(folder: Path, frames: Frames | Tensor, info: Mapping[str, Any]) -> None:
    """Write a clip; the folder appears whole or not at all and replaces an older one.

    Args:
        folder: the clip's folder.
        frames: THWC uint8 array, or TCHW float tensor in [0, 1], which is rounded to nearest.
        info: at least ``source``; ``fps`` if known. ``frames``, ``size`` and ``sha256`` are added.

    Raises:
        ClipError: no frames, another shape or type, values outside [0, 1], NaN.
        qvsr.provenance.DiskFullError: no room.
    """
    folder = Path(folder)
    frames_THWC = _as_uint8(frames, folder)
    height, width = frames_THWC.shape[1:3]
    whole = {"fps": None, **info, "frames": len(frames_THWC), "size": [width, height], "sha256": digest(frames_THWC)}
    if not whole.get("source"):
        raise ClipError(f"{folder}: a clip's info needs source, where its frames come from")
    with atomic_path(folder) as partial:
        partial.mkdir()
        for index, frame in enumerate(frames_THWC):
            (partial / frame_name(index)).write_bytes(encode_png(frame))
        (partial / INFO).write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


def encode_png(frame_HWC: Frames) -> bytes:
    """A PNG file of one RGB frame; the same bytes for the same pixels."""
    import cv2

    written, data = cv2.imencode(".png", cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, _COMPRESSION])
    if not written:
        raise ClipError(f"OpenCV could not encode a frame of shape {frame_HWC.shape} as PNG")
    return bytes(data)


def _as_uint8(frames: Frames | Tensor, folder: Path) -> Frames:
    import numpy as np

    if isinstance(frames, np.ndarray):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            raise ClipError(f"{folder}: a clip is written from THWC uint8 RGB, found {frames.dtype} {frames.shape}")
        return frames
    if not frames.is_floating_point() or frames.ndim != 4 or frames.shape[1] != 3 or not frames.numel():
        raise ClipError(f"{folder}: a clip is written from TCHW float RGB in [0, 1], found {frames.dtype} {tuple(frames.shape)}")
    if not frames.isfinite().all():
        bad = [index for index, frame in enumerate(frames) if not frame.isfinite().all()]
        raise ClipError(f"{folder}: frame {bad[0]} holds NaN or infinity; nothing was written")
    low, high = frames.min().item(), frames.max().item()
    if low < -1e-4 or high > 1 + 1e-4:
        raise ClipError(f"{folder}: values from {low:.3f} to {high:.3f} are not in [0, 1]; clamp or rescale before writing")
    array: Frames = (frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().contiguous().numpy()
    return array


# --- reading ----------------------------------------------------------------------------------------------------------


def read_clip(folder: Path) -> Clip:
    """Read a clip and check it.

    Raises:
        ClipError: a folder that is missing or empty, a missing frame, a PNG that is damaged or not RGB 8 bit, frames of different
            size, or frames that differ from ``clip.json`` in number, size or sha256.
    """
    folder = Path(folder)
    paths = _frame_paths(folder, (".png",))
    info = _read_info(folder)
    if info and len(paths) != info["frames"]:
        raise ClipError(f"{folder}: {len(paths)} frames, {INFO} says {info['frames']}; {_AGAIN}")
    frames = _stack([(path, read_png(path)) for path in paths])
    clip = Clip(frames, info or {"source": folder.name, "fps": None, "frames": len(paths)})
    clip.info.setdefault("size", list(clip.size))
    if list(clip.size) != list(clip.info["size"]):
        raise ClipError(f"{folder}: frames of {_by(clip.size)}, {INFO} says {_by(clip.info['size'])}; {_AGAIN}")
    if "sha256" in clip.info and digest(frames) != clip.info["sha256"]:
        raise ClipError(f"{folder}: the frames are not those that {INFO} describes (sha256 differs); {_AGAIN}")
    return clip


_AGAIN = "remove the folder and make the clip again"
_CONVERT = "convert them first, such as by ffmpeg -i IN.png -pix_fmt rgb24 OUT.png"


def read_frames_TCHW(folder: Path) -> Tensor:
    """A clip's frames as TCHW float32 in [0, 1]; errors as :func:`read_clip`."""
    import torch

    return torch.from_numpy(read_clip(folder).frames_THWC).permute(0, 3, 1, 2).float().div(255).contiguous()


def read_frame_folder(folder: Path, start: int = 0, count: int | None = None) -> Frames:
    """Frames of somebody's folder: PNG or JPEG, numbered in any way, without ``clip.json``.

    Args:
        folder: its images' names end in consecutive numbers.
        start: first frame, counted from 0.
        count: number of frames; None for all that follow.

    Raises:
        ClipError: as :func:`read_clip`; or fewer frames than asked for.
    """
    folder = Path(folder)
    paths = _frame_paths(folder, IMAGE_SUFFIXES)
    chosen = paths[start:] if count is None else paths[start : start + count]
    if not chosen or (count is not None and len(chosen) < count):
        raise ClipError(f"{folder}: {len(paths)} frames, frames {start} to {start + (count or 1) - 1} are asked for; lower start or frames")
    return _stack([(path, _read_image(path)) for path in chosen])


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def read_video(path: Path, start: int = 0, count: int | None = None) -> tuple[Frames, float | None]:
    """Frames of a video by PyAV, decoded on one thread: the same bytes on every run.

    Args:
        path: any file that FFmpeg reads.
        start: first frame, counted from 0.
        count: number of frames; None for all that follow.

    Returns:
        frames_THWC uint8 RGB, and frames a second if the file says so.

    Raises:
        ClipError: no such file, no video in it, PyAV is missing, damaged data, or fewer frames than asked for.
    """
    import numpy as np

    path = Path(path)
    frames: list[Frames] = []
    seen = 0
    with _video(path) as (container, stream):
        rate: Fraction | None = stream.average_rate
        for frame in _decode(path, container, stream):
            if seen >= start and (count is None or len(frames) < count):
                frames.append(frame_HWC(frame))
            seen += 1
            if count is not None and len(frames) == count:
                break
    if not frames or (count is not None and len(frames) < count):
        raise ClipError(f"{path}: {seen} frames, frames {start} to {start + (count or 1) - 1} are asked for; lower start or frames")
    return np.stack(frames), float(rate) if rate else None


@contextmanager
def _video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video and its first stream, set to one thread and to refuse what it notices to be damaged."""
    if not path.is_file():
        raise ClipError(f"{path}: no such video; check source and path in the configuration")
    try:
        import av
    except ImportError:
        raise ClipError(f"{path}: reading video needs PyAV: pip install av, or give a folder of frames") from None
    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        raise ClipError(f"{path}: cannot be decoded after 0 frames ({error.strerror or error}); {_UNDAMAGED}") from None
    with container:
        if not container.streams.video:
            raise ClipError(f"{path}: the file holds no video; give a video or a folder of frames")
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"err_detect": "explode+crccheck"}  # decoders fill in what is damaged and say nothing
        yield container, stream


_UNDAMAGED = "give an undamaged video"


def _decode(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    import av

    seen, size = 0, None
    try:
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ClipError(f"{path}: frame {seen} is damaged; {_UNDAMAGED}")
            if size not in (None, (frame.width, frame.height)):
                raise ClipError(f"{path}: the frames' size changes within the video; cut it to a part of one size")
            size = (frame.width, frame.height)
            yield frame
            seen += 1
    except av.FFmpegError as error:
        raise ClipError(f"{path}: cannot be decoded after {seen} frames ({error.strerror or error}); {_UNDAMAGED}") from None


def frame_HWC(frame: VideoFrame) -> Frames:
    """A decoded video frame as uint8 RGB, by FFmpeg's conversion."""
    import numpy as np

    return np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)


def read_png(path: Path) -> Frames:
    """One RGB 8-bit PNG as HWC uint8; every chunk's checksum is verified.

    Raises:
        ClipError: not a PNG, damaged or cut short, or not RGB with 8 bits.
    """
    import cv2
    import numpy as np

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ClipError(f"{path} is missing; {_AGAIN}") from None
    _check_png(data, path)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ClipError(f"{path} is a damaged PNG; restore the file, or {_AGAIN}")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _check_png(data: bytes, path: Path) -> None:
    """Walk over the chunks: decoders fill what is missing with grey and say nothing."""
    if not data.startswith(_SIGNATURE):
        raise ClipError(f"{path} is not a PNG file; restore the file, or {_AGAIN}")
    position, pixels, ended = len(_SIGNATURE), bytearray(), False
    while position + 12 <= len(data) and not ended:
        (length,) = struct.unpack(">I", data[position : position + 4])
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        if position + 12 + length > len(data):
            break
        (checksum,) = struct.unpack(">I", data[position + 8 + length : position + 12 + length])
        if zlib.crc32(kind + body) != checksum:
            raise ClipError(
                f"{path} is a damaged PNG (checksum of its {kind.decode('latin1')} chunk is wrong); restore the file, or {_AGAIN}"
            )
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            if (depth, colour) != (8, 2):
                found = f"{_COLOUR_TYPES.get(colour, 'unknown colour type')} with {depth} bits"
                raise ClipError(f"{path} is {found}, frames are RGB with 8 bits; {_CONVERT}")
            expected = height * (1 + 3 * width)
        elif kind == b"IDAT":
            pixels += body
        ended = kind == b"IEND"
        position += 12 + length
    if not ended:
        raise ClipError(f"{path} is a truncated PNG ({len(data)} bytes, no end mark); restore the file, or {_AGAIN}")
    try:
        decoded = len(zlib.decompress(bytes(pixels)))
    except zlib.error:
        decoded = -1
    if decoded != expected and data[28] == 0:  # byte 28: interlaced files have another length
        raise ClipError(f"{path} is a damaged PNG (its pixel data are incomplete); restore the file, or {_AGAIN}")


def _read_image(path: Path) -> Frames:
    return read_png(path) if path.suffix.lower() == ".png" else _read_jpeg(path)


def _read_jpeg(path: Path) -> Frames:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode != "RGB":
                raise ClipError(f"{path} is {image.mode}, frames are RGB with 8 bits; {_CONVERT}")
            return np.asarray(image)
    except OSError as error:
        raise ClipError(f"{path} cannot be read: {error}; restore the file") from None


def _frame_paths(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """A folder's frames in order, with no number left out."""
    if not folder.is_dir():
        raise ClipError(f"{folder}: no such folder of frames; check the path")
    numbered: dict[int, Path] = {}
    for path in folder.iterdir():
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        match = re.search(r"(\d+)$", path.stem)
        if not match:
            raise ClipError(f"{path}: a frame's name ends in its number, as {frame_name(0)} does; rename or remove the file")
        if int(match[1]) in numbered:
            raise ClipError(f"{path}: frame {int(match[1])} is there twice ({numbered[int(match[1])].name}); keep one clip in a folder")
        numbered[int(match[1])] = path
    if not numbered:
        raise ClipError(f"{folder}: no frames ({', '.join(suffixes)}) in the folder; check the path, or make the clip again")
    order = sorted(numbered)
    first = min(order[0], 1)  # counting starts at 0 or 1
    gaps = [index for index in range(first, order[-1] + 1) if index not in numbered]
    if gaps:
        name = _like(numbered[order[0]], gaps[0])
        raise ClipError(
            f"{folder}: frame {name} is missing ({len(order)} frames, the last is {numbered[order[-1]].name}); restore it, or {_AGAIN}"
        )
    return [numbered[index] for index in order]


def _like(path: Path, index: int) -> str:
    """The name that frame `index` would have beside `path`."""
    stem = path.stem
    digits = re.search(r"(\d+)$", stem)
    width = len(digits[1]) if digits else 0
    return f"{stem[: len(stem) - width]}{index:0{width}d}{path.suffix}"


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ClipError(f"{path} is not JSON ({error}); {_AGAIN}") from None
    if not isinstance(info, dict) or not isinstance(info.get("frames"), int):
        raise ClipError(f"{path} does not say how many frames there are; {_AGAIN}")
    return info


def _stack(frames: list[tuple[Path, Frames]]) -> Frames:
    import numpy as np

    first_path, first = frames[0]
    for path, frame in frames:
        if frame.shape != first.shape:
            raise ClipError(
                f"{path} is {frame.shape[1]}x{frame.shape[0]}, {first_path.name} is {first.shape[1]}x{first.shape[0]}; all frames of a clip have one size"
            )
    return np.stack([frame for _, frame in frames])


# --- what any program wrote, frame by frame ----------------------------------------------------------------------------

# Codecs that keep every value they are given, and those that do if their encoder was told to, which the file does not prove.
LOSSLESS = ("apng", "bmp", "ffv1", "ffvhuff", "huffyuv", "lagarith", "magicyuv", "png", "qtrle", "rawvideo", "utvideo")
EITHER = ("av1", "h264", "hevc", "vp9")


@dataclass(frozen=True)
class Source:
    """A clip that is there but not read yet: a folder of PNG or JPEG, or a video.

    Attributes:
        path: the folder or the file.
        frames: how many it promises; reading finds out.
        size: width and height in pixels.
        codec: png, jpeg, or a video's: h264, ffv1, …
        pixels: pixel format, such as rgb24 or yuv420p.
        loss: what may have been lost on the way into the file, in words; empty where nothing can have been.
        info: the content of ``clip.json``, if there is one.
    """

    path: Path
    frames: int
    size: tuple[int, int]
    codec: str
    pixels: str
    loss: str
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The clip's name: that of the folder, or of the file without its extension."""
        return _clip_name(self.path)

    def facts(self) -> dict[str, Any]:
        """What result rows keep."""
        return {"codec": self.codec, "pixels": self.pixels, "loss": self.loss, "frames": self.frames, "size": list(self.size)}


def _clip_name(path: Path) -> str:
    path = path.absolute()
    return path.name if path.is_dir() else path.stem


def find_clips(path: Path) -> dict[str, Path]:
    """Clips by name: the one that `path` is (a video, or a folder of frames), or else every folder and video below it.

    Raises:
        ClipError: nothing there, or two clips of one name.
    """
    path = Path(path)
    if path.is_file():
        return {_clip_name(path): path}
    if not path.is_dir():
        raise ClipError(f"{path}: no such video, folder of frames or folder of clips; check the path")
    visible = sorted(one for one in path.iterdir() if not one.name.startswith("."))
    if any(one.is_file() and one.suffix.lower() in IMAGE_SUFFIXES for one in visible):
        return {_clip_name(path): path}
    found: dict[str, Path] = {}
    for one in visible:
        if one.is_dir() or one.suffix.lower() in VIDEO_SUFFIXES:
            other = found.setdefault(_clip_name(one), one)
            if other != one:
                raise ClipError(f"{path}: clip {_clip_name(one)} is there twice ({other.name} and {one.name}); keep one of them")
    if not found:
        raise ClipError(f"{path}: neither frames ({', '.join(IMAGE_SUFFIXES)}) nor clips in the folder; check the path")
    return found


def open_clip(path: Path) -> Source:
    """What a folder of frames or a video is, without decoding it.

    Raises:
        ClipError: nothing there, no frames, a frame missing, another number or size than ``clip.json`` says, a video that is cut short.
    """
    path = Path(path)
    if not path.is_dir():
        return _open_video(path)
    paths, info = _frame_paths(path, IMAGE_SUFFIXES), _read_info(path)
    if info and len(paths) != info["frames"]:
        raise ClipError(f"{path}: {len(paths)} frames, {INFO} says {info['frames']}; {_AGAIN}")
    size = _image_size(paths[0])
    if list(size) != list(info.get("size", size)):
        raise ClipError(f"{path}: frames of {_by(size)}, {INFO} says {_by(info['size'])}; {_AGAIN}")
    lossy = sum(one.suffix.lower() != ".png" for one in paths)
    loss = f"{'all' if lossy == len(paths) else lossy} frames are JPEG: lossy" if lossy else ""
    return Source(path, len(paths), size, "jpeg" if lossy else "png", "rgb24", loss, info)


def _image_size(path: Path) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except OSError:
        frame = _read_image(path)  # says what is wrong with it
        return frame.shape[1], frame.shape[0]


def _open_video(path: Path) -> Source:
    with _video(path) as (container, stream):
        import av

        context = stream.codec_context
        codec, rate = context.codec.canonical_name, stream.average_rate
        packets, shown, end = 0, 0, 0.0
        try:
            for packet in container.demux(stream):  # no decoding: the containers of some formats do not say how many frames they hold
                if packet.size:
                    packets, shown = packets + 1, shown + (not packet.is_discard)
                    if packet.pts is not None and packet.time_base is not None:
                        end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        except av.FFmpegError as error:
            raise ClipError(f"{path}: cannot be read after {packets} frames ({error.strerror or error}); {_UNDAMAGED}") from None
        whole = container.duration / 1e6 if len(container.streams) == 1 and container.duration else end  # sound may last longer
        if packets < stream.frames or (rate and whole - end > 1.5 / rate):
            promised = stream.frames or round(whole * float(rate or 0))
            raise ClipError(f"{path}: the video is cut short, it holds {packets} of {promised} frames; {_UNDAMAGED}")
        if context.format is None:
            raise ClipError(f"{path}: the video's pixel format is not known; {_UNDAMAGED}")
        return Source(
            path, shown, (context.width, context.height), codec, context.format.name, _loss(codec, context.profile, context.format)
        )


def _loss(codec: str, profile: str | None, pixels: VideoFormat) -> str:
    """What a video may have lost of RGB frames with 8 bits.

    The profile "High 4:4:4 Predictive" is what lossless H.264 needs; lossy H.264 may have it too.
    """
    found = []
    if codec in EITHER:
        hint = f", though its profile {profile} allows lossless" if profile in ("High 4:4:4 Predictive", "Rext") else ""
        found.append(f"{codec} may be lossy{hint}")
    elif codec not in LOSSLESS:
        found.append(f"{codec} is lossy")
    parts = pixels.components
    if not pixels.is_rgb and not pixels.has_palette:
        planes = [(part.width, part.height) for part in parts if not part.is_alpha]
        rounded = "colour at less than full resolution" if len(set(planes)) > 1 else "colour rounded in YUV"
        found.append(f"{pixels.name} has {rounded if len(planes) > 1 else 'no colour'}")
    if max(part.bits for part in parts) > 8:
        found.append(f"{pixels.name} has more than 8 bits, which are cut")
    if any(part.is_alpha for part in parts):
        found.append(f"{pixels.name} has transparency, which is left out")
    return "; ".join(found)


def read_source(source: Source, value: PixelDigest) -> Iterator[Frames]:
    """Frames of a clip one by one as uint8 RGB, to the last one; all of them go into the digest `value`.

    Raises:
        ClipError: as :func:`read_clip` for a folder and :func:`read_video` for a video; another number or size of frames than `source` says.
    """
    seen = 0
    if source.path.is_dir():
        for path in _frame_paths(source.path, IMAGE_SUFFIXES):
            frame = _read_image(path)
            if (frame.shape[1], frame.shape[0]) != source.size:
                raise ClipError(
                    f"{path} is {frame.shape[1]}x{frame.shape[0]}, the first frame is {_by(source.size)}; all frames of a clip have one size"
                )
            value.add(frame)
            yield frame
            seen += 1
        if value.hexdigest() != source.info.get("sha256", value.hexdigest()):
            raise ClipError(f"{source.path}: the frames are not those that {INFO} describes (sha256 differs); {_AGAIN}")
        return
    with _video(source.path) as (container, stream):
        for decoded in _decode(source.path, container, stream):
            frame = frame_HWC(decoded)
            if (frame.shape[1], frame.shape[0]) != source.size:
                raise ClipError(f"{source.path}: the frames' size changes within the video; cut it to a part of one size")
            value.add(frame)
            yield frame
            seen += 1
    if seen != source.frames:
        raise ClipError(f"{source.path}: {seen} frames could be decoded of {source.frames}; {_UNDAMAGED}")


def lq_draw(info: Mapping[str, Any]) -> str:
    """Which draw of LQ frames a clip is of, by its ``clip.json``: recipe and digest; empty where that does not say.

    >>> lq_draw({"recipe": {"degradation": {"preset": "mild", "digest": "856b0902fe05468b"}}})
    'mild 856b0902fe05468b'
    """
    recipe = info.get("recipe")
    if not isinstance(recipe, Mapping):
        return ""
    made, given = recipe.get("degradation"), recipe.get("given")
    return f"{made['preset']} {made['digest']}" if made else f"given {given['digest']}" if given else ""


# --- pairs -------------------------------------------------------------------------------------------------------------


def check_pair(gt: Clip, lq: Clip, name: str, upscale: int = 4) -> None:
    """Refuse ground truth and LQ frames that do not belong together.

    Args:
        gt, lq: the clips.
        name: names them in the error.
        upscale: factor between their sizes.

    Raises:
        ClipError: other sizes than 1 to `upscale`, or another number of frames.
    """
    if len(gt.frames_THWC) != len(lq.frames_THWC):
        raise ClipError(f"clip {name}: GT has {len(gt.frames_THWC)} frames, LQ {len(lq.frames_THWC)}; both need the same frames")
    expected = (lq.size[0] * upscale, lq.size[1] * upscale)
    if gt.size != expected:
        raise ClipError(
            f"clip {name}: GT is {_by(gt.size)}, LQ {_by(lq.size)}: x{upscale} needs GT {_by(expected)}; crop or resize one of them, nothing is cropped for you"
        )


def _by(size: Any) -> str:
    return f"{size[0]}x{size[1]}"
