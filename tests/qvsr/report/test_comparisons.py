"""Comparisons: who is compared with whom, pairing, the family of the adjustment, stars, and what few clips can say."""

from __future__ import annotations

import csv
import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import metrics  # noqa: F401 (fills the registry)
from qvsr import protocols
from qvsr.report import comparisons
from qvsr.results import ResultError, Row

STRICT = protocols.read("strict-v1")
METRICS = ("psnr", "ssim", "psnr_fp")
# what a method adds to the clips' values; `other` is better than ours on every clip
OFFSETS = {"full_precision": 2.0, "maxmin": -3.0, "svdquant": -0.1, "other": 1.0, "quantvsr": 0.0}


def rows(clips: int = 8, methods: tuple[str, ...] = tuple(OFFSETS), bits: str = "W4A4", **changes: object) -> list[Row]:
    generator = np.random.default_rng(4)
    base, own = generator.normal(25, 3, clips), {name: generator.normal(0, 0.2, clips) for name in OFFSETS}
    return [
        Row(
            **{
                "backbone": "mini", "method": method, "bits": "W32A32" if method == "full_precision" else bits, "seed": 42, "dataset": "video",
                "clip": f"clip{i}", "metric": metric, "value": base[i] + OFFSETS[method] + own[method][i], "frames": 10,
                "signature": STRICT.signature(metric),
            }
            | changes
        )
        for method in methods
        for metric in METRICS
        for i in range(clips)
    ]  # fmt: skip


def found(compared: list[comparisons.Comparison], metric: str = "psnr") -> dict[str, comparisons.Comparison]:
    return {one.other: one for one in compared if one.metric == metric}


def test_ours_against_every_other_method_of_the_same_bits() -> None:
    compared = comparisons.compare([*rows(), *rows(bits="W8A8", methods=("maxmin", "quantvsr"))], metrics=METRICS)
    assert {one.method for one in compared} == {"quantvsr"}
    assert [(one.bits, one.metric, one.other) for one in compared] == [
        *(("W8A8", metric, "maxmin") for metric in METRICS),
        *itertools.product(("W4A4",), METRICS, ("maxmin", "other", "svdquant")),
    ]


def test_without_ours_the_first_of_the_methods() -> None:
    compared = comparisons.compare(rows(methods=("maxmin", "other", "svdquant")), methods=("svdquant", "maxmin", "other"))
    assert {(one.method, one.other) for one in compared} == {("svdquant", "maxmin"), ("svdquant", "other")}
    assert comparisons.compare(rows(methods=("full_precision", "maxmin"))) == []


