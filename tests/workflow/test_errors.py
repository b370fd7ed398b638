"""What a user can do wrong is one clear line and a non-zero exit, and leaves nothing half-written."""

import copy
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.workflow import tiny


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The last line says what is wrong, in words; there is no other error and no traceback."""
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    for word in words:
        assert word in lines[0]


def assert_nothing_written(*outputs: Path) -> None:
    for output in outputs:
        assert not output.exists()
        if output.parent.exists():
            assert not [one.name for one in output.parent.iterdir() if one.name.startswith(".partial-")]


def restore(project: Path, out: Path, *more: str, config: str = "results/config.json", lq: str = "results/clips/clips/LQ/walk"):
    return tiny.stage(project, "restore", "--config", config, "--lq", lq, "--out", str(out), *more)


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("metric=[psnr]", ["config/tiny.yaml: unknown key metric", "did you mean metrics?"]),
        ("methods=[maxmim]", ["no method 'maxmim'; did you mean maxmin? known: bicubic, efficientdm, full_precision, maxmin, "]),
        (
            "variants={rotation: {settings: {rotatoin: false}}}",
            ["variants.rotation.settings: unknown key rotatoin", "did you mean rotation?"],
        ),
        ("variants={rotation: {method: quantvrs}}", ["variants.rotation.method: no method 'quantvrs'; did you mean quantvsr?"]),
        ("metrics=[psrn]", ["no metric 'psrn'; did you mean psnr? known: "]),
        ("bits=[W1A1]", ["bits 'W1A1' is not WxAy with x and y from 2 to 8"]),
        ("evaluate=[clip]", ["no dataset 'clip'; did you mean clips?"]),
    ],
)
def test_the_workflow_refuses_settings_before_it_starts(finished, override, words):
    before = tiny.outputs(finished)
    assert_one_line(tiny.snakemake(finished, "--config", override), *words)
    assert tiny.outputs(finished) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["config", "check", "none.yaml"], ["no configuration none.yaml; try config/default.yaml"]),
        (["config", "check", "config/tiny.yaml", "--set", "sampling.step=1"], ["unknown key sampling.step", "did you mean steps?"]),
        (["config", "check", "config/tiny.yaml", "--set", "seed"], ["--set seed: KEY=VALUE is expected"]),
        (
            [
                "quantize",
                "--config",
                "config/tiny.yaml",
                "--method",
                "maxmim",
                "--bits",
                "W4A4",
                "--calibration",
                "results/calibration",
                "--out",
                "x",
            ],
            ["no method 'maxmim'; did you mean maxmin?"],
        ),
        (
            [
                "quantize",
                "--config",
                "config/tiny.yaml",
                "--method",
                "maxmin",
                "--bits",
                "4",
                "--calibration",
                "results/calibration",
                "--out",
                "x",
            ],
            ["bits '4' is not WxAy"],
        ),
    ],
)
def test_a_stage_refuses_settings(finished, arguments, words):
    assert_one_line(tiny.stage(finished, *arguments), *words)
    assert_nothing_written(finished / "x")


# ---- clips ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lq(finished, tmp_path) -> Path:
    """A copy of the LQ frames that a test may damage."""
    return Path(shutil.copytree(finished / "results" / "clips" / "clips" / "LQ" / "walk", tmp_path / "LQ" / "walk"))


def test_a_missing_frame(finished, tmp_path, lq):
    (lq / "00000001.png").unlink()
    assert_one_line(restore(finished, tmp_path / "out", lq=str(lq)), str(lq), "00000001.png", "missing")
    assert_nothing_written(tmp_path / "out")


def test_a_missing_last_frame(finished, tmp_path, lq):
    (lq / "00000002.png").unlink()
    assert_one_line(restore(finished, tmp_path / "out", lq=str(lq)), str(lq), "2 frames, clip.json says 3")
    assert_nothing_written(tmp_path / "out")


def test_a_truncated_png(finished, tmp_path, lq):
    frame = lq / "00000002.png"
    frame.write_bytes(frame.read_bytes()[:-30])
    assert_one_line(restore(finished, tmp_path / "out", lq=str(lq)), str(frame), "truncated PNG")
    assert_nothing_written(tmp_path / "out")


def test_a_missing_frame_of_the_source_fails_in_the_workflow(finished, tmp_path):
    project = Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))
    shutil.rmtree(project / "results")
    (project / "videos" / "clips" / "walk" / "00000001.png").unlink()
    done = tiny.snakemake(project, "results/clips/clips/GT/walk")
    assert_one_line(done, "00000001.png", "missing")
    assert_nothing_written(project / "results" / "clips" / "clips" / "GT" / "walk", project / "results" / "clips" / "clips" / "LQ" / "walk")


def test_sizes_that_do_not_match(finished, tmp_path):
    tiny.write_frames(tmp_path / "pairs" / "GT" / "a", seed=1, size=64)
    tiny.write_frames(tmp_path / "pairs" / "LQ" / "a", seed=1, size=20)
    config = copy.deepcopy(tiny.CONFIG)
    config["datasets"]["clips"] = {"kind": "paired", "path": str(tmp_path / "pairs"), "frames": 3}
    tiny.write_config(tmp_path / "pairs.yaml", config)
    folders = (tmp_path / "out" / "gt", tmp_path / "out" / "lq")
    arguments = [
        "--config",
        str(tmp_path / "pairs.yaml"),
        "--dataset",
        "clips",
        "--clip",
        "a",
        "--gt",
        str(folders[0]),
        "--lq",
        str(folders[1]),
    ]
    assert_one_line(tiny.stage(finished, "clips", *arguments), "GT is 64x64, LQ 20x20", "x4 needs GT 80x80")
    assert_nothing_written(*folders)


def test_a_prediction_of_another_size(finished, tmp_path):
    clips = finished / "results" / "clips" / "clips"
    arguments = ["--config", "results/config.json", "--pred", str(clips / "LQ" / "walk"), "--gt", str(clips / "GT" / "walk")]
    done = tiny.stage(finished, "measure", *arguments, "--metrics", "psnr", "--out", str(tmp_path / "out.jsonl"))
    assert_one_line(done, "walk: the prediction has 3 frames of 16x16, the ground truth 3 frames of 64x64; check upscale and the clips")
    assert_nothing_written(tmp_path / "out.jsonl")


# ---- weights --------------------------------------------------------------------------------------------------------


def test_not_a_number_in_the_output(finished, tmp_path):
    """Finite weights so large that the output is not: what a broken training or quantization would give."""
    weights = load_file(finished / tiny.BACKBONE["weights"])
    weights = {key: value.float() for key, value in weights.items()}
    weights["model.diffusion_model.out.2.weight"] = torch.full_like(weights["model.diffusion_model.out.2.weight"], 3e38)
    save_file(weights, tmp_path / "large.safetensors")
    done = restore(finished, tmp_path / "out", "--set", f"backbone.weights={tmp_path / 'large.safetensors'}")
    assert_one_line(done, "clips/walk: segment 0 (frames 0 to 2)", "NaN or infinite")
    assert_nothing_written(tmp_path / "out")


def test_weights_of_another_configuration(finished, tmp_path):
    done = restore(finished, tmp_path / "out", "--set", "backbone.unet.model_channels=64")
    assert_one_line(done, "tiny.safetensors is of another configuration", "check backbone.*")
    assert_nothing_written(tmp_path / "out")


def test_a_checkpoint_of_another_backbone(finished, tmp_path):
    other = tmp_path / "other"
    tiny.write_weights(other, tiny.BACKBONE, seed=9)
    done = restore(
        finished,
        tmp_path / "out",
        *("--method", "maxmin", "--bits", "W4A4", "--checkpoint", "results/quantized/maxmin-W4A4.safetensors"),
        *("--set", f"backbone.weights={other / tiny.BACKBONE['weights']}"),
    )
    assert_one_line(done, "maxmin-W4A4.safetensors was made from other weights")
    assert_nothing_written(tmp_path / "out")


def test_a_checkpoint_of_another_row(finished, tmp_path):
    done = restore(
        finished, tmp_path / "out", "--method", "quantvsr", "--bits", "W4A4", "--checkpoint", "results/quantized/maxmin-W4A4.safetensors"
    )
    assert_one_line(done, "maxmin-W4A4.safetensors is maxmin W4A4, not quantvsr W4A4")


def test_a_calibration_of_another_backbone(finished, tmp_path):
    other = tmp_path / "other"
    tiny.write_weights(other, tiny.BACKBONE, seed=9)
    arguments = [
        "--config",
        "results/config.json",
        "--calibration",
        "results/calibration",
        "--set",
        f"backbone.weights={other / tiny.BACKBONE['weights']}",
    ]
    words = ("results/calibration was recorded with other weights (tiny ", "record it again")
    assert_one_line(
        tiny.stage(finished, "quantize", *arguments, "--method", "maxmin", "--bits", "W4A4", "--out", str(tmp_path / "out")), *words
    )
    assert_one_line(
        tiny.stage(
            finished, "layers", *arguments, "--checkpoint", "results/quantized/maxmin-W4A4.safetensors", "--out", str(tmp_path / "out.csv")
        ),
        *words,
    )
    assert_nothing_written(tmp_path / "out", tmp_path / "out.csv", tmp_path / "out.png")


def test_a_report_by_layer_under_a_name_that_has_no_figure_beside_it(finished, tmp_path):
    arguments = [
        "--config",
        "results/config.json",
        "--checkpoint",
        "results/quantized/maxmin-W4A4.safetensors",
        "--calibration",
        "results/calibration",
    ]
    done = tiny.stage(finished, "layers", *arguments, "--out", str(tmp_path / "out.png"))
    assert_one_line(done, "out.png: a name that ends in .csv is needed")
    assert_nothing_written(tmp_path / "out.png")


def test_no_weights_at_all(finished, tmp_path):
    done = restore(finished, tmp_path / "out", "--set", "backbone.weights=none.safetensors")
    assert_one_line(done, "no weights none.safetensors; set backbone.weights")


# ---- a full disk ----------------------------------------------------------------------------------------------------


def full_disk_arguments(finished: Path, out: Path) -> dict[str, list[str]]:
    results = finished / "results"
    return {
        "restore": ["--lq", str(results / "clips" / "clips" / "LQ" / "walk"), "--out", str(out)],
        "quantize": ["--method", "maxmin", "--bits", "W4A4", "--calibration", str(results / "calibration"), "--out", str(out)],
        "calibrate": ["--out", str(out), str(results / "clips" / "calibration" / "LQ" / "run")],
        "clips": ["--dataset", "clips", "--clip", "walk", "--gt", str(out), "--lq", str(out.with_name("lq"))],
        "figures": ["--out", str(out), *sorted(str(file) for file in (results / "measured").rglob("*.jsonl"))],
    }


@pytest.mark.parametrize("stage", ["restore", "quantize", "calibrate", "clips", "figures"])
def test_a_file_that_may_not_grow(finished, tmp_path, stage):
    """A limit on file sizes: the write fails as on a full disk, at any user's."""
    out = tmp_path / "folder" / "out"
    command = [sys.executable, "-m", "qvsr", stage, "--config", "results/config.json", *full_disk_arguments(finished, out)[stage]]
    done = subprocess.run(
        command,
        cwd=finished,
        env={**tiny.environment(), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)),
    )
    assert_one_line(done, "the disk is full", "MB free in", "free some space or change output")
    assert_nothing_written(out)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 64 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode == 0
    )
    if not mounted:
        pytest.skip("only root may mount a small file system; the limit on file sizes tests the same path")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("stage", ["restore", "quantize"])
def test_a_full_disk(finished, small_disk, stage):
    (small_disk / "ballast").write_bytes(bytes(52 * 1024))
    out = small_disk / "folder" / "out"
    done = tiny.stage(finished, stage, "--config", "results/config.json", *full_disk_arguments(finished, out)[stage])
    assert_one_line(done, f"{out}: the disk is full (0.0 MB free in {small_disk}")
    assert_nothing_written(out)
