"""Upscaling a clip: the restore stage's bytes, sound and times, stopped and resumed, flat memory, refusals by name."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qvsr.config import Config
from qvsr.data import clips, video
from qvsr.data.clips import ClipError
from qvsr.models import pipeline
from qvsr.provenance import ROOT, DiskFullError
from qvsr.quant import exported
from qvsr.quant.exported import ModelError
from qvsr.stages import restore as restoring
from qvsr.stages import upscale as stage
from qvsr.stages.upscale import StoppedError, UpscaleError
from tests.exporting import configured, quantized

FRAMES = 12  # three segments, the last of two frames


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("model")
    config = configured(folder, sampling={"steps": 2, "flow": "dis", "tile": 16, "tile_overlap": 8})
    quantized(config, folder / "q.safetensors")
    exported.write(folder / "m.safetensors", config, folder / "q.safetensors")
    return config


@pytest.fixture(scope="module")
def model(config: Config) -> Path:
    return Path(str(config.backbone.weights)).parent / "m.safetensors"


def moving(frames: int = FRAMES, size: tuple[int, int] = (18, 13)) -> np.ndarray:
    """A smooth picture that moves, of a size that is no multiple of anything."""
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [np.stack([128 + 100 * np.sin((x + t) / 3), 128 + 100 * np.cos((y - t) / 4), 90 + 5 * x + 0 * y], 2) for t in range(frames)]
    return np.stack(waves).round().astype(np.uint8)


@pytest.fixture
def lq(tmp_path: Path) -> Path:
    clips.write_clip(tmp_path / "set" / "LQ" / "walk", moving(), {"source": "made", "fps": 10.0})
    return tmp_path / "set" / "LQ" / "walk"


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def work_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.upscale")


# --- what comes out ------------------------------------------------------------------------------------------------------


def test_frames_are_those_of_the_restore_stage(tmp_path: Path, config: Config, model: Path, lq: Path) -> None:
    """One simulated, the other packed: a whole clip, sampled in two steps, with the same bytes."""
    checkpoint = model.with_name("q.safetensors")
    restoring.run(config.model_copy(update={"execution": "simulated"}), "maxmin", "W4A4", checkpoint, lq, tmp_path / "restored")
    assert clips.read_clip(tmp_path / "restored").info["execution"] == "simulated"
    clip_name = "set/walk"  # the restore stage's name of the clip
    assert stage.run(lq, tmp_path / "out", model, execution="packed", seed=config.seed, clip=clip_name) == "packed"
    expected, found = content(tmp_path / "restored"), content(tmp_path / "out")
    assert len(expected) == FRAMES + 1 and expected.keys() == found.keys()
    assert [name for name in expected if name != clips.INFO and expected[name] != found[name]] == []
    clip = clips.read_clip(tmp_path / "out")
    assert clip.size == (72, 52) and clip.info["sha256"] == clips.read_clip(tmp_path / "restored").info["sha256"]
    assert {key: clip.info[key] for key in ("bits", "execution", "seed", "steps", "fps")} == {
        "bits": "W4A4", "execution": "packed", "seed": config.seed, "steps": 2, "fps": 10.0,
    }  # fmt: skip
    assert not work_of(tmp_path / "out").exists()


def test_seed_steps_and_name_of_the_clip_matter(tmp_path: Path, model: Path, lq: Path) -> None:
    short = tmp_path / "short"
    clips.write_clip(short, moving(2), {"source": "made"})
    digests = {}
    for name, options in {"a": {}, "b": {}, "c": {"seed": 7}, "d": {"steps": 3}, "e": {"clip": "other"}}.items():
        stage.run(short, tmp_path / name, model, **options)  # type: ignore[arg-type]
        digests[name] = clips.read_clip(tmp_path / name).info["sha256"]
    assert digests["a"] == digests["b"] and len(set(digests.values())) == 4
    with pytest.raises(UpscaleError, match=r"--steps 2000: from 1 to 1000 work"):
        stage.run(short, tmp_path / "f", model, steps=2000)


def test_a_video_is_its_frames(tmp_path: Path, model: Path) -> None:
    """Decoded frames as a folder, and the video itself: the same output."""
    video.write_video(tmp_path / "walk.mp4", moving(size=(20, 14)), (20, 14), video.Times.even(Fraction(10)))
    frames, _ = clips.read_video(tmp_path / "walk.mp4")
    clips.write_clip(tmp_path / "walk", frames, {"source": "walk.mp4"})
    for source in ("walk.mp4", "walk"):
        stage.run(tmp_path / source, tmp_path / f"out-{Path(source).suffix[1:]}", model)
    assert clips.read_clip(tmp_path / "out-mp4").info["sha256"] == clips.read_clip(tmp_path / "out-").info["sha256"]


def test_video_to_video(tmp_path: Path, model: Path) -> None:
    ticks = (0, 40, 90, 120, 200, 240, 280, 320, 360, 400, 440, 600)
    source = tmp_path / "walk.mkv"
    video.write_video(source, moving(size=(20, 14)), (20, 14), video.Times(Fraction(25), Fraction(1, 1000), ticks))
    stage.run(source, tmp_path / "out.mp4", model)
    stage.run(source, tmp_path / "out", model)
    read, _ = clips.read_video(tmp_path / "out.mp4")
    frames = clips.read_clip(tmp_path / "out").frames_THWC
    assert read.shape == frames.shape == (FRAMES, 56, 80, 3)
    grey = (read.astype(float) - frames) @ [0.2126, 0.7152, 0.0722]
    assert -10 * np.log10((grey**2).mean() / 255**2) > 36  # dB: coded nearly without visible loss
    times = video.read_times(tmp_path / "out.mp4", FRAMES)
    assert [tick * times.base for tick in times.ticks] == [Fraction(tick, 1000) for tick in ticks]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_folder_becomes_a_video_of_its_rate(tmp_path: Path, model: Path, lq: Path) -> None:
    stage.run(lq, tmp_path / "a.mp4", model)
    assert clips.read_video(tmp_path / "a.mp4")[1] == 10
    stage.run(lq, tmp_path / "b.mp4", model, fps=23.976)
    assert clips.read_video(tmp_path / "b.mp4")[1] == pytest.approx(23.976, abs=1e-3)


# --- stopped and resumed -------------------------------------------------------------------------------------------------


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ctrl-C as the second segment is kept, once; the list says which segments were."""
    kept: list[int] = []
    keep = stage.Work.keep

    def once(self: stage.Work, segment: int, frames: Any) -> None:
        if segment == 1 and 1 not in kept and kept == [0]:
            kept.append(-1)
            raise KeyboardInterrupt
        kept.append(segment)
        keep(self, segment, frames)

    monkeypatch.setattr(stage.Work, "keep", once)
    return kept


