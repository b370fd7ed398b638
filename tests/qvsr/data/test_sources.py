"""Clips of other programs, frame by frame: what is recognised, what is lossy, what is refused and what it says to do."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from qvsr.data.clips import ClipError, PixelDigest, digest, find_clips, open_clip, read_source, read_video, write_clip


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Noise: nothing lossy can keep it."""
    return np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)


def write_video(path: Path, frames: np.ndarray, codec: str, pixels: str, **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def read(path: Path) -> tuple[np.ndarray, str]:
    """All frames, and their digest."""
    source = open_clip(path)
    value = PixelDigest(source.frames, source.size)
    return np.stack(list(read_source(source, value))), value.hexdigest()


# --- what it is ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "loss"),
    [
        ("a.mkv", "ffv1", "bgr0", ""),
        ("a.avi", "huffyuv", "rgb24", ""),
        ("a.avi", "ffvhuff", "rgb24", ""),
        ("a.avi", "utvideo", "gbrp", ""),
        ("a.avi", "rawvideo", "bgr24", ""),
        ("a.mov", "png", "rgb24", ""),
        ("a.mov", "qtrle", "rgb24", ""),
        ("a.mkv", "ffv1", "gbrp10le", "gbrp10le has more than 8 bits, which are cut"),
        ("a.mov", "qtrle", "argb", "argb has transparency, which is left out"),
        ("a.mkv", "ffv1", "yuv420p", "yuv420p has colour at less than full resolution"),
        ("a.mkv", "ffv1", "yuv444p", "yuv444p has colour rounded in YUV"),
        ("a.mkv", "ffv1", "gray", "gray has no colour"),
        ("a.mp4", "libx264", "yuv420p", "h264 may be lossy; yuv420p has colour at less than full resolution"),
        ("a.mkv", "libx264rgb", "rgb24", "h264 may be lossy, though its profile High 4:4:4 Predictive allows lossless"),
        ("a.mp4", "mpeg4", "yuv420p", "mpeg4 is lossy; yuv420p has colour at less than full resolution"),
        ("a.avi", "mjpeg", "yuvj420p", "mjpeg is lossy; yuvj420p has colour at less than full resolution"),
    ],
)
def test_lossy_videos_are_recognised(tmp_path: Path, frames: np.ndarray, name: str, codec: str, pixels: str, loss: str) -> None:
    path = write_video(tmp_path / name, frames, codec, pixels, **({"crf": "0"} if codec == "libx264rgb" else {}))
    source = open_clip(path)
    assert (source.frames, source.size, source.name, source.loss) == (12, (64, 48), "a", loss)
    found, value = read(path)
    if not loss:  # what is called lossless is
        np.testing.assert_array_equal(found, frames)
        assert value == digest(frames)


def test_a_folder_of_png_and_a_video_of_the_same_pixels_have_the_digest_of_clip_json(tmp_path: Path, frames: np.ndarray) -> None:
    write_clip(tmp_path / "clip", frames, {"source": "noise"})
    told = json.loads((tmp_path / "clip" / "clip.json").read_text())["sha256"]
    assert read(tmp_path / "clip")[1] == read(write_video(tmp_path / "a.mkv", frames, "ffv1", "bgr0"))[1] == told
    source = open_clip(tmp_path / "clip")
    assert (source.codec, source.pixels, source.loss, source.facts()["size"]) == ("png", "rgb24", "", [64, 48])


def test_jpeg_is_lossy_and_read_as_pillow_does(tmp_path: Path, frames: np.ndarray) -> None:
    for index, frame in enumerate(frames[:3]):
        Image.fromarray(frame).save(tmp_path / f"{index}.{'png' if index == 1 else 'jpg'}")
    assert open_clip(tmp_path).loss == "2 frames are JPEG: lossy"
    (tmp_path / "1.png").unlink()
    Image.fromarray(frames[1]).save(tmp_path / "1.jpeg")
    assert (open_clip(tmp_path).loss, open_clip(tmp_path).codec) == ("all frames are JPEG: lossy", "jpeg")
    with Image.open(tmp_path / "2.jpg") as image:
        np.testing.assert_array_equal(read(tmp_path)[0][2], np.asarray(image))


