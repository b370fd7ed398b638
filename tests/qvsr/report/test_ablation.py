"""The ablation's tables: paired differences, settings that differ, every form with the same rows."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from scipy import stats

import metrics  # noqa: F401 (fills the registry)
from qvsr import protocols
from qvsr.quant.cost import Facts, LayerFact
from qvsr.report import ablation
from qvsr.report.ablation import Variant
from qvsr.report.fairness import Measured, fairness
from qvsr.results import Row

STRICT = protocols.read("strict-v1")
METRICS = ("psnr", "psnr_fp")
VARIANTS = {
    "whole": Variant("quantvsr", {"rank_min": 4, "rotation": True, "seen": None, "weight": 0.25}),
    "no_rotation": Variant("quantvsr", {"rank_min": 4, "rotation": False, "seen": None, "weight": 0.25}),
    "rank_8": Variant("quantvsr", {"rank_min": 8, "rotation": True, "seen": 5, "weight": 0.1}),
    "maxmin": Variant("maxmin", {"activations": "dynamic"}),
}
# psnr and psnr_fp of three clips
VALUES = {
    "whole": ((25.0, 36.0), (26.0, 37.0), (27.0, 35.0)),
    "no_rotation": ((24.0, 33.0), (25.5, 35.0), (26.0, 31.5)),
    "rank_8": ((25.0, 36.5), (26.0, 37.5), (27.5, 35.5)),
    "maxmin": ((20.0, 24.0), (21.0, 25.0), (22.0, math.inf)),
}
TABLES = {"One part": ("whole", "no_rotation"), "All": ("whole", "rank_8", "maxmin")}


def rows(bits: str = "W4A4") -> list[Row]:
    return [
        Row(
            backbone="mini", method=name, bits=bits, seed=1, dataset="video", clip=f"clip{index}", limit=None, metric=metric,
            value=values[index][place], frames=10, signature=STRICT.signature(metric),
        )
        for name, values in VALUES.items()
        for index in (2, 0, 1)
        for place, metric in enumerate(METRICS)
    ]  # fmt: skip


def cards() -> dict:
    full = Facts((LayerFact("l", "Linear", (100, 100), positions=10),), 0, 0)
    facts = Facts((LayerFact("l", "Linear", (100, 100), positions=10, weight_bits=4, act_bits=3, rank=2),), 0, 0)
    layer = {
        "shape": [100, 100], "kind": "Linear", "parts": [100], "weight_bits": 4, "act_bits": 3, "act_granularity_used": "tensor",
        "activations": "dynamic", "act_timesteps": [],
    }  # fmt: skip
    header = {"layers": {"l": layer}, "spec": {"settings": {}, "exclude": []}, "base": "quantvsr", "calibration": "d"}
    return {
        (name, bits): fairness({**header, "method": name, "bits": bits}, facts, full, Measured())
        for name in VARIANTS
        for bits in ("W4A4", "W6A6")
    }


def written(folder: Path, both: bool = False) -> Path:
    tables = ablation.build(TABLES, VARIANTS, rows() + (rows("W6A6") if both else []), METRICS)
    ablation.write(folder, tables, VARIANTS, cards(), METRICS)
    return folder


def test_a_difference_is_paired_by_clip() -> None:
    table = ablation.build(TABLES, VARIANTS, rows(), METRICS)[0]
    value = table.values["no_rotation", "psnr_fp"]
    differences = [33.0 - 36.0, 35.0 - 37.0, 31.5 - 35.0]
    low, high = stats.t.interval(0.95, 2, loc=sum(differences) / 3, scale=stats.sem(differences))
    assert value.value == pytest.approx((33.0 + 35.0 + 31.5) / 3)
    assert (value.change, value.within.low, value.within.high) == pytest.approx((sum(differences) / 3, low, high))
    first = table.values["whole", "psnr_fp"]
    assert (first.change, first.within.low) == (0.0, None)


def test_an_infinite_value_has_no_difference() -> None:
    value = ablation.build(TABLES, VARIANTS, rows(), METRICS)[1].values["maxmin", "psnr_fp"]
    assert value.value == math.inf and value.change is None and value.within.low is None


def test_only_settings_that_differ_are_columns() -> None:
    one, all_ = ablation.build(TABLES, VARIANTS, rows(), METRICS)
    assert one.settings == ("rotation",)
    assert all_.settings == ("rank_min", "seen", "weight")  # maxmin's own setting does not differ: one row has it


def test_markdown_for_people(tmp_path: Path) -> None:
    text = (written(tmp_path) / "ablation.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["Row", "rotation", "Effective W / A bits", "psnr (dB) ↑", "psnr_fp (dB) ↑", "psnr_fp less whole's"]
    assert lines[2] == [
        "whole",
        "yes",
        "5.28 / 3.00",
        "26.00",
        "36.00",
        "",
    ]  # 4 bits and 2 (100 + 100) values of 32 bits over 10,000 weights
    assert lines[3][:5] == ["no_rotation", "no", "5.28 / 3.00", "25.17", "33.17"]
    assert lines[3][5].startswith("-2.83 (")
    assert lines[6][:4] == ["whole", "4", "all", "0.25"] and lines[8][:4] == ["maxmin", "", "", ""] and lines[8][-1] == "–"
    assert "### One part\n\nW4A4, video, mini: 3 clips\n" in text


def test_bits_have_tables_of_their_own_most_bits_first(tmp_path: Path) -> None:
    text = (written(tmp_path, both=True) / "ablation.md").read_text()
    assert [line[:4] for line in text.splitlines() if line.endswith("3 clips")] == ["W6A6", "W4A4"] * 2


def test_csv_is_tidy_and_whole(tmp_path: Path) -> None:
    with (written(tmp_path) / "ablation.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == (2 + 3) * len(METRICS)
    line = next(one for one in lines if one["row"] == "rank_8" and one["metric"] == "psnr_fp")
    assert line["settings"] == '{"rank_min": 8, "seen": 5, "weight": 0.1}' and float(line["change"]) == 0.5
    assert float(line["weight_bits"]) == pytest.approx(5.28) and line["clips"] == "3"


def test_latex_has_every_row(tmp_path: Path) -> None:
    text = (written(tmp_path) / "ablation.tex").read_text()
    assert text.count(r"\begin{tabular}") == 2 and text.count(r"no\_rotation &") == 1 and text.count("maxmin &") == 1


def test_a_missing_metric_says_why_and_the_others_stay(tmp_path: Path) -> None:
    changed = {"value": None, "missing": "no weights.pth; fetch them"}
    missing = [Row(**(row.model_dump() | changed)) if row.metric == "psnr_fp" else row for row in rows()]
    tables = ablation.build(TABLES, VARIANTS, missing, METRICS)
    ablation.write(tmp_path, tables, VARIANTS, cards(), METRICS)
    text = (tmp_path / "ablation.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| no_rotation")]
    assert [cell.strip() for cell in line.strip("|").split("|")][3:] == ["25.17", "n/a", "–"]
    assert text.count("- n/a in psnr_fp: no weights.pth; fetch them\n") == 1
    with (tmp_path / "ablation.csv").open() as file:
        assert {(one["value"], one["change"]) for one in csv.DictReader(file) if one["metric"] == "psnr_fp"} == {("", "")}


def test_seeds_are_averaged_before_clips_are_paired() -> None:
    """The second seed moves every clip of one row by 0.4: its mean difference moves by half of it."""
    moved = [Row(**(row.model_dump() | {"seed": 2, "value": row.value + (0.4 if row.method == "no_rotation" else 0)})) for row in rows()]
    value = ablation.build(TABLES, VARIANTS, [*rows(), *moved], METRICS)[0].values["no_rotation", "psnr"]
    plain = ablation.build(TABLES, VARIANTS, rows(), METRICS)[0].values["no_rotation", "psnr"]
    assert value.change == pytest.approx(plain.change + 0.2) and value.clips == 3
