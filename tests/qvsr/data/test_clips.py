"""Clips written and read, against Pillow; every way in which a clip can be broken, by its message."""

import json
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from qvsr.data.clips import (
    Clip,
    ClipError,
    check_pair,
    digest,
    frame_name,
    read_clip,
    read_frame_folder,
    read_frames_TCHW,
    read_png,
    read_video,
    write_clip,
)


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (4, 12, 20, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, frames):
    path = tmp_path / "GT" / "bikes"
    write_clip(path, frames, {"source": "bikes.mp4", "fps": 25.0, "recipe": {"start": 3}})
    return path


def rewrite_info(folder: Path, **changes):
    path = folder / "clip.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what is written is what is read -------------------------------------------------------------------------------------


def test_pillow_reads_the_same_pixels(folder, frames):
    for index, frame in enumerate(frames):
        with Image.open(folder / frame_name(index)) as image:
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), frame)


def test_round_trip(folder, frames):
    clip = read_clip(folder)
    np.testing.assert_array_equal(clip.frames_THWC, frames)
    assert clip.size == (20, 12)
    assert clip.info == {
        "source": "bikes.mp4",
        "fps": 25.0,
        "recipe": {"start": 3},
        "frames": 4,
        "size": [20, 12],
        "sha256": digest(frames),
    }


def test_two_writes_give_the_same_bytes(folder, tmp_path, frames):
    write_clip(tmp_path / "again", frames, {"recipe": {"start": 3}, "fps": 25.0, "source": "bikes.mp4"})
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_shorter_clip_replaces_a_longer_one_whole(folder, frames):
    write_clip(folder, frames[:2], {"source": "x"})
    assert sorted(path.name for path in folder.iterdir()) == ["00000000.png", "00000001.png", "clip.json"]
    assert not [path for path in folder.parent.iterdir() if path != folder]


def test_tensor_is_rounded_to_nearest(tmp_path):
    frames_TCHW = torch.tensor([0.4, 0.6, 254.4, 255.0]).div(255).repeat(3, 1)[None, :, None, :]
    write_clip(tmp_path / "c", frames_TCHW, {"source": "x"})
    assert read_clip(tmp_path / "c").frames_THWC[0, 0, :, 0].tolist() == [0, 1, 254, 255]


def test_frames_as_tensor(folder, frames):
    tensor = read_frames_TCHW(folder)
    assert tensor.shape == (4, 3, 12, 20)
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor[1, 2].numpy(), frames[1, :, :, 2] / 255, atol=1e-7)


def test_digest_sees_shape_and_pixels(frames):
    changed = frames.copy()
    changed[3, 11, 19, 2] ^= 1
    assert len({digest(frames), digest(changed), digest(frames.reshape(4, 20, 12, 3))}) == 3


def test_frames_of_another_program_need_no_clip_json(tmp_path, frames):
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"out_{index + 1:03d}.png")
    clip = read_clip(tmp_path)
    np.testing.assert_array_equal(clip.frames_THWC, frames)
    assert clip.info["frames"] == 4


def test_interlaced_png_is_read(tmp_path, frames):
    """Pillow cannot write one; ours is built by hand: one 1x1 pixel, interlace method 1."""

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = (1).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 1])
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes([0, 7, 8, 9]))) + chunk(b"IEND", b"")
    (tmp_path / "0.png").write_bytes(data)
    assert read_png(tmp_path / "0.png").tolist() == [[[7, 8, 9]]]


# --- what is broken is refused --------------------------------------------------------------------------------------------


def refused(folder, pattern):
    with pytest.raises(ClipError, match=pattern) as caught:
        read_clip(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_missing_frame(folder):
    (folder / frame_name(2)).unlink()
    refused(folder, r"frame 00000002.png is missing \(3 frames, the last is 00000003.png\); restore it, or remove the folder")


def test_missing_last_frame(folder):
    (folder / frame_name(3)).unlink()
    refused(folder, r"3 frames, clip.json says 4; remove the folder and make the clip again")


def test_missing_first_frame(folder):
    (folder / frame_name(0)).unlink()
    refused(folder, r"3 frames, clip.json says 4")


def test_first_of_a_series_is_missing(tmp_path, frames):
    for index in (2, 3):
        Image.fromarray(frames[index]).save(tmp_path / frame_name(index))
    refused(tmp_path, r"frame 00000001.png is missing")


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.99])
def test_truncated_png(folder, keep):
    path = folder / frame_name(1)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    refused(folder, r"00000001.png is a truncated PNG \(\d+ bytes, no end mark\); restore the file")


def test_empty_file(folder):
    (folder / frame_name(1)).write_bytes(b"")
    refused(folder, r"00000001.png is not a PNG file")


