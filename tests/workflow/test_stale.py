"""An edit of a file that a stage uses, or of a setting that it reads, makes exactly that stage and what follows stale."""

import contextlib
import os
import re
import shutil
import subprocess
import sys

import pytest

from qvsr.provenance import ROOT
from tests.workflow import tiny

AFTER_MEASURE = {"tables", "figures"}
AFTER_RESTORE = {"measure", *AFTER_MEASURE}
AFTER_QUANTIZE = {"restore", *AFTER_RESTORE}
AFTER_CALIBRATE = {"quantize", *AFTER_QUANTIZE}
AFTER_CLIPS = {"calibrate", *AFTER_CALIBRATE}


@contextlib.contextmanager
def edited(file):
    """A line added, and taken away again."""
    before = file.read_bytes()
    file.write_bytes(before + b"\n# edited\n")
    try:
        yield
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("qvsr/data/degrade.py", {"clips", *AFTER_CLIPS}),
        ("qvsr/data/calibration.py", {"calibrate", *AFTER_CALIBRATE}),
        ("qvsr/models/sampler.py", {"calibrate", *AFTER_CALIBRATE}),
        ("qvsr/quantvsr.py", {"quantize", *AFTER_QUANTIZE}),
        ("baselines/maxmin.py", {"quantize", *AFTER_QUANTIZE}),
        ("qvsr/stages/restore.py", {"restore", *AFTER_RESTORE}),
        ("metrics/gmsd.py", {"measure", *AFTER_MEASURE}),
        ("qvsr/quant/cost.py", {"tables"}),
        ("qvsr/report/fairness.py", {"tables"}),
        ("qvsr/report/figures.py", {"figures"}),
        ("qvsr/report/layers.py", set()),
        ("qvsr/cli.py", set()),
        ("config/README.md", set()),
    ],
)
def test_an_edit_makes_its_stage_and_what_follows_stale(finished, file, stale):
    with edited(finished / file):
        assert tiny.due(finished) == stale


@pytest.mark.parametrize(
    ("override", "stale"),
    [
        ("seed=43", {"calibrate", *AFTER_CALIBRATE}),
        ("sampling={steps: 4}", {"calibrate", *AFTER_CALIBRATE}),
        ("method={maxmin: {activations: static}}", {"quantize", *AFTER_QUANTIZE}),
        ("variants={rotation: {settings: {channel_split: false}}}", {"quantize", *AFTER_QUANTIZE}),
        ("variants={other: {method: maxmin}}", {"tables"}),
        ("metrics=[psnr, ssim]", AFTER_RESTORE),
        ("methods=[maxmin]", AFTER_MEASURE),
        ("bits=[W4A4, W8A8]", AFTER_CALIBRATE),  # the new bits only
        ("training={seed: 8}", set()),
        ("seeds=[42]", set()),
        ("seeds=[42, 43]", AFTER_QUANTIZE),  # the new seed only
    ],
)
def test_a_setting_makes_stale_what_reads_it(finished, override, stale):
    assert tiny.due(finished, "--config", override) == stale


def test_a_changed_source_makes_its_clip_stale(finished):
    frame = finished / "videos" / "clips" / "walk" / "00000001.png"
    before, times = frame.read_bytes(), (frame.stat().st_atime_ns, frame.stat().st_mtime_ns)
    tiny.write_frames(frame.parent.with_name("other"), seed=8)
    try:
        frame.write_bytes((frame.parent.with_name("other") / frame.name).read_bytes())
        shutil.rmtree(frame.parent.with_name("other"))
        assert tiny.due(finished) == {"clips", *AFTER_RESTORE, "restore"}
    finally:
        frame.write_bytes(before)
        os.utime(frame, ns=times)


def test_a_changed_variant_leaves_every_other_row_alone(finished):
    done = tiny.snakemake(finished, "--dry-run", "--config", "variants={rotation: {settings: {channel_split: false}}}")
    outputs = re.findall(r"^ +output: (.+)$", done.stdout + done.stderr, flags=re.MULTILINE)
    own = {"quantized/rotation-W4A4.safetensors", "restored/clips/rotation-W4A4/walk", "measured/clips/rotation-W4A4.jsonl"}
    assert {output.removeprefix("results/") for output in outputs} == {*own, "tables", "figures"}


def test_new_bits_leave_the_old_ones_alone(finished):
    done = tiny.snakemake(finished, "--dry-run", "--config", "bits=[W4A4, W8A8]")
    wanted = [line for line in (done.stdout + done.stderr).splitlines() if "output: " in line]
    assert [line for line in wanted if "W8A8" in line]
    assert not [line for line in wanted if "W4A4" in line]


