"""`make new-baseline`: what it refuses, and that nothing is left half-written."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from qvsr.provenance import ROOT


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The script, writing into a folder of its own; names are those of this repository."""
    script = runpy.run_path(str(ROOT / "scripts" / "new_baseline.py"))
    monkeypatch.setitem(script["files"].__globals__, "ROOT", tmp_path)
    return script


def written(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no name; write make new-baseline NAME=mine"),
        ("a-b", "name 'a-b' is not made of letters, digits and _, with a letter first; a file and a function are called by it"),
        ("../mine", "name '../mine' is not made of letters"),
        ("3bits", "name '3bits' is not made of letters"),
        ("_mine", "name '_mine' is not made of letters"),
        ("méthode", "name 'méthode' is not made of letters"),
        ("lambda", "name 'lambda' is a keyword of Python; a function is called by it"),
        ("match", "name 'match' is a keyword of Python"),
        ("apply", "name 'apply' is one that the file imports; choose another"),
        ("maxmin", "name 'maxmin' is taken; taken are bicubic, "),
        ("QuantVSR", "name 'QuantVSR' is taken"),
        ("bicubic", "name 'bicubic' is taken"),
    ],
)
def test_bad_names(copy: dict, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        copy["main"](name)
    assert str(caught.value).startswith(f"error: {message}") and "\n" not in str(caught.value)
    assert written(tmp_path) == []


def test_names_that_files_have(copy: dict, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "study.yaml").write_text("variants: {split: {method: maxmin}}\nexternal: {near: {rules: a.smk}}\n")
    before = written(tmp_path)
    for name, message in (
        ("split", "name 'split' is taken by variants.split in config/study.yaml"),
        ("near", "name 'near' is taken by external.near in config/study.yaml"),
        ("study", "config/study.yaml is there already; choose another name"),
    ):
        with pytest.raises(SystemExit, match=message):
            copy["main"](name)
    assert written(tmp_path) == before


def test_all_files_or_none(copy: dict, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("a file where a folder is needed")
    with pytest.raises(OSError):
        copy["main"]("mine")
    assert written(tmp_path) == ["config"]


def test_the_method_has_about_twenty_lines(copy: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy["main"]("mine")
    assert written(tmp_path) == ["baselines/mine.py", "config/mine.yaml", "tests/baselines/test_mine.py"]
    assert len((tmp_path / "baselines" / "mine.py").read_text().splitlines()) <= 22
    printed = capsys.readouterr().out
    for file in written(tmp_path):
        assert f"written: {file}\n" in printed and "NAME" not in (tmp_path / file).read_text()
    assert (
        "next: .venv/bin/python -m pytest tests/baselines/test_mine.py\n      .venv/bin/snakemake --cores 2 --configfile config/mine.yaml"
        in printed
    )
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), str(tmp_path)], capture_output=True, text=True
    )
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml"), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == formatted.returncode == 0, checked.stdout + formatted.stdout + formatted.stderr
