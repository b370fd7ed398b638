"""Methods that users add, through the workflow: a new file, an installed package, another program's frames."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qvsr.provenance import ROOT
from qvsr.quant import checkpoint
from tests import plugin
from tests.workflow import tiny
from tests.workflow.test_errors import assert_one_line

RESTORED_ROWS = {"restore", "measure", "tables", "figures"}


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A finished run that the test may change."""
    return Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))


def run(project: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Snakemake in the project; `path` is where packages are installed."""
    environment = tiny.environment() | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run(tiny.snakemake_command(*arguments), cwd=project, env=environment, capture_output=True, text=True)


def stage(project: Path, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return tiny.stage(project, *arguments, PYTHONPATH=str(path))


def rows(project: Path, table: str) -> list[dict[str, str]]:
    with (project / "results" / "tables" / f"{table}.csv").open() as file:
        return list(csv.DictReader(file))


def due(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Rules and outputs of a dry run's jobs, by output."""
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^(?:local)?rule (\w+):.*?^ +output: (\S+)", done.stdout + done.stderr, re.MULTILINE | re.DOTALL)
    return {output: rule for rule, output in found}


# ---- make new-baseline -----------------------------------------------------------------------------------------------


def test_a_new_baseline_runs_as_it_is(project: Path) -> None:
    """Its test, its configuration, a run with it; and no name, or a bad one, leaves everything as it was."""
    for name in ("scripts", "tests", "Makefile", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, project / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, project / name)
    (project / ".venv").symlink_to(sys.prefix)

    def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "--old-file", ".venv/.ready", "new-baseline", *arguments]
        return subprocess.run(command, cwd=project, env={**tiny.environment(), **variables}, capture_output=True, text=True)

    before = sorted(project.glob("[bct]*/**/*.*"))
    assert_one_line(make("NAME=a b"), "name 'a b' is not made of letters")
    assert_one_line(make(NAME="shell"), "no name; write make new-baseline NAME=mine")
    assert sorted(one for one in project.glob("[bct]*/**/*.*") if "__pycache__" not in one.parts) == before
    done = make("NAME=mine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "config/mine.yaml" in done.stdout and "pytest tests/baselines/test_mine.py" in done.stdout

    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/baselines/test_mine.py"]
    tested = subprocess.run(command, cwd=project, env=tiny.environment(), capture_output=True, text=True)
    assert tested.returncode == 0 and "6 passed" in tested.stdout, tested.stdout + tested.stderr
    checked = tiny.stage(project, "config", "check", "config/mine.yaml")
    assert checked.returncode == 0 and "output in results/mine" in checked.stdout, checked.stderr
    assert yaml.safe_load((project / "config" / "mine.yaml").read_text())["methods"] == ["maxmin", "mine"]

    done = run(project, "--config", "methods=[mine]")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["method"] for row in rows(project, "metrics")} == {"ground_truth", "bicubic", "full_precision", "mine"}
    found, nearest = (checkpoint.read_header(project / "results" / "quantized" / f"{name}-W4A4.safetensors") for name in ("mine", "maxmin"))
    assert found["content"] == nearest["content"], "round to nearest is what MaxMin does"


# ---- a package -------------------------------------------------------------------------------------------------------