def test_a_second_seed_leaves_the_first_alone(finished):
    done = tiny.snakemake(finished, "--dry-run", "--config", "seeds=[42, 43]")
    outputs = re.findall(r"^ +output: (.+)$", done.stdout + done.stderr, flags=re.MULTILINE)
    noisy = ("full_precision-W32A32-seed43", "maxmin-W4A4-seed43", "rotation-W4A4-seed43", "quantvsr-W4A4-seed43")
    own = {path for row in noisy for path in (f"restored/clips/{row}/walk", f"measured/clips/{row}.jsonl")}
    assert {output.removeprefix("results/") for output in outputs} == {*own, "tables", "figures"}


def test_weights_of_another_training_make_everything_that_reads_them_stale(finished):
    files = [finished / tiny.BACKBONE[key] for key in ("weights", "vae_weights")]
    for file in files:
        shutil.copy2(file, file.with_suffix(".kept"))
    try:
        tiny.write_weights(finished, tiny.BACKBONE, seed=5)
        assert tiny.due(finished) == {"calibrate", *AFTER_CALIBRATE}
    finally:
        for file in files:
            file.with_suffix(".kept").replace(file)


# What every stage loads and what decides nothing about its output by itself: settings arrive as values, which have a digest of their own.
COMMON = {
    "qvsr",
    "qvsr.__main__",
    "qvsr.cli",
    "qvsr.config",
    "qvsr.settings",
    "qvsr.method_settings",
    "qvsr.registry",
    "qvsr.plan",
    "qvsr.provenance",
    "qvsr.memory",
    "qvsr.progress",
    "qvsr.stages",
}
LOADED = """
import sys
from qvsr.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("LOADED", *sorted(name for name in sys.modules if name.split(".")[0] in ("qvsr", "baselines", "metrics")))
"""


@pytest.mark.parametrize("rule", ["clips", "calibrate", "quantize", "restore", "measure", "tables", "figures", "layers"])
def test_every_module_that_a_stage_loads_is_in_its_digest(finished, tmp_path, rule):
    """An edit of a module that a stage uses would go unnoticed if its rule did not name the file."""
    results = finished / "results"
    clips, rows = results / "clips" / "clips", results / "measured" / "clips"
    checkpoint = results / "quantized" / "quantvsr-W4A4.safetensors"
    restored = results / "restored" / "clips"
    measured = sorted(str(file) for file in rows.rglob("*.jsonl"))
    arguments = {
        "clips": ["--dataset", "clips", "--clip", "walk", "--gt", tmp_path / "gt", "--lq", tmp_path / "lq"],
        "calibrate": ["--out", tmp_path / "out", results / "clips" / "calibration" / "LQ" / "run"],
        "quantize": ["--method", "quantvsr", "--bits", "W4A4", "--calibration", results / "calibration", "--out", tmp_path / "out"],
        "restore": [
            "--method",
            "quantvsr",
            "--bits",
            "W4A4",
            "--checkpoint",
            checkpoint,
            "--lq",
            clips / "LQ" / "walk",
            "--out",
            tmp_path / "out",
        ],
        "measure": [
            *("--pred", restored / "maxmin-W4A4" / "walk", "--gt", clips / "GT" / "walk"),
            *("--fp", restored / "full_precision-W32A32" / "walk", "--out", tmp_path / "out"),
        ],
        "tables": ["--checkpoint", checkpoint, "--out", tmp_path / "out", *measured],
        "figures": ["--out", tmp_path / "out", *measured],
        "layers": ["--checkpoint", checkpoint, "--calibration", results / "calibration", "--out", tmp_path / "out.csv"],
    }[rule]
    command = [sys.executable, "-c", LOADED, rule, "--config", str(results / "config.json"), *map(str, arguments)]
    done = subprocess.run(command, cwd=finished, env=tiny.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split("LOADED")[1].split()) - COMMON
    # tables and figures follow from the other stages: what those name makes them stale too. Figures load the order of rows from the
    # module of the tables, with types of the cost that they do not draw; the report by layer loads that module's writer of csv alike.
    follows = {"tables": ("quantize", "measure"), "figures": ("clips", "quantize", "measure", "tables"), "layers": ("quantize", "measure")}
    rules = (*follows.get(rule, ()), rule)
    assert loaded - set().union(*(named(one) for one in rules)) == set()


def named(rule: str) -> set[str]:
    """Modules that a rule's code_digest covers; a package's empty __init__ needs no mention."""
    found: set[str] = set()
    for pattern in re.findall(r'"(!?(?:qvsr|baselines|metrics)/[^" ]*\.py)"', (ROOT / "workflow" / "rules" / f"{rule}.smk").read_text()):
        files = {
            ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for file in ROOT.glob(pattern.removeprefix("!"))
        }
        found = found - files if pattern.startswith("!") else found | files
    return found | {name.rpartition(".")[0] for name in found}
