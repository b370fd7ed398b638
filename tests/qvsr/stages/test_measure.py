"""`measure` on folders and videos of any program: how clips are paired, what is said, what is written."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import metrics  # noqa: F401 (fills the registry)
from qvsr import plan, results
from qvsr.config import Config, load
from qvsr.data import clips
from qvsr.data.clips import ClipError, open_clip, write_clip
from qvsr.protocols import ProtocolError
from qvsr.provenance import ROOT
from qvsr.stages import measure as stage
from tests.qvsr.data.test_sources import write_video

SHAPE = (3, 48, 40, 3)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two clips, predicted and true."""
    generator = np.random.default_rng(0)
    for clip in ("walk", "bikes"):
        for role in ("pred", "gt"):
            write_clip(tmp_path / role / clip, generator.integers(0, 256, SHAPE, dtype=np.uint8), {"source": clip, "fps": None})
    return tmp_path


def measure(folders: Path, pred: str, out: str, *clips: str) -> dict[tuple[str, str], float]:
    config = load(ROOT / "config" / "default.yaml", {"metrics": ["psnr", "gmsd"]})
    stage.run(config, folders / "pred" / pred, folders / "gt" / pred, None, clips, "", "any", "W4A4", "simulated", folders / out)
    return lines(folders / out)


def lines(file: Path) -> dict[tuple[str, str], float]:
    return {(row["clip"], row["metric"]): row["value"] for row in map(json.loads, file.read_text().splitlines())}


def test_a_folder_of_clips_gives_what_its_clips_give(folders: Path) -> None:
    single = measure(folders, "bikes", "bikes.jsonl") | measure(folders, "walk", "walk.jsonl")
    assert measure(folders, ".", "all.jsonl") == single
    assert set(single) == {(clip, metric) for clip in ("bikes", "walk") for metric in ("psnr", "gmsd")}


def test_psnr_by_hand_and_only_the_named_clips(folders: Path) -> None:
    found = measure(folders, ".", "out.jsonl", "walk")
    assert {clip for clip, _ in found} == {"walk"}
    generator = np.random.default_rng(0)
    pred, gt = (generator.integers(0, 256, SHAPE, dtype=np.uint8).astype(np.float64) / 255 for _ in range(2))
    expected = np.mean([-10 * np.log10(np.mean((p - g) ** 2)) for p, g in zip(pred, gt, strict=True)])
    assert found["walk", "psnr"] == pytest.approx(expected, abs=1e-4)


def test_a_clip_that_is_not_there_is_named_and_nothing_is_written(folders: Path) -> None:
    with pytest.raises(ClipError, match="stroll"):
        measure(folders, ".", "out.jsonl", "walk", "stroll")
    assert not (folders / "out.jsonl").exists()


def noise(seed: int, frames: int = 3, size: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, size, size, 3), dtype=np.uint8)


def write(folder: Path, *names: str) -> Path:
    """Clips of noise; clip and side decide which."""
    for name in names:
        clips.write_clip(folder / name, noise(sum((folder.name + name).encode())), {"source": "noise"})
    return folder


def config(**changes: object) -> Config:
    return plan.resolve([], {"metrics": ["psnr"], **changes})


def run(pred: Path, gt: Path | None, out: Path, *chosen: str, **changes: object) -> list[results.Row]:
    files = {key: changes.pop(key) for key in ("fp", "per_frame", "cache") if key in changes}
    return stage.run(config(**changes), pred, gt, files.pop("fp", None), chosen, "", "", "", "external", out, backbone="", **files)  # type: ignore[arg-type]


def command(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "qvsr", "measure", *map(str, arguments)]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


# --- pairs ---------------------------------------------------------------------------------------------------------------


def test_folders_and_videos_are_paired_by_name(tmp_path: Path) -> None:
    write(tmp_path / "gt", "a", "b")
    (tmp_path / "pred").mkdir()
    write_video(tmp_path / "pred" / "a.mkv", noise(1), "ffv1", "bgr0")
    write(tmp_path / "pred", "b")
    rows = run(tmp_path / "pred", tmp_path / "gt", tmp_path / "out.jsonl")
    assert [(row.clip, row.inputs["pred"]["codec"]) for row in rows] == [("a", "ffv1"), ("b", "png")]
    assert results.read(tmp_path / "out.jsonl") == rows
    assert stage.pair({"pred": tmp_path / "pred", "gt": tmp_path / "gt", "fp": None}, ["b"]) == {
        "b": {"pred": tmp_path / "pred" / "b", "gt": tmp_path / "gt" / "b"}
    }


