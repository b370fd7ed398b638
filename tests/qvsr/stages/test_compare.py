"""`compare`: two files clip by clip, and what is refused by name."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import metrics  # noqa: F401 (fills the registry)
from qvsr import protocols, results
from qvsr.results import ResultError, Row
from qvsr.stages import compare as stage
from qvsr.stages.compare import CompareError

STRICT = protocols.read("strict-v1")
A = {"psnr": [24.0, 26.0, 25.0, 30.0, 21.0, 27.0], "gmsd": [0.13, 0.12, 0.15, 0.11, 0.14, 0.12], "psnr_fp": [40.0] * 6}
B = {"psnr": [24.5, 26.2, 25.4, 30.1, 21.3, 27.9], "gmsd": [0.12, 0.13, 0.14, 0.12, 0.13, 0.12], "psnr_fp": [41.0] * 6}


def rows(values: dict[str, list[float]], method: str = "maxmin", dataset: str = "", **changes: object) -> list[Row]:
    return [
        Row(
            **{
                "backbone": "mini", "method": method, "bits": "W4A4" if method else "", "seed": 42, "dataset": dataset, "clip": f"clip{i}",
                "metric": metric, "value": value, "frames": 10, "signature": STRICT.signature(metric),
            }
            | changes
        )
        for metric, of_clips in values.items()
        for i, value in enumerate(of_clips)
    ]  # fmt: skip


def files(folder: Path, a: list[Row], b: list[Row]) -> tuple[Path, Path]:
    for name, content in (("a", a), ("b", b)):
        results.write(folder / f"{name}.jsonl", content)
    return folder / "a.jsonl", folder / "b.jsonl"


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_differences_are_b_less_a_clip_by_clip(tmp_path: Path) -> None:
    a, b = files(tmp_path, rows(A), rows(B, "quantvsr")[::-1])
    text = stage.run(a, b, out=tmp_path / "out.csv")
    assert text.startswith(f"A: {a}, maxmin-W4A4\nB: {b}, quantvsr-W4A4\n")
    found = table(text)
    assert found[0] == ["Data set", "Metric", "Clips", "A", "B", "B - A", "p", "Adjusted", "Could show"]
    psnr, gmsd, psnr_fp = found[2:]
    # the mean of 0.5, 0.2, 0.4, 0.1, 0.3, 0.9 is 0.4; all six point one way: p = 2 / 2^6; adjusted over three metrics, two of which have it
    assert psnr[:5] == ["–", "psnr (dB) ↑", "6", "25.50", "25.90"] and psnr[5].startswith("+0.40 (+0.10 to +0.70)")
    assert psnr[6:8] == ["0.031", "0.047*"]
    assert gmsd[1] == "gmsd ↓" and gmsd[3:5] == ["0.1283", "0.1267"] and not gmsd[7].endswith("*")
    assert psnr_fp[5] == "+1.00 (+1.00 to +1.00)" and psnr_fp[8] == "0.00"  # no spread at all
    assert "above 0 B is better where ↑ stands" in text
    with (tmp_path / "out.csv").open() as file:
        lines = {line["metric"]: line for line in csv.DictReader(file)}
    assert float(lines["psnr"]["difference"]) == pytest.approx(0.4) and lines["gmsd"]["higher_is_better"] == "false"
    assert float(lines["psnr"]["p"]) == 2 / 64 and float(lines["psnr"]["p_adjusted"]) == pytest.approx(3 / 64)
    assert lines["psnr"]["signature"] == STRICT.signature("psnr")


def test_the_same_file_twice_differs_in_nothing(tmp_path: Path) -> None:
    a, _ = files(tmp_path, rows(A), rows(B))
    assert [line[5] for line in table(stage.run(a, a))[2:]] == [
        "+0.00 (+0.00 to +0.00)",
        "+0.0000 (+0.0000 to +0.0000)",
        "+0.00 (+0.00 to +0.00)",
    ]


def test_files_that_measure_wrote_by_itself_have_no_names(tmp_path: Path) -> None:
    a, b = files(tmp_path, rows(A, method=""), rows(B, method=""))
    assert stage.run(a, b).startswith(f"A: {a}\nB: {b}\n")


def test_a_row_of_many_is_chosen_by_name(tmp_path: Path) -> None:
    both = [*rows(A), *rows(B, "quantvsr")]
    a, b = files(tmp_path, both, both)
    with pytest.raises(CompareError, match=r"a\.jsonl has 2 rows: maxmin-W4A4, quantvsr-W4A4; choose one by --row-a METHOD-BITS"):
        stage.run(a, b)
    with pytest.raises(CompareError, match=r"b\.jsonl: no row 'quantvrs-W4A4'; did you mean quantvsr-W4A4\?"):
        stage.run(a, b, row_a="maxmin-W4A4", row_b="quantvrs-W4A4")
    assert table(stage.run(a, b, row_a="maxmin-W4A4", row_b="quantvsr-W4A4"))[2][5].startswith("+0.40")
    mixed = [*rows(A), *rows(A, execution="packed")]
    a, b = files(tmp_path, mixed, rows(B))
    with pytest.raises(CompareError, match="maxmin-W4A4 of several kinds of execution: packed, simulated"):
        stage.run(a, b)


def test_metrics_are_those_of_both_or_the_named_ones(tmp_path: Path) -> None:
    a, b = files(tmp_path, rows({"psnr": A["psnr"], "ssim": A["gmsd"]}), rows(B))
    text = stage.run(a, b)
    assert [line[1] for line in table(text)[2:]] == ["psnr (dB) ↑"]
    assert "\nOnly A has ssim: not compared.\nOnly B has gmsd, psnr_fp: not compared.\n" in text
    with pytest.raises(CompareError, match=r"A: no metric 'gmsd'; known: psnr, ssim"):
        stage.run(a, b, ["gmsd"])
    a, b = files(tmp_path, rows({"ssim": A["gmsd"]}), rows({"psnr": B["psnr"]}))
    with pytest.raises(CompareError, match="A and B have no metric in common: ssim on one side, psnr on the other"):
        stage.run(a, b)
    a, b = files(tmp_path, rows(A), rows(B))
    assert [line[1] for line in table(stage.run(a, b, ["psnr_fp"]))[2:]] == ["psnr_fp (dB) ↑"]


@pytest.mark.parametrize(
    ("b", "message"),
    [
        ([row for row in rows(B) if row.clip != "clip0"], "psnr: only A has clip clip0; nothing is left out of a mean"),
        ([*rows(B), *rows({"psnr": [1.0]}, clip="more"), *rows({"gmsd": [1.0]}, clip="more"), *rows({"psnr_fp": [1.0]}, clip="more")],
         "psnr: only B has clip more; nothing is left out of a mean"),
        (rows(B, signature="psnr|paper-v1"), r"A was measured as .*strict-v1.*, B as psnr\|paper-v1; measure both under one protocol"),
        (rows(B, frames=9), "psnr: clip clip0 has 10 frames in A, 9 in B"),
        (rows(B, dataset="other"), r"only A has data set of no name \(.*\): measure it on both sides"),
    ],
)  # fmt: skip
def test_what_cannot_be_paired_is_named(tmp_path: Path, b: list[Row], message: str) -> None:
    a = rows(A)
    with pytest.raises(CompareError, match=message):
        stage.run(*files(tmp_path, a, b), out=tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_a_side_whose_own_clips_differ_from_metric_to_metric(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"^maxmin W4A4 \(mini, simulated\), psnr: no value for clip clip0, which others have"):
        stage.run(*files(tmp_path, rows(A), rows(B)[1:]))


def test_few_clips_a_missing_metric_and_seeds_have_their_notes(tmp_path: Path) -> None:
    few = {metric: values[:4] for metric, values in A.items()}
    missing = [
        Row(**(row.model_dump() | {"value": None, "missing": "no weights.pth"})) if row.metric == "gmsd" else row for row in rows(few)
    ]
    text = stage.run(*files(tmp_path, missing, [*rows(few), *rows(few, seed=43)]))
    assert "\n4 clips: the smallest p that the test can give is 2/2^4 = 0.125" in text and "* below" not in text
    assert "\nn/a in gmsd: no weights.pth" in text and table(text)[3][3:] == ["n/a", "0.1275", "–", "–", "–", "–"]
    assert "\nNoise seeds: A 42; B 42, 43." in text