def test_a_line_is_the_paired_test_of_somebody_else() -> None:
    everything = rows()
    one = found(comparisons.compare(random.Random(1).sample(everything, len(everything))))["other"]
    ours, other = (np.array([row.value for row in everything if (row.method, row.metric) == (m, "psnr")]) for m in ("quantvsr", "other"))
    expected = stats.ttest_rel(ours, other).confidence_interval(0.95)
    assert one.paired.difference == pytest.approx((ours - other).mean())
    assert (one.paired.within.low, one.paired.within.high) == pytest.approx((expected.low, expected.high))
    p = stats.permutation_test((ours - other,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert one.paired.p == pytest.approx(p)


def test_p_values_are_adjusted_over_the_methods_of_one_metric() -> None:
    by_method = found(comparisons.compare(rows()))
    raw = [by_method[name].paired.p for name in ("maxmin", "other", "svdquant")]
    expected = stats.false_discovery_control(raw)
    assert [by_method[name].p_adjusted for name in ("maxmin", "other", "svdquant")] == pytest.approx(list(expected))
    assert by_method["svdquant"].p_adjusted > 0.05 > by_method["maxmin"].p_adjusted  # type: ignore[operator]


def test_seeds_are_averaged_by_clip() -> None:
    second = [
        Row(**(row.model_dump() | {"seed": 43, "value": (row.value or 0) + (1.0 if row.method == "quantvsr" else 0)})) for row in rows()
    ]
    one, two = found(comparisons.compare(rows()))["maxmin"], found(comparisons.compare([*rows(), *second]))["maxmin"]
    assert two.seeds == 2 and two.paired.clips == 8
    assert two.paired.difference == pytest.approx((one.paired.difference or 0) + 0.5)


def written(folder: Path, everything: list[Row]) -> str:
    comparisons.write(folder, comparisons.compare(everything, metrics=METRICS))
    return (folder / "comparisons.md").read_text()


def lines(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]


def test_the_table_for_people_has_two_metrics_and_stars(tmp_path: Path) -> None:
    text = written(tmp_path, rows())
    assert "### video, W4A4, mini: quantvsr less each other, 8 clips\n" in text
    table = lines(text)
    assert table[0] == ["Metric", "Less", "Difference", "p", "Adjusted", "Could show"]
    assert [(line[0], line[1]) for line in table[2:]] == [
        (metric, name) for metric in ("psnr (dB) ↑", "psnr_fp (dB) ↑") for name in ("maxmin", "other", "svdquant")
    ]
    maxmin, other, svdquant = table[2:5]
    assert maxmin[3:5] == ["0.008", "0.012*"] and maxmin[2].startswith("+")  # 2 / 2^8, times 3 / 2
    assert other[2].startswith("-") and other[4].endswith("*")  # a star says that there is a difference, not for whom
    assert not svdquant[4].endswith("*")
    assert "* below 0.05" in text and "nothing is starred" not in text


def test_four_clips_are_never_starred_and_the_table_says_what_that_means(tmp_path: Path) -> None:
    text = written(tmp_path, rows(clips=4))
    table = lines(text)
    assert table[2][3:] == ["0.125", "0.188", "nothing"] and "*" not in "".join(cell for line in table for cell in line)
    assert (
        "- 4 clips: the smallest p that the test can give is 2/2^4 = 0.125" in text and "nothing is starred; 6 clips are the fewest" in text
    )
    one = written(tmp_path, rows(clips=1))
    assert lines(one)[2][3:] == ["1.000", "1.000", "–"] and "- 1 clip has no spread over clips" in one


def test_the_csv_has_every_metric_and_exact_numbers(tmp_path: Path) -> None:
    written(tmp_path, rows())
    with (tmp_path / "comparisons.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(METRICS) * 3 and set(comparisons.COLUMNS) == set(table[0])
    first = table[0]
    assert (first["method"], first["other"], first["clips"], first["seeds"], first["interval"]) == ("quantvsr", "maxmin", "8", "1", "t")
    assert float(first["p"]) == 2 / 2**8 and float(first["detectable"]) > 0
    assert first["signature"] == STRICT.signature("psnr")


def test_what_has_no_difference_is_in_the_csv_alone(tmp_path: Path) -> None:
    """A missing metric, and one that is infinite for a clip: other metrics take their place in the table for people."""
    changed = [
        Row(**(row.model_dump() | {"value": None, "missing": "no file"})) if row.metric == "psnr_fp"
        else Row(**(row.model_dump() | {"value": math.inf})) if (row.metric, row.method) == ("psnr", "other") else row
        for row in rows()
    ]  # fmt: skip
    table = lines(written(tmp_path, changed))
    assert {line[0] for line in table[2:]} == {"psnr (dB) ↑"} and table[3] == ["psnr (dB) ↑", "other", "–", "–", "–", "–"]
    with (tmp_path / "comparisons.csv").open() as file:
        missing = [line for line in csv.DictReader(file) if line["metric"] == "psnr_fp"]
    assert len(missing) == 3 and {(line["difference"], line["p"], line["p_adjusted"]) for line in missing} == {("", "", "")}


def test_latex_has_the_same_lines(tmp_path: Path) -> None:
    written(tmp_path, rows(clips=4))
    text = (tmp_path / "comparisons.tex").read_text()
    assert text.count(r" & svdquant & ") == 2 and r"psnr\_fp (dB) $\uparrow$" in text and r"2/2\textasciicircum{}4" in text
    assert text.count("{") == text.count("}") and text.count("$") % 2 == 0


def test_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    everything = rows()
    written(tmp_path / "a", everything)
    written(tmp_path / "b", random.Random(2).sample(everything, len(everything)))
    for name in ("comparisons.csv", "comparisons.md", "comparisons.tex"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_executions_of_one_method_are_told_apart(tmp_path: Path) -> None:
    packed = rows(methods=("maxmin",), execution="packed")
    text = written(tmp_path, [*rows(methods=("maxmin", "quantvsr")), *packed])
    assert [line[1] for line in lines(text)[2:4]] == ["maxmin (packed)", "maxmin (simulated)"]
    assert "quantvsr (simulated) less each other" in text


def test_methods_that_were_measured_in_different_ways_are_refused() -> None:
    other = rows(methods=("maxmin",), signature="psnr|paper-v1")
    with pytest.raises(
        ResultError, match=r"maxmin W4A4 .* psnr: measured as psnr\|paper-v1, quantvsr as psnr\|strict-v1.*under one protocol"
    ):
        comparisons.compare([*rows(methods=("quantvsr",)), *other])