def test_a_row_says_how_its_clip_was_computed(tmp_path: Path) -> None:
    """What the restore stage noted; without a note, simulated; what is asked for, before either."""
    write(tmp_path / "gt", "a", "b")
    for name, note in (("a", {"execution": "packed"}), ("b", {})):
        clips.write_clip(tmp_path / "pred" / name, noise(1), {"source": "noise"} | note)
    for asked, expected in ((None, {"a": "packed", "b": "simulated"}), ("external", {"a": "external", "b": "external"})):
        rows = stage.run(config(), tmp_path / "pred", tmp_path / "gt", None, [], "", "", "", asked, tmp_path / "out.jsonl", backbone="")
        assert {row.clip: row.execution for row in rows} == expected


def test_two_single_clips_belong_together_whatever_they_are_called(tmp_path: Path) -> None:
    write(tmp_path / "gt", "bikes")
    video = write_video(tmp_path / "restored.mkv", noise(1), "ffv1", "bgr0")
    (row,) = run(video, tmp_path / "gt" / "bikes", tmp_path / "out.jsonl")
    assert row.clip == "restored"
    with pytest.raises(
        ClipError, match=r"--gt .*gt has no clip restored, which --pred has; it has bikes: add the clip, or choose others by"
    ):
        run(video, tmp_path / "gt", tmp_path / "out.jsonl")