def test_clips_are_found_by_name(tmp_path: Path, frames: np.ndarray) -> None:
    write_clip(tmp_path / "set" / "b", frames[:2], {"source": "x"})
    write_video(tmp_path / "set" / "a.mkv", frames, "ffv1", "bgr0")
    (tmp_path / "set" / "notes.txt").write_text("no clip")
    (tmp_path / "set" / ".hidden").mkdir()
    assert find_clips(tmp_path / "set") == {"a": tmp_path / "set" / "a.mkv", "b": tmp_path / "set" / "b"}
    assert find_clips(tmp_path / "set" / "b") == {"b": tmp_path / "set" / "b"}
    assert find_clips(tmp_path / "set" / "a.mkv") == {"a": tmp_path / "set" / "a.mkv"}
    (tmp_path / "set" / "a").mkdir()
    with pytest.raises(ClipError, match=r"clip a is there twice \(a and a.mkv\); keep one of them"):
        find_clips(tmp_path / "set")
    with pytest.raises(ClipError, match=r"a: neither frames \(.png, .jpg, .jpeg\) nor clips in the folder; check the path"):
        find_clips(tmp_path / "set" / "a")
    with pytest.raises(ClipError, match="none: no such video, folder of frames or folder of clips; check the path"):
        find_clips(tmp_path / "none")


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "found"),
    [
        (np.zeros((48, 64, 3), np.uint16), "RGB with 16 bits"),
        (np.zeros((48, 64, 4), np.uint8), "RGB with alpha with 8 bits"),
        (np.zeros((48, 64), np.uint8), "grey with 8 bits"),
    ],
)
@pytest.mark.parametrize("index", [0, 2])
def test_png_that_are_no_8_bit_rgb(tmp_path: Path, frames: np.ndarray, pixels: np.ndarray, found: str, index: int) -> None:
    write_clip(tmp_path / "clip", frames[:3], {"source": "x"})
    assert cv2.imwrite(str(tmp_path / "clip" / f"0000000{index}.png"), pixels)
    words = rf"0000000{index}.png is {found}, frames are RGB with 8 bits; convert them first, such as by ffmpeg .* -pix_fmt rgb24"
    with pytest.raises(ClipError, match=words):
        read(tmp_path / "clip")


def test_a_png_that_is_damaged(tmp_path: Path, frames: np.ndarray) -> None:
    write_clip(tmp_path / "clip", frames[:3], {"source": "x"})
    for index in (0, 2):
        path = tmp_path / "clip" / f"0000000{index}.png"
        data = path.read_bytes()
        path.write_bytes(data[:-40])
        with pytest.raises(ClipError, match=rf"0000000{index}.png is a truncated PNG .*; restore the file"):
            read(tmp_path / "clip")
        path.write_bytes(b"")
        with pytest.raises(ClipError, match=rf"0000000{index}.png is not a PNG file; restore the file"):
            read(tmp_path / "clip")
        path.write_bytes(data)


def test_frames_that_are_not_those_of_clip_json(tmp_path: Path, frames: np.ndarray) -> None:
    write_clip(tmp_path / "clip", frames[:3], {"source": "x"})
    Image.fromarray(frames[7]).save(tmp_path / "clip" / "00000002.png")
    with pytest.raises(ClipError, match=r"the frames are not those that clip.json describes \(sha256 differs\); remove the folder"):
        read(tmp_path / "clip")
    Image.fromarray(frames[7][:, :60]).save(tmp_path / "clip" / "00000002.png")
    with pytest.raises(ClipError, match=r"00000002.png is 60x48, the first frame is 64x48; all frames of a clip have one size"):
        read(tmp_path / "clip")
    (tmp_path / "clip" / "00000002.png").unlink()
    with pytest.raises(ClipError, match=r"2 frames, clip.json says 3; remove the folder"):
        open_clip(tmp_path / "clip")


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "message"),
    [
        ("a.mkv", "ffv1", "bgr0", r"a.mkv: the video is cut short, it holds \d of 12 frames; give an undamaged video"),
        ("a.webm", "libvpx-vp9", "yuv420p", r"a.webm: the video is cut short, it holds \d of 12 frames"),
        ("a.avi", "rawvideo", "bgr24", r"a.avi: the video is cut short, it holds \d of 12 frames"),
        ("a.mp4", "libx264", "yuv420p", r"a.mp4: cannot be decoded after 0 frames \(.*\); give an undamaged video"),
    ],
)
def test_a_video_that_is_cut_short(tmp_path: Path, frames: np.ndarray, name: str, codec: str, pixels: str, message: str) -> None:
    path = write_video(tmp_path / name, frames, codec, pixels)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(ClipError, match=message):
        open_clip(path)


def test_a_video_with_damaged_data(tmp_path: Path, frames: np.ndarray) -> None:
    path = write_video(tmp_path / "a.mp4", frames, "libx264", "yuv420p")
    data = path.read_bytes()
    start, stop = len(data) // 4, data.rindex(b"moov") - 100  # of many frames: a decoder with several threads may conceal one
    path.write_bytes(data[:start] + bytes(stop - start) + data[stop:])
    message = r"a.mp4: cannot be decoded after \d frames \(Invalid data found.*\); give an undamaged video"
    with pytest.raises(ClipError, match=message):
        read(path)
    with pytest.raises(ClipError, match=message):
        read_video(path)
    path.write_text("no video at all")
    with pytest.raises(ClipError, match=r"a.mp4: cannot be decoded after 0 frames"):
        open_clip(path)


def test_a_video_whose_size_changes(tmp_path: Path, frames: np.ndarray) -> None:
    """Raw H.264 of two sizes one after the other is a valid stream."""
    parts = [write_video(tmp_path / f"{size}.h264", frames[:, :size], "libx264", "yuv420p") for size in (48, 32)]
    (tmp_path / "a.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(ClipError, match=r"a.h264: the frames' size changes within the video; cut it to a part of one size"):
        read(tmp_path / "a.h264")


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 800, "NONE", ""))
        sound.writeframes(bytes(1600))
    with pytest.raises(ClipError, match="a.wav: the file holds no video; give a video or a folder of frames"):
        open_clip(tmp_path / "a.wav")
