"""What is committed about the paper's size is what the settings, the counted network and the plan give now."""

from __future__ import annotations

import csv
import io
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvsr.config import load
from qvsr.data.assets import read
from qvsr.data.calibration import kept_steps, quotas
from qvsr.provenance import ROOT

NAMES = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"), run_name="update_readme")
AGAIN = "run: python scripts/update_readme.py --paper"


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    return NAMES["cost_lines"]()


def between(document: str, mark: str) -> str:
    return (ROOT / document).read_text().split(f"<!-- {mark}: begin -->\n")[1].split(f"<!-- {mark}: end -->")[0].strip()


def test_the_committed_costs_are_those_of_config_paper_yaml(lines: list[dict[str, Any]]) -> None:
    reference = ROOT / "results" / "reference"
    assert (reference / "cost-paper.csv").read_text() == NAMES["cost_csv"](lines), AGAIN
    assert (reference / "cost-paper.md").read_text() == NAMES["cost_markdown"](lines), AGAIN
    assert between("README.md", "cost") == NAMES["cost_in_readme"](lines), AGAIN


def test_the_costs_are_what_was_counted_of_the_reference_code(lines: list[dict[str, Any]]) -> None:
    """Counted of the reference's own modules, and by hand for rank 24: parameters in millions, multiply-accumulates in 1e9."""
    full, *quantized = list(csv.DictReader(io.StringIO(NAMES["cost_csv"](lines))))
    assert (full["params_m"], full["layer_macs_g"][:8], full["attention_macs_g"][:7]) == ("935.321287", "1879.667", "315.134")
    shown = [(line["bits"], round(float(line["params_m"]), 1), round(float(line["macs_g"]), 1)) for line in quantized]
    assert shown == [("W8A8", 263.3, 577.3), ("W6A6", 204.8, 459.7), ("W4A4", 146.4, 342.2)]
    assert {(line["rank_mean"], line["quantized_layers"], line["layers"]) for line in quantized} == {("24.000000", "351", "354")}
    printed = [(line["paper_params_m"], line["paper_macs_g"]) for line in (full, *quantized)]
    assert printed == [("935", "1881"), ("263", "563"), ("204", "446"), ("146", "328")]


def test_ranks_that_the_paper_implies(lines: list[dict[str, Any]]) -> None:
    """As solved for the reference's layers: one unit of rank is 1.22656 M parameters and 4.46148 G multiply-accumulates."""
    ranks = NAMES["implied_ranks"](lines)
    assert ranks["params"] == pytest.approx((23.37, 23.75), abs=5e-3)  # two digits are known
    assert ranks["macs"] == pytest.approx((20.81, 20.92), abs=5e-3)
    lowest = (262.5 - 935.321287 / 4) / 1.22656
    assert lines[1]["params_ranks"][0] == pytest.approx(lowest, abs=1e-4)


def test_the_hours_are_those_of_the_plan() -> None:
    assert between("docs/paper.md", "hours") == NAMES["hours_table"](), AGAIN


def test_the_calibration_is_the_one_that_the_document_describes() -> None:
    """30 clips of one segment and 12 tiles: 5 of 50 steps give the paper's 1,800 pairs, the released code's 10 twice as many."""
    config = load(ROOT / "config" / "paper.yaml")
    settings, text = config.calibration, (ROOT / "docs" / "paper.md").read_text()
    assert (config.sampling.steps, settings.steps, settings.samples) == (50, 5, 1800)
    assert 30 * 12 * len(kept_steps(50, settings.steps)) == settings.samples and 30 * 12 * len(kept_steps(50, 10)) == 3600
    assert quotas(settings.samples, 30) == [60] * 30
    for words in ("5 of the 50 sampling steps: 1,800 pairs", "10 of 50: `--config calibration='{steps: 10}'`, of whose 3,600 calls 1,800"):
        assert words in text