def test_flipped_byte(folder):
    path = folder / frame_name(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    refused(folder, r"00000001.png is a damaged PNG \(checksum of its IDAT chunk is wrong\)")


@pytest.mark.parametrize(
    ("array", "mode", "found"),
    [
        (np.zeros((12, 20), np.uint8), "L", "grey with 8 bits"),
        (np.zeros((12, 20, 4), np.uint8), "RGBA", "RGB with alpha with 8 bits"),
        (np.zeros((12, 20), np.uint16), "I;16", "grey with 16 bits"),
        (np.zeros((12, 20), np.uint8), "P", "palette with 8 bits"),
    ],
)
def test_other_kinds_of_png(folder, array, mode, found):
    image = Image.fromarray(array)
    (image.convert(mode) if mode == "P" else image).save(folder / frame_name(1), bits=8)
    refused(folder, rf"00000001.png is {found}, frames are RGB with 8 bits; convert them first")


def test_sixteen_bit_colour(folder):
    import cv2

    cv2.imwrite(str(folder / frame_name(1)), np.zeros((12, 20, 3), np.uint16))
    refused(folder, r"00000001.png is RGB with 16 bits")


def test_frames_of_different_size(folder):
    Image.new("RGB", (16, 12)).save(folder / frame_name(2))
    refused(folder, r"00000002.png is 16x12, 00000000.png is 20x12; all frames of a clip have one size")


def test_exchanged_frame(folder):
    Image.new("RGB", (20, 12)).save(folder / frame_name(2))
    refused(folder, r"the frames are not those that clip.json describes \(sha256 differs\)")


def test_size_differs_from_clip_json(folder):
    rewrite_info(folder, size=[40, 24])
    refused(folder, r"frames of 20x12, clip.json says 40x24")


@pytest.mark.parametrize(
    ("text", "found"), [("{", "is not JSON"), ("[]", "does not say how many frames"), ("{}", "does not say how many frames")]
)
def test_broken_clip_json(folder, text, found):
    (folder / "clip.json").write_text(text)
    refused(folder, found)


def test_empty_or_missing_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"no frames \(.png\) in the folder")
    refused(tmp_path / "nowhere", "no such folder of frames")


def test_unnumbered_and_repeated_frames(folder, frames):
    Image.fromarray(frames[0]).save(folder / "7.png")
    Image.fromarray(frames[0]).save(folder / "07.png")
    refused(folder, "frame 7 is there twice")
    (folder / "07.png").unlink()
    (folder / "7.png").rename(folder / "cover.png")
    refused(folder, "cover.png: a frame's name ends in its number")


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 4, 4), np.uint8), "a clip is written from THWC uint8 RGB, found uint8"),
        (np.zeros((0, 4, 4, 3), np.uint8), "a clip is written from THWC uint8 RGB"),
        (np.zeros((1, 4, 4, 3), np.float32), "found float32"),
        (torch.zeros(1, 4, 4, 3), "a clip is written from TCHW float RGB"),
        (torch.tensor([0.0, float("nan")])[:, None, None, None].expand(2, 3, 4, 4), "frame 1 holds NaN or infinity; nothing was written"),
        (torch.full((1, 3, 4, 4), 1.5), "values from 1.500 to 1.500 are not in"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, frames, message):
    with pytest.raises(ClipError, match=message):
        write_clip(tmp_path / "out", frames, {"source": "x"})
    assert not list(tmp_path.iterdir())


def test_source_is_required(tmp_path, frames):
    with pytest.raises(ClipError, match="info needs source"):
        write_clip(tmp_path / "out", frames, {"fps": 25})


def test_a_write_that_fails_leaves_the_old_clip(folder, frames, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="the disk is full"):
        write_clip(folder, frames[::-1], {"source": "x"})
    np.testing.assert_array_equal(read_clip(folder).frames_THWC, frames)
    assert [path.name for path in folder.parent.iterdir()] == ["bikes"]


def test_pairs(frames):
    gt, lq = Clip(np.repeat(np.repeat(frames, 4, 1), 4, 2), {}), Clip(frames, {})
    check_pair(gt, lq, "bikes")
    with pytest.raises(ClipError, match="clip bikes: GT has 3 frames, LQ 4"):
        check_pair(Clip(gt.frames_THWC[:3], {}), lq, "bikes")
    with pytest.raises(ClipError, match="clip bikes: GT is 80x44, LQ 20x12: x4 needs GT 80x48"):
        check_pair(Clip(gt.frames_THWC[:, :44], {}), lq, "bikes")


# --- other people's frames and videos ------------------------------------------------------------------------------------


def write_video(path: Path, frames, codec="libx264rgb", pix_fmt="rgb24"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pix_fmt
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_lossless_video_is_read_exactly_and_from_any_frame(tmp_path):
    frames = np.random.default_rng(1).integers(0, 256, (8, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "v.mkv", frames)
    found, fps = read_video(tmp_path / "v.mkv")
    np.testing.assert_array_equal(found, frames)
    assert fps == 24.0
    np.testing.assert_array_equal(read_video(tmp_path / "v.mkv", 3, 2)[0], frames[3:5])


def test_video_errors(tmp_path):
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    write_video(tmp_path / "v.mkv", frames)
    with pytest.raises(ClipError, match=r"v.mkv: 4 frames, frames 2 to 6 are asked for; lower start or frames"):
        read_video(tmp_path / "v.mkv", 2, 5)
    with pytest.raises(ClipError, match=r"v.mkv: 4 frames, frames 9 to 9 are asked for"):
        read_video(tmp_path / "v.mkv", 9)
    with pytest.raises(ClipError, match=r"none.mp4: no such video"):
        read_video(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video at all")
    with pytest.raises(ClipError, match=r"text.mp4: cannot be decoded after 0 frames"):
        read_video(tmp_path / "text.mp4")


def test_frame_folder_with_any_names_and_jpeg(tmp_path, frames):
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"shot-{index + 1}.{'jpg' if index == 2 else 'png'}", quality=95)
    (tmp_path / "notes.txt").write_text("not a frame")
    found = read_frame_folder(tmp_path, 1, 2)
    np.testing.assert_array_equal(found[0], frames[1])
    with Image.open(tmp_path / "shot-3.jpg") as image:
        np.testing.assert_array_equal(found[1], np.asarray(image))
    with pytest.raises(ClipError, match="4 frames, frames 2 to 5 are asked for; lower start or frames"):
        read_frame_folder(tmp_path, 2, 4)
    (tmp_path / "shot-2.png").unlink()
    with pytest.raises(ClipError, match="frame shot-2.png is missing"):
        read_frame_folder(tmp_path)