def test_a_clip_that_one_side_lacks(tmp_path: Path) -> None:
    pred, gt = write(tmp_path / "pred", "a", "b"), write(tmp_path / "gt", "b", "c")
    out = tmp_path / "out.jsonl"
    with pytest.raises(
        ClipError, match=r"--gt .*gt has no clip a, which --pred has; it has b, c: add the clip, or choose others by --clip"
    ):
        run(pred, gt, out)
    clips.write_clip(gt / "a", noise(0), {"source": "noise"})
    with pytest.raises(ClipError, match=r"--pred .*pred has no clip c, which --gt has; it has a, b"):
        run(pred, gt, out)
    with pytest.raises(ClipError, match=r"--fp .*fp has no clip b, which --pred has"):
        run(pred, gt, out, "b", "a", fp=write(tmp_path / "fp", "a"), metrics=["psnr_fp"])
    with pytest.raises(ClipError, match=r"--pred .*pred has no clip d, which is asked for"):
        run(pred, gt, out, "d")
    assert not out.exists()
    assert [row.clip for row in run(pred, gt, out, "b", "a")] == ["b", "a"]


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    pred, gt = write(tmp_path / "pred", "a"), write(tmp_path / "gt", "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClipError, match=r"empty: neither frames .* nor clips in the folder; check the path"):
        run(tmp_path / "empty", gt, tmp_path / "out.jsonl")
    for folder in (pred, gt):
        (folder / "z").mkdir()
    with pytest.raises(ClipError, match=r"z: no frames \(.png, .jpg, .jpeg\) in the folder"):
        run(pred, gt, tmp_path / "out.jsonl")


# --- what is said --------------------------------------------------------------------------------------------------------


def test_one_warning_a_kind_of_loss(tmp_path: Path) -> None:
    write(tmp_path / "gt", "a", "b", "c")
    (tmp_path / "pred").mkdir()
    for name in "ab":
        write_video(tmp_path / "pred" / f"{name}.mp4", noise(1), "libx264", "yuv420p")
    write(tmp_path / "pred", "c")
    opened = {
        name: {side: open_clip(path) for side, path in paths.items()}
        for name, paths in stage.pair({"pred": tmp_path / "pred", "gt": tmp_path / "gt"}, []).items()
    }
    assert stage.losses(opened) == [
        "warning: --pred: h264 may be lossy; yuv420p has colour at less than full resolution (2 of 3 clips: a, b); "
        "what is measured is the file, measure lossless frames where they are there"
    ]


def test_metrics_that_cannot_be_computed_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert stage.possible(["psnr", "ewarp_dis", "psnr_fp"], tmp_path, None) == ["psnr", "ewarp_dis"]
        assert stage.possible(["psnr", "ewarp_dis", "psnr_fp"], None, None) == ["ewarp_dis"]
        assert stage.possible(["psnr", "ewarp_dis"], tmp_path, None) == ["psnr", "ewarp_dis"]
    assert [record.message for record in caplog.records] == [
        "left out without --fp: psnr_fp",
        "left out without --fp and --gt: psnr, psnr_fp",
    ]
    with pytest.raises(results.ResultError, match="nothing left to measure; give --gt or --fp, or name other metrics"):
        stage.possible(["psnr", "psnr_fp"], None, None)


def test_the_summary_has_value_unit_clips_and_signature() -> None:
    facts = {"backbone": "", "method": "", "bits": "", "seed": 0, "dataset": "", "frames": 2}
    rows = [results.Row(**facts, clip=clip, metric="psnr", value=value, signature="psnr|x") for clip, value in (("a", 20.0), ("b", 21.0))]
    rows += [results.Row(**facts, clip=clip, metric="ssim", value=None, missing="no file", signature="ssim|x") for clip in "ab"]
    assert stage.summary(rows) == "psnr: 20.50 dB, 2 clips, psnr|x\nssim: n/a (no file), 2 clips, ssim|x"


# --- the command ---------------------------------------------------------------------------------------------------------


def test_the_command_stands_alone(tmp_path: Path) -> None:
    """From any folder, without a configuration: two systems' outputs, one a lossy video."""
    write(tmp_path / "gt", "a", "b")
    (tmp_path / "pred").mkdir()
    for seed, name in enumerate("ab"):
        write_video(tmp_path / "pred" / f"{name}.mp4", noise(seed), "libx264", "yuv420p")
    done = command(tmp_path, "--pred", "pred", "--gt", "gt", "--out", "out.jsonl", "--per-frame", "frames.jsonl", "--cache", "kept")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "left out without --fp: psnr_fp, ssim_fp"
    assert done.stderr.count("warning: --pred: h264 may be lossy") == 1
    rows = results.read(tmp_path / "out.jsonl")
    names = [name for name in plan.resolve([], {}).metrics if not name.endswith("_fp")]
    assert [(row.clip, row.metric) for row in rows] == [(clip, name) for clip in "ab" for name in names]
    assert {(row.backbone, row.method, row.execution, row.dataset) for row in rows} == {("", "", "external", "")}
    assert rows[0].inputs["pred"]["loss"].startswith("h264 may be lossy") and rows[0].inputs["gt"]["loss"] == ""
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == names and f"2 clips, {rows[0].signature}" in done.stdout
    by_frame = [json.loads(line) for line in (tmp_path / "frames.jsonl").read_text().splitlines()]
    assert len(by_frame) == sum(len(row.per_frame) for row in rows) and by_frame[0]["frame"] == 0
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").rglob("*.json")}
    assert len(kept) == len(rows)
    again = command(tmp_path, "--pred", "pred", "--gt", "gt", "--out", "again.jsonl", "--cache", "kept")
    assert again.returncode == 0 and (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").rglob("*.json")} == kept


def test_what_was_named_is_refused_and_not_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a")
    done = command(tmp_path, "--pred", "a", "--gt", "a", "--metrics", "psnr,psnr_fp", "--out", "out.jsonl")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: a: psnr_fp needs the full-precision output, which is not given")
    assert not (tmp_path / "out.jsonl").exists()


def test_another_protocol_by_name_or_file(tmp_path: Path) -> None:
    write(tmp_path, "a")
    with pytest.raises(ProtocolError, match="no protocol 'strict-v9'; did you mean strict-v1"):
        run(tmp_path / "a", tmp_path / "a", tmp_path / "out.jsonl", protocol="strict-v9")
    text = (ROOT / "config" / "protocols" / "strict-v1.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("name: strict-v1", "name: mine").replace("eps: 0.0", "eps: 1.0e-8"))
    command(tmp_path, "--pred", "a", "--gt", "a", "--metrics", "psnr", "--protocol", "mine.yaml", "--out", "out.jsonl")
    (row,) = results.read(tmp_path / "out.jsonl")
    assert row.signature.startswith("psnr|mine|") and row.value == pytest.approx(80.0, abs=1e-6)  # 1e-8 caps identical frames


def test_weights_that_are_not_there_are_a_row_a_line_and_on_request_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVSR_ASSETS", str(tmp_path / "none"))
    pred, out = write(tmp_path, "a") / "a", tmp_path / "out.jsonl"
    rows = run(pred, pred, out, metrics=["psnr", "lpips"])
    assert results.read(out) == rows and [row.value for row in rows] == [float("inf"), None]
    assert "python -m qvsr assets fetch alexnet" in rows[1].missing
    assert stage.summary(rows).splitlines()[1] == f"lpips: n/a ({rows[1].missing}), 1 clip, {rows[1].signature}"
    out.unlink()
    with pytest.raises(results.ResultError, match="a: lpips has no value: .*python -m qvsr assets fetch alexnet"):
        run(pred, pred, out, metrics=["psnr", "lpips"], require_all=True)
    assert not out.exists()


def test_require_all_is_read_from_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    monkeypatch.setattr(stage.measuring, "measure_clip", lambda *_, require_all, **__: given.append(require_all) or [])
    write(tmp_path, "a")
    for value in (False, True):
        run(tmp_path / "a", None, tmp_path / "out.jsonl", require_all=value)
    assert given == [False, True]