@pytest.mark.parametrize("out", ["out", "out.mp4"])
def test_a_stopped_run_goes_on(tmp_path: Path, model: Path, lq: Path, stopping: list[int], out: str) -> None:
    with pytest.raises(StoppedError, match=r"stopped: 5 of 12 frames are kept in .*\.upscale; the same command goes on with them"):
        stage.run(lq, tmp_path / out, model)
    assert not (tmp_path / out).exists()
    stage.run(lq, tmp_path / out, model)
    assert stopping == [0, -1, 1, 2]  # what was there is not made again
    stage.run(lq, tmp_path / f"whole-{out}", model)
    whole, resumed = tmp_path / f"whole-{out}", tmp_path / out
    assert (content(whole) == content(resumed)) if whole.is_dir() else (whole.read_bytes() == resumed.read_bytes())
    assert not work_of(tmp_path / out).exists()


def test_a_damaged_segment_is_made_again(tmp_path: Path, model: Path, lq: Path, stopping: list[int]) -> None:
    with pytest.raises(StoppedError):
        stage.run(lq, tmp_path / "out", model)
    (work_of(tmp_path / "out") / "00000000" / "00000003.png").write_bytes(b"")  # as a power cut leaves it
    stage.run(lq, tmp_path / "out", model)
    assert stopping == [0, -1, 0, 1, 2] and len(clips.read_clip(tmp_path / "out").frames_THWC) == FRAMES