def test_a_package_of_its_own(project: Path, tmp_path: Path) -> None:
    path = plugin.install(tmp_path / "installed")
    methods = ["--config", "methods=[maxmin, mine]"]
    done = run(project, *methods, path=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("mine", "W4A4") in {(row["method"], row["bits"]) for row in rows(project, "metrics")}
    assert "mine" in {row["method"] for row in rows(project, "cost")}
    header = checkpoint.read_header(project / "results" / "quantized" / "mine-W4A4.safetensors")
    assert header["plugin"] == "package qvsr-mine 1.0" and header["spec"]["settings"] == {"floored": False, "scale_floor": 1e-4}

    own = {
        "results/quantized/mine-W4A4.safetensors",
        "results/restored/clips/mine-W4A4/walk",
        "results/measured/clips/mine-W4A4.jsonl",
    }
    own |= {"results/tables", "results/figures"}
    assert due(run(project, "--dry-run", *methods, path=path)) == {}
    changed = run(project, "--dry-run", *methods, "method={mine: {floored: true}}", path=path)
    assert set(due(changed)) == own
    plugin.install(path, version="1.1")
    assert set(due(run(project, "--dry-run", *methods, path=path))) == own


def test_what_is_wrong_with_a_package_is_one_line(project: Path, tmp_path: Path) -> None:
    path = plugin.install(tmp_path / "installed", code="import torch, no_such_package")
    assert run(project, "--dry-run", "--config", "methods=[mine]", path=path).returncode == 0, "a dry run imports no package"
    quantize = ["quantize", "--config", "config/tiny.yaml", "--bits", "W4A4", "--calibration", "results/calibration"]
    broken = stage(project, path, *quantize, "--method", "mine", "--out", "x.safetensors")
    assert_one_line(broken, "package qvsr-mine 1.0: its method 'mine' cannot be loaded", "No module named 'no_such_package'")
    fine = stage(project, path, *quantize, "--method", "maxmin", "--out", "y.safetensors")
    assert fine.returncode == 0, "a broken package is no other method's concern: " + fine.stderr
    assert_one_line(
        stage(project, path, "config", "check", "config/tiny.yaml", "--set", "methods=[mine]"), "cannot be loaded from qvsr_mine"
    )

    plugin.install(path)
    refused = stage(project, path, *quantize, "--method", "mine", "--out", "x.safetensors", "--set", "method.mine.floord=true")
    assert_one_line(refused, "method.mine: unknown key floord: no key 'floord'; did you mean floored?")
    plugin.install(path, name="maxmin")
    assert_one_line(run(project, "--dry-run", path=path), "package qvsr-mine 1.0: its method 'maxmin' has the name of one of ours")
    assert not (project / "x.safetensors").exists()


# ---- another program -------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "add-a-baseline.md").read_text(), re.DOTALL)


@pytest.fixture
def external(project: Path) -> Path:
    """The rule, the program and the configuration of docs/add-a-baseline.md, as they stand there, on the tiny project's settings."""
    (project / "nearest.smk").write_text(blocks("snakemake")[0])
    (project / "nearest.py").write_text(blocks("python")[-1])
    text = blocks("yaml")[0]
    assert text.startswith("extends: default.yaml\n")
    (project / "config" / "external.yaml").write_text(text.replace("default.yaml", "tiny.yaml"))
    return project


def test_another_program_ends_in_a_row(external: Path) -> None:
    wanted = tiny.snakemake(external, "--dry-run", config="external")
    jobs = due(wanted)
    assert jobs["results/restored/clips/nearest-W32A32/walk"] == "nearest" and set(jobs.values()) == {
        "nearest",
        "measure",
        "tables",
        "figures",
    }
    assert [output for output, rule in jobs.items() if rule == "measure"] == ["results/measured/clips/nearest-W32A32.jsonl"]
    done = tiny.snakemake(external, config="external")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["metric"]: row for row in rows(external, "metrics") if row["method"] == "nearest"}
    assert {(row["bits"], row["execution"], row["frames"]) for row in found.values()} == {("W32A32", "external", "3")}
    assert 5 < float(found["psnr"]["value"]) < 60
    assert {row["method"] for row in rows(external, "cost")} == {"full_precision", "maxmin"}
    text = (external / "results" / "tables" / "metrics.md").read_text()
    assert "- Frames written by another program: nearest.\n" in text and "| W32A32 | nearest " in text
    assert any(f"Quantized rows are {execution}: " in text for execution in ("packed", "simulated"))  # the processor decides
    assert due(tiny.snakemake(external, "--dry-run", config="external")) == {}
    (external / "nearest.py").write_text(blocks("python")[-1].replace("NEAREST", "BILINEAR"))
    assert set(due(tiny.snakemake(external, "--dry-run", config="external")).values()) == {"nearest", "measure", "tables", "figures"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"external": {"nearest": {"rules": "nerest.smk"}}},
            ["external.nearest.rules: no file nerest.smk; paths begin at the folder where"],
        ),
        (
            {"external": {"maxmin": {"rules": "nearest.smk"}}},
            ["external.maxmin: maxmin is a row already, an external one needs a name of its own"],
        ),
        ({"external": {"rotation": {"rules": "nearest.smk"}}}, ["external.rotation: rotation is a row already"]),
        ({"external": {"a/b": {"rules": "nearest.smk"}}}, ["external.a/b: name 'a/b' is not made of letters"]),
        ({"external": {"other": {}}}, ["external.other.rules: Field required"]),
        ({"external": {"nearest": {"bits": ["W9A9"]}}}, ["external.nearest.bits: bits 'W9A9': each is WxAy"]),
        ({"methods": ["nerest"]}, ["no method 'nerest'; did you mean nearest? known: "]),
    ],
    ids=lambda one: str(one)[:40],
)
def test_what_is_wrong_with_an_external_row_is_one_line(external: Path, values: dict, words: list[str]) -> None:
    (external / "config" / "wrong.yaml").write_text(yaml.safe_dump({"extends": "external.yaml", **values}))
    assert_one_line(tiny.snakemake(external, "--dry-run", config="wrong"), *words)
    assert_one_line(tiny.stage(external, "config", "check", "config/wrong.yaml"), *words)