def test_tables_of_a_run_leave_those_of_the_paper_s_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, reference, results = NAMES["update_results"].__globals__, tmp_path / "reference", tmp_path / "results"
    monkeypatch.setitem(own, "ROOT", tmp_path)
    monkeypatch.setitem(own, "REFERENCE", reference)
    for file in ("cost-paper.csv", "cost-paper.md", "ablation.csv", "stale.csv"):
        (reference / file).parent.mkdir(exist_ok=True)
        (reference / file).write_text("old")
    for folder, file in (("tables", "metrics.md"), ("figures", "comparison.png")):
        (results / folder).mkdir(parents=True)
        (results / folder / file).write_text("new")
    (tmp_path / "README.md").write_text("<!-- table: begin -->\n<!-- table: end -->\n")
    NAMES["update_results"](results)
    assert {file.name for file in reference.iterdir()} == {
        "cost-paper.csv",
        "cost-paper.md",
        "ablation.csv",
        "metrics.md",
        "comparison.png",
    }
    assert (tmp_path / "README.md").read_text() == "<!-- table: begin -->\nnew\n<!-- table: end -->\n"


def test_commands_of_the_guide_are_known() -> None:
    """Stages and their subcommands; names of options behind them."""
    from typer.main import get_command

    from qvsr.cli import app

    text = (ROOT / "docs" / "paper.md").read_text()
    calls = re.findall(r"python -m qvsr ([a-z][^`#\n]*)", text)
    assert len(calls) > 10
    for call in calls:
        command, words = get_command(app), call.split()
        while hasattr(command, "commands") and words:
            assert words[0] in command.commands, call
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, call


def test_the_example_of_lq_frames_made_here_is_a_configuration(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "paper.md").read_text(), re.DOTALL)
    assert block is not None
    example = yaml.safe_load(re.sub(r"(?m)^  ", "", block[1]))
    for dataset in example["datasets"].values():
        assert all(read()[name].unpack for name in dataset.pop("archives"))
    shutil.copy(ROOT / "config" / "paper.yaml", tmp_path)
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(example))
    config = load(tmp_path / "made.yaml")
    made = [name for name, dataset in config.datasets.items() if dataset.lq == "made"]
    assert made == ["reds4", "reds30"] and {*config.evaluate, config.calibration.dataset} == set(made)
    assert {config.datasets[name].degradation.preset for name in made} == {"realbasicvsr"}
    paper = load(ROOT / "config" / "paper.yaml")
    assert config.output != paper.output and all(config.datasets[name].path != paper.datasets[name].path for name in made)


def test_the_readme_shows_the_committed_speed() -> None:
    """And the committed page is what the committed numbers give."""
    from qvsr.report.speed import Speed, page

    assert between("README.md", "speed") == NAMES["speed_in_readme"](), "run: make bench-reference"
    assert (NAMES["SPEED"] / "speed.md").read_text() == page(Speed.of_tables(NAMES["SPEED"])), "run: make bench-reference"


def test_speed_is_copied_whole_and_never_from_a_quick_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.qvsr.report import test_speed as measured

    own, reference, results = NAMES["update_speed"].__globals__, tmp_path / "benchmarks" / "reference", tmp_path / "results"
    monkeypatch.setitem(own, "ROOT", tmp_path)
    monkeypatch.setitem(own, "SPEED", reference)
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- speed: begin -->\nold\n<!-- speed: end -->\nb\n")
    with pytest.raises(SystemExit, match=r"^error: no .*results/speed/tables; run `make bench` first$"):
        NAMES["update_speed"](results)
    reference.mkdir(parents=True)
    for file in ("README.md", "clip.csv"):
        (reference / file).write_text("old")
    for quick in (True, False):
        measured.Speed.of_files([measured.write(tmp_path, "unet", quick=quick)]).write(results / "speed" / "tables")
        if quick:
            with pytest.raises(
                SystemExit, match=r"^error: unet of .*tables were measured with --quick, which is no result: run `make bench`$"
            ):
                NAMES["update_speed"](results)
            assert "old" in readme.read_text()
    NAMES["update_speed"](results)
    assert {file.name for file in reference.iterdir()} == {"README.md", "speed.md", "unet.csv", "machine.json"}
    assert (reference / "README.md").read_text() == "old"
    shown = readme.read_text()
    assert shown.startswith("a\n<!-- speed: begin -->\nMachine: Processor X") and shown.endswith("\n<!-- speed: end -->\nb\n")
    assert "](benchmarks/reference/speed.md)" in shown
