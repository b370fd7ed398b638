"""The tables stage on made rows: which tables there are, and how the first leads to the others."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import metrics  # noqa: F401 (fills the registry)
from qvsr import protocols, results
from qvsr.config import load
from qvsr.provenance import ROOT
from qvsr.results import Row
from qvsr.stages import tables as stage

STRICT = protocols.read("strict-v1")
PSNR = {("full_precision", "W32A32"): 23.27, ("maxmin", "W4A4"): 16.0, ("quantvsr", "W4A4"): 23.31}


def tables(folder: Path, clips: int = 4, **changes: object) -> Path:
    """Runs the stage on rows whose means are those of `PSNR`."""
    rows = [
        Row(
            **{
                "backbone": "mgld", "method": method, "bits": bits, "seed": 42, "dataset": "reds4", "clip": f"{i:03}", "metric": "psnr",
                "value": value + (i - (clips - 1) / 2), "frames": 100, "signature": STRICT.signature("psnr").replace("strict-v1", "paper-v1"),
            }
            | changes
        )
        for (method, bits), value in PSNR.items()
        for i in range(clips)
    ]  # fmt: skip
    results.write(folder / "rows.jsonl", rows)  # makes the folder
    config = load(ROOT / "config" / "default.yaml", {"metrics": ["psnr"], "methods": ["maxmin", "quantvsr"]})
    stage.run(config, [folder / "rows.jsonl"], [], folder / "tables")
    return folder / "tables"


def test_on_the_paper_s_data_there_is_a_table_against_it(tmp_path: Path) -> None:
    out = tables(tmp_path)
    text = (out / "metrics.md").read_text()
    assert "[Comparisons](comparisons.md)" in text and "[Against the paper](paper.md)" in text
    against = (out / "paper.md").read_text()
    assert "### REDS4 against arXiv 2508.04485, Table 3: 2 of 3 numbers within tolerance" in against
    assert "| W4A4   | maxmin         | psnr   | 16.00 | 16.18 |      -0.18 |      0.05 | outside |" in against
    assert "- 4 clips: the smallest p that the test can give is 2/2^4 = 0.125" in (out / "comparisons.md").read_text()  # REDS4 has four


def test_a_footnote_says_which_draw_of_lq_frames_the_numbers_are_of(tmp_path: Path) -> None:
    out = tables(tmp_path, provenance={"lq": "realbasicvsr 0123456789abcdef"})
    note = "LQ frames (recipe and digest): reds4 realbasicvsr 0123456789abcdef. Numbers from different LQ draws do not compare."
    assert f"- {note}\n" in (out / "metrics.md").read_text()
    assert note in (out / "metrics.tex").read_text()
    assert f"- {note}\n" in (out / "paper.md").read_text()
    assert "LQ draws do not compare" not in (tables(tmp_path / "unknown") / "metrics.md").read_text()


@pytest.mark.parametrize("changes", [{"backbone": "mgld-mini"}, {"signature": STRICT.signature("psnr")}, {"dataset": "mine"}])
def test_on_other_data_there_is_none_and_no_verdict(tmp_path: Path, changes: dict[str, str]) -> None:
    out = tables(tmp_path, **changes)
    assert {file.name for file in out.iterdir()} == {
        f"{name}.{form}" for name in ("metrics", "comparisons", "cost") for form in ("csv", "md", "tex")
    }
    assert not [file.name for file in out.iterdir() if "verdict" in file.read_text().lower() or "paper.md" in file.read_text()]


def test_a_part_of_the_paper_s_data_is_not_compared_with_it_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        out = tables(tmp_path, clips=3)
    assert not (out / "paper.md").exists()
    assert "reds4: 3 clips, the paper has 4: not compared with it." in caplog.text