def test_other_options_do_not_go_on_with_a_stopped_run(tmp_path: Path, model: Path, lq: Path, stopping: list[int]) -> None:
    with pytest.raises(StoppedError):
        stage.run(lq, tmp_path / "out", model)
    with pytest.raises(UpscaleError, match=r"out: a stopped run is kept in .*\.upscale, but its seed was 42, now 7: give the same options"):
        stage.run(lq, tmp_path / "out", model, seed=7)
    other = tmp_path / "other"
    clips.write_clip(other, moving() // 2, {"source": "made"})
    with pytest.raises(UpscaleError, match=r"but its input was"):
        stage.run(other, tmp_path / "out", model, clip="walk")
    stage.run(lq, tmp_path / "out", model, seed=7, overwrite=True)
    assert stopping == [0, -1, 0, 1, 2] and clips.read_clip(tmp_path / "out").info["seed"] == 7


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "qvsr", "upscale", *map(str, arguments)]


def test_ctrl_c(tmp_path: Path, model: Path) -> None:
    """A real signal to a real process, as soon as the first segment is there and the second is waited for."""
    clips.write_clip(tmp_path / "in", moving(40, (24, 24)), {"source": "made", "fps": 10.0})
    arguments = command(tmp_path / "in", tmp_path / "out.mp4", "--model", model)
    waiting = (  # the second segment does not begin: on a busy machine all could be done before the signal comes
        # a shell starts what it puts into the background with the signal ignored, and that is inherited
        "import pathlib, runpy, signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from qvsr.models import pipeline\nreal, calls = pipeline.restore_segments, []\n"
        "def restore(*given, **named):\n    calls.append(1)\n    if len(calls) > 1:\n"
        f"        pathlib.Path({str(tmp_path / 'waits')!r}).touch()\n        time.sleep(600)\n    return real(*given, **named)\n"
        "pipeline.restore_segments = restore\nrunpy.run_module('qvsr', run_name='__main__')"
    )
    process = subprocess.Popen([sys.executable, "-c", waiting, *arguments[3:]], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    first = work_of(tmp_path / "out.mp4") / "00000000"
    while not (tmp_path / "waits").exists():
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped: " in said and "Traceback" not in said
    assert not (tmp_path / "out.mp4").exists() and first.exists()
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "are there from a stopped run" in done.stderr, done.stderr
    assert len(clips.read_video(tmp_path / "out.mp4")[0]) == 40 and not first.parent.exists()


# --- memory --------------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_clip(tmp_path: Path, model: Path) -> None:
    """A frame of the output is 1.8 MB in float32: 100 more would be seen. The network, which knows of one segment only, is left out.

    The encoder of the video looks about 50 frames ahead: both clips are longer.
    """
    peaks = []
    for frames in (60, 160):
        clips.write_clip(tmp_path / f"in{frames}", moving(frames, (96, 96)), {"source": "made", "fps": 10.0})
        paths = ", ".join(f"Path({str(path)!r})" for path in (tmp_path / f"in{frames}", tmp_path / f"out{frames}.mp4", model))
        code = (
            "from pathlib import Path\nfrom qvsr.models import pipeline\nfrom qvsr.stages import upscale\n"
            "pipeline.restore_segments = lambda backbone, lq, *_, **__: iter([pipeline.bicubic_upscale(lq)])\n"
            f"upscale.run({paths})\n"
            # not getrusage: a process inherits that peak from the one that started it
            "print(next(line.split()[1] for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM')))"
        )
        # every larger block goes back to the system when it is freed: what is left is what is held
        variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stderr
        assert clips.open_clip(tmp_path / f"out{frames}.mp4").frames == frames
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 30, peaks  # MB; all frames: 177 more in float32, 44 as bytes


def test_upscaling_imports_nothing_that_quantizes(tmp_path: Path, model: Path, lq: Path) -> None:
    code = (
        f"import sys\nsys.argv = ['qvsr', *{command(lq, tmp_path / 'out', '--model', model)[3:]!r}]\n"
        "from qvsr.cli import app\n"
        "try: app()\nexcept SystemExit as end: assert not end.code\n"
        "print('LOADED', *sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = done.stdout.split("LOADED")[1].split()
    assert "qvsr.models.unet" in loaded and (tmp_path / "out").is_dir(), done.stderr
    quantizing = ("qvsr.data.calibration", "qvsr.quantvsr", "qvsr.training", "baselines", "metrics", "pyiqa", "torchvision")
    assert not [name for name in loaded if name.startswith(quantizing)]


# --- refusals ------------------------------------------------------------------------------------------------------------


def test_outputs_that_must_not_be_written(tmp_path: Path, model: Path, lq: Path) -> None:
    for name in ("there", "more", "clip"):
        shutil.copytree(lq, tmp_path / name)
    (tmp_path / "more" / "notes.txt").write_text("mine")
    (tmp_path / "there.mp4").write_bytes(b"mine")
    for out, overwrite, words in (
        (tmp_path / "there", False, r"there exists; give another name, or --overwrite"),
        (tmp_path / "there.mp4", False, r"there.mp4 exists; give another name, or --overwrite"),
        (tmp_path / "more", True, r"more holds more than frames \(notes.txt\): it is not overwritten; give another folder"),
        (tmp_path / "a.gif", False, r"a.gif: .gif cannot be written; .mp4, .mkv, .mov, .m4v, .webm can, or a folder of frames"),
        (lq, True, r"walk is the input or lies in it; give another place"),
        (lq / "out", True, r"out is the input or lies in it"),
    ):
        with pytest.raises(UpscaleError, match=words):
            stage.run(lq, out, model, overwrite=overwrite)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UpscaleError, match=r"folder.mp4 is a folder, which a video cannot replace"):
        stage.run(lq, tmp_path / "folder.mp4", model, overwrite=True)
    assert (tmp_path / "there.mp4").read_bytes() == b"mine"
    stage.run(lq, tmp_path / "clip", model, overwrite=True)
    assert clips.read_clip(tmp_path / "clip").size == (72, 52)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_inputs_that_are_no_clip(tmp_path: Path, model: Path, lq: Path) -> None:
    rate = video.Times.even(Fraction(10))
    video.write_video(tmp_path / "a.ts.mkv", moving(size=(20, 14)), (20, 14), rate)
    whole = (tmp_path / "a.ts.mkv").read_bytes()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.mp4").write_bytes(b"")
    (tmp_path / "none.y4m").write_bytes(b"YUV4MPEG2 W20 H14 F10:1 Ip A1:1 C420jpeg\n")
    shutil.copytree(lq, tmp_path / "sizes")
    (tmp_path / "sizes" / "clip.json").unlink()
    (tmp_path / "sizes" / clips.frame_name(7)).write_bytes(clips.encode_png(moving(1, (20, 14))[0]))
    changing(tmp_path / "sizes.ts")
    for name, words in (
        ("absent.mp4", r"absent.mp4: no such video"),
        ("text.mp4", r"text.mp4: cannot be decoded after 0 frames \(Invalid data"),
        ("nothing.mp4", r"nothing.mp4: cannot be decoded after 0 frames"),
        ("none.y4m", r"none.y4m: the video has no frames; give one that has"),
        ("cut.mkv", r"cut.mkv: the video is cut short, it holds \d+ of 12 frames"),
        ("empty", r"empty: no frames \(.png, .jpg, .jpeg\) in the folder"),
        ("sizes", r"sizes/00000007.png is 20x14, the first frame is 18x13; all frames of a clip have one size"),
        ("sizes.ts", r"sizes.ts: the frames' size changes within the video; cut it to a part of one size"),
    ):
        with pytest.raises((ClipError, UpscaleError), match=words):
            stage.run(tmp_path / name, tmp_path / "out", model)
    with pytest.raises(UpscaleError, match=r"sizes: the folder of frames does not say how many frames a second it has; give --fps"):
        (tmp_path / "sizes" / clips.frame_name(7)).write_bytes(clips.encode_png(moving(8)[7]))
        stage.run(tmp_path / "sizes", tmp_path / "out.mp4", model)
    with pytest.raises(UpscaleError, match=r"a.ts.mkv is a video, which keeps its own times: --fps is for folders of frames"):
        stage.run(tmp_path / "a.ts.mkv", tmp_path / "out.mp4", model, fps=5)
    with pytest.raises(ModelError, match=r"no exported model .*absent.safetensors"):
        stage.run(lq, tmp_path / "out", tmp_path / "absent.safetensors")
    assert not (tmp_path / "out").exists() and not work_of(tmp_path / "out").exists()


def changing(path: Path) -> None:
    """A transport stream in which the picture's size changes: two of them, one behind the other."""
    import av

    parts = []
    for size in ((64, 48), (96, 80)):
        with av.open(str(path), "w", format="mpegts") as out:
            stream = out.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            for frame in moving(10, size):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode(None))
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))


