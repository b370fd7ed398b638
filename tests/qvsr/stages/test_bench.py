"""The bench command: its contract, what it refuses before it measures, and what stands in the files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qvsr import config as settings
from qvsr.provenance import ROOT, device
from qvsr.speed.timing import BenchError
from qvsr.stages import bench as stage
from qvsr.stages import doctor
from tests.workflow import tiny

CONTRACT = ("name", "kind", "shape", "bits", "execution", "backend", "seconds", "seconds_fp32", "ratio_fp32", "error", "macs")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "qvsr", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


def test_the_command_keeps_its_contract(tmp_path: Path) -> None:
    """A quick look at the layers of a tiny network: every row is complete, packed layers compute what simulated ones do."""
    config, out = tmp_path / "tiny.yaml", tmp_path / "new" / "layers.json"
    tiny.write_config(config, tiny.CONFIG)
    done = run("bench", "layers", "--quick", "--config", config, "--threads", 1, "--seconds", 0.01, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "| packed W4A4 r24" in done.stdout
    rows = json.loads(out.read_text())
    assert isinstance(rows, list) and all(tuple(row)[: len(CONTRACT)] == CONTRACT for row in rows)
    assert {row["kind"] for row in rows} == {"Linear", "Conv2d", "Conv3d"}
    path = doctor.layer_paths()[0].execution
    assert {(row["device"], row["threads"], row["torch"], row["path"]) for row in rows} == {(device(), 1, torch.__version__, path)}
    for row in rows:
        assert row["seconds"] > 0 and row["seconds_q1"] <= row["seconds"] <= row["seconds_q3"] and row["rounds"] >= 3
        assert row["ratio_fp32"] == pytest.approx(row["seconds_fp32"] / row["seconds"])
        assert (row["error"] is not None) == (row["execution"] == "packed")
        if row["execution"] == "packed":
            assert row["error"] < 1e-5 and row["backend"] == ("cpu" if path == "packed" else path)
    head = json.loads((tmp_path / "new" / "layers.head.json").read_text())
    assert (head["kind"], head["network"], head["quick"], head["cores"]) == ("layers", "tiny", True, len(os.sched_getaffinity(0)))
    assert head["versions"]["torch"] == torch.__version__.partition("+")[0] and min(head["peaks"].values()) > 0
    assert sorted(file.name for file in out.parent.iterdir()) == ["layers.head.json", "layers.json"]

    made = run("speed", "--out", tmp_path / "tables", out)
    assert made.returncode == 0, made.stderr
    assert "(quick: not a result to quote)" in (tmp_path / "tables" / "speed.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "layer", "--out", "x.json"], "error: no benchmark 'layer'; did you mean layers? known: clip, layers, unet\n"),
        (
            ["bench", "layers", "--out", "x.csv"],
            "error: --out x.csv: a name that ends in .json is needed, the facts about the machine are written beside it as NAME.head.json\n",
        ),
        (
            ["bench", "clip", "--model", "none.safetensors", "--out", "x.json"],
            "error: no exported model none.safetensors; `python -m qvsr export` writes one\n",
        ),
        (
            ["speed", "--out", "x", "none.json"],
            "error: no file none.json; `python -m qvsr bench` writes both none.json and none.head.json\n",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (1, words)


def test_what_cannot_be_written_is_refused_before_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvsr.speed.machine import Peaks

    monkeypatch.setattr(Peaks, "measure", classmethod(lambda cls, *args: pytest.fail("it began to measure")))
    config = settings.validate(tiny.CONFIG, "test")
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    for out, words in (
        (tmp_path / "file" / "x.json", r"x.json: nothing can be written in .*file; give a file in a folder of yours$"),
        (tmp_path / "folder.json", r"folder.json is a folder; give the name of a file$"),
        (tmp_path / "x.head.json", r"x.head.json: a name that ends in .json is needed"),
    ):
        with pytest.raises(BenchError, match=words):
            stage.run(config, "layers", out)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(BenchError, match=r"nothing can be written in .*; give a file in a folder of yours$"):
        stage.run(config, "layers", tmp_path / "x.json")


def test_an_older_file_is_replaced_at_the_end_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvsr.speed import layers
    from qvsr.speed.machine import Peaks

    out = tmp_path / "layers.json"
    out.write_text("old")
    asked: dict[str, Any] = {}

    def measuring(found: Any, peaks: Any, facts: Any, backend: str, seconds: float, least: int) -> list[Any]:
        asked.update(found=found, facts=facts, seconds=seconds, least=least)
        raise KeyboardInterrupt

    monkeypatch.setattr(Peaks, "measure", classmethod(lambda cls, *args: cls(1, 1, 1, 1)))
    monkeypatch.setattr(layers, "run", measuring)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        stage.run(settings.validate(tiny.CONFIG, "test"), "layers", out, threads=threads)
    assert [file.name for file in tmp_path.iterdir()] == ["layers.json"] and out.read_text() == "old"
    assert all(shape.quantized for shape in asked["found"]) and len(asked["found"]) > 5  # all of them, and no layer that methods leave out
    assert (asked["seconds"], asked["least"], asked["facts"]["threads"]) == (5, 5, threads)


def test_a_busy_machine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from qvsr.speed import layers, machine

    monkeypatch.setattr(machine.Peaks, "measure", classmethod(lambda cls, *args: cls(1, 1, 1, 1)))
    monkeypatch.setattr(layers, "run", lambda *args: [])
    monkeypatch.setattr(machine, "cores", lambda: 4)
    for load, said in ((1.9, False), (2.1, True), (None, False)):
        monkeypatch.setattr(machine, "load", lambda load=load: load)
        caplog.clear()
        stage.run(settings.validate(tiny.CONFIG, "test"), "layers", tmp_path / "x.json", threads=torch.get_num_threads())
        assert ("others compute here, too (load average 2.1, 4 cores)" in caplog.text) == said
        assert json.loads((tmp_path / "x.head.json").read_text())["load"] == [load, load]
