"""Videos written: colours, times and sound as they were given, against OpenCV and the packets; refusals by name."""

from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from qvsr.data import video
from qvsr.data.clips import open_clip, read_video
from qvsr.data.video import Times, VideoError

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (255, 255, 255), (0, 0, 0), (200, 120, 40), (30, 90, 160)]
RATE = Times.even(Fraction(25))


def moving(frames: int = 10, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """A smooth picture that moves."""
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [np.stack([128 + 100 * np.sin((x + 2 * t) / 9), 128 + 100 * np.cos((y - t) / 7), 90 + x + 0 * y], 2) for t in range(frames)]
    return np.stack(waves).round().astype(np.uint8)


def with_sound(path, frames=10, codec="aac", seconds=1.0):
    """A video with a tone."""
    silent = path.with_name(f"silent-{path.name}")
    video.write_video(silent, moving(frames), (64, 48), RATE)
    with av.open(str(path), "w") as out, av.open(str(silent)) as source:
        picture = out.add_stream_from_template(source.streams.video[0])
        sound = out.add_stream(codec, rate=44100)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = picture
                out.mux(packet)
        samples = (8000 * np.sin(np.arange(int(44100 * seconds)) / 20)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    return path


def packets(path):
    """Bytes of the sound's packets, and when each begins after the first frame: a file may shift both."""
    with av.open(str(path)) as container:
        first = next(container.decode(video=0)).time
    with av.open(str(path)) as container:
        return [(float(one.pts * one.time_base) - first, bytes(one)) for one in container.demux(audio=0) if one.dts is not None]


@pytest.mark.parametrize("suffix", list(video.ENCODERS))
def test_colours_are_those_that_another_program_sees(tmp_path, suffix):
    frames = np.zeros((5, 64, 64 * len(COLOURS), 3), np.uint8)
    for index, colour in enumerate(COLOURS):
        frames[:, :, 64 * index : 64 * (index + 1)] = colour
    path = tmp_path / f"a{suffix}"
    video.write_video(path, frames, (frames.shape[2], 64), RATE)
    opened = cv2.VideoCapture(str(path))
    seen = []
    while (one := opened.read())[0]:
        seen.append(one[1][..., ::-1])
    assert len(seen) == 5 and opened.get(cv2.CAP_PROP_FPS) == pytest.approx(25)
    for index, colour in enumerate(COLOURS):
        patch = seen[2][16:48, 64 * index + 16 : 64 * index + 48].reshape(-1, 3)
        assert np.abs(patch.mean(0) - colour).max() < 2, colour  # rounded to Y, U, V and back
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert (int(frame.colorspace), int(frame.color_range)) == (1, 1)  # BT.709, limited


def test_detail_is_kept(tmp_path):
    frames = moving()
    video.write_video(tmp_path / "a.mp4", frames, (64, 48), RATE)
    read, rate = read_video(tmp_path / "a.mp4")
    grey = (read.astype(float) - frames) @ [0.2126, 0.7152, 0.0722]  # colour has half the resolution
    assert rate == 25 and -10 * np.log10((grey**2).mean() / 255**2) > 40


def test_sound_is_copied_packet_by_packet(tmp_path):
    source = with_sound(tmp_path / "in.mp4")
    for suffix in (".mp4", ".mkv", ".mov"):
        video.write_video(tmp_path / f"out{suffix}", moving(), (64, 48), video.read_times(source, 10), source)
        copied, given = packets(tmp_path / f"out{suffix}"), packets(source)
        assert [data for _, data in copied] == [data for _, data in given] and len(given) > 30
        assert [time for time, _ in copied] == pytest.approx([time for time, _ in given], abs=1e-3)
    video.write_video(tmp_path / "silent.mp4", moving(), (64, 48), RATE)
    assert video.sound_codecs(tmp_path / "silent.mp4") == () and video.sound_codecs(source) == ("aac",)


def test_uneven_times_are_kept(tmp_path):
    ticks = (0, 40, 120, 130, 400, 480, 500, 510, 900, 1000)
    video.write_video(tmp_path / "a.mkv", moving(), (64, 48), Times(Fraction(10), Fraction(1, 1000), ticks))
    again = video.read_times(tmp_path / "a.mkv", 10)
    assert [tick * again.base for tick in again.ticks] == [Fraction(tick, 1000) for tick in ticks]
    assert video.read_times(tmp_path / "a.mkv", 9).ticks == ()  # of another number of frames: even


def test_the_same_frames_give_the_same_bytes(tmp_path):
    """Twelve times: an encoder that reads what it was not given does not do so every time."""
    source = with_sound(tmp_path / "in.mp4")
    for sound in (source, None):
        written = set()
        for _ in range(12):
            video.write_video(tmp_path / "a.mp4", moving(), (64, 48), RATE, sound)
            written.add((tmp_path / "a.mp4").read_bytes())
        assert len(written) == 1


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    source = with_sound(tmp_path / "in.mp4")
    before = sorted(tmp_path.iterdir())
    for name, size, words in (
        ("a.gif", (64, 48), r"a.gif: .gif cannot be written; .mp4, .mkv, .mov, .m4v, .webm can, or a folder of frames"),
        ("a.mp4", (63, 48), r"a.mp4: a video of 63x48 cannot be written, both must be even; write a folder of frames"),
        (
            "a.webm",
            (64, 48),
            r"a.webm: cannot be written \(.*\); the sound is aac, which a .webm file may not hold: .mkv holds any, --no-audio",
        ),
    ):
        with pytest.raises(VideoError, match=words):
            video.write_video(tmp_path / name, moving(), size, RATE, source)
    assert sorted(tmp_path.iterdir()) == before


def test_a_turned_picture_is_refused(tmp_path):
    video.write_video(tmp_path / "a.mp4", moving(), (64, 48), RATE)
    one, zero, last = (value.to_bytes(4, "big", signed=True) for value in (1 << 16, 0, 1 << 30))
    straight = one + zero * 3 + one + zero * 3 + last
    turned = zero + one + zero + (-(1 << 16)).to_bytes(4, "big", signed=True) + zero * 4 + last
    data = (tmp_path / "a.mp4").read_bytes()
    place = data.index(b"tkhd")
    (tmp_path / "b.mp4").write_bytes(data[:place] + data[place:].replace(straight, turned, 1))
    assert open_clip(tmp_path / "b.mp4").size == (64, 48)
    with pytest.raises(VideoError, match=r"b.mp4: a mark in the file turns the picture by -?90 degrees; turn the frames themselves first"):
        video.read_times(tmp_path / "b.mp4", 10)