def test_two_processes_do_not_share_an_output(tmp_path: Path, model: Path, lq: Path) -> None:
    work_of(tmp_path / "out").mkdir()
    with (work_of(tmp_path / "out") / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UpscaleError, match=r"out: another process is making it; wait for that, or give another name"):
            stage.run(lq, tmp_path / "out", model)


def test_no_space(tmp_path: Path, model: Path, lq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(stage.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(
            DiskFullError, match=r"out: no space left for its frames: at least 0.0 MB are needed beside it, 0.0 MB are free"
        ):
            stage.run(lq, tmp_path / "out", model)
    assert not work_of(tmp_path / "out").exists()
    encode, calls = clips.encode_png, []

    def full(frame: Any) -> bytes:
        calls.append(1)
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return encode(frame)

    monkeypatch.setattr(clips, "encode_png", full)
    with pytest.raises(DiskFullError, match=r"out: no space left \(.* MB free\); 5 of 12 frames are kept in .*: free some space, then run"):
        stage.run(lq, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()
    stage.run(lq, tmp_path / "out", model)
    assert json.loads((tmp_path / "out" / "clip.json").read_text())["frames"] == FRAMES


def test_a_network_that_gives_nothing_leaves_no_output(tmp_path: Path, model: Path, lq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_refuse_not_finite", lambda *_: (_ for _ in ()).throw(pipeline.RestoreError("walk: NaN")))
    with pytest.raises(pipeline.RestoreError, match="walk: NaN"):
        stage.run(lq, tmp_path / "out", model)
    assert not (tmp_path / "out").exists() and not work_of(tmp_path / "out").exists()


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path, model: Path, lq: Path) -> None:
    for arguments, words in (
        ((lq, lq), "walk is the input or lies in it; give another place"),
        ((lq, tmp_path / "out", "--model", lq / "clip.json"), "clip.json is damaged or no safetensors file"),
        ((lq, tmp_path / "out", "--device", "gpu"), "no device 'gpu'; did you mean cpu? known: cpu, cuda"),
        ((lq, tmp_path / "out", "--model", model, "--execution", "quick"), "no execution 'quick'"),
        ((lq, tmp_path / "out", "--model", model, "--precision", "float8"), "no precision 'float8'"),
    ):
        done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1, (
            done.stderr
        )
