"""Measuring speed through the workflow: on request only, alone on the machine, tables of three files."""

from __future__ import annotations

import re
from pathlib import Path

from qvsr.speed.timing import KINDS
from tests.qvsr.report import test_speed as measured
from tests.workflow import tiny


def test_speed_is_measured_on_request_with_all_cores(tmp_path: Path) -> None:
    project = tiny.make(tmp_path / "project")
    assert not {"bench", "speed"} & tiny.due(project)
    done = tiny.snakemake(project, "--dry-run", "results/speed/tables")
    text = done.stdout + done.stderr
    blocks = [block for block in re.split(r"^rule ", text, flags=re.MULTILINE) if block.startswith("bench:")]
    assert len(blocks) == len(KINDS) and all("threads: 2" in block for block in blocks), text  # all cores: nothing runs beside it
    assert all(f"output: results/speed/{kind}.json, results/speed/{kind}.head.json" in text for kind in KINDS)


def test_tables_of_what_was_measured(tmp_path: Path) -> None:
    project = tiny.make(tmp_path / "project")
    folder = project / "results" / "speed"
    folder.mkdir(parents=True)
    for kind in KINDS:
        measured.write(folder, kind)
    assert tiny.due(project, "results/speed/tables") == {"speed"}
    assert tiny.due(project, "results/speed/tables", "--forcerun", "bench") == {"bench", "speed"}  # what `make bench` asks for
    done = tiny.snakemake(project, "results/speed/tables")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file.name for file in (folder / "tables").iterdir() if not file.name.startswith(".")} == {
        "speed.md",
        "machine.json",
        *(f"{kind}.csv" for kind in KINDS),
    }
