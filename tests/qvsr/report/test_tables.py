"""Tables: order, bold, subsets, escaping, and the same bytes for the same rows."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path

import pytest

import metrics  # noqa: F401 (fills the registry)
from qvsr import protocols
from qvsr.method_settings import SVDQuantSettings
from qvsr.quant.cost import Cost
from qvsr.report import tables
from qvsr.results import ResultError, Row

STRICT = protocols.read("strict-v1")
METRIC_NAMES = ("psnr", "ewarp_dis", "psnr_fp")
# psnr, ewarp_dis, psnr_fp of two clips
VALUES = {
    ("ground_truth", "W32A32"): ((math.inf, 0.5, 24.0), (math.inf, 0.7, 26.0)),
    ("bicubic", "W32A32"): ((25.0, 1.0, 30.0), (27.0, 3.0, 32.0)),
    ("full_precision", "W32A32"): ((24.0, 2.0, math.inf), (26.0, 4.0, math.inf)),
    ("maxmin", "W8A8"): ((23.9, 2.0, 50.0), (25.9, 4.0, 52.0)),
    ("quantvsr", "W8A8"): ((23.901, 2.1, 51.0), (25.901, 4.1, 53.0)),
    ("maxmin", "W4A4"): ((20.0, 1.5, 28.0), (22.0, 3.5, 30.0)),
    ("quantvsr", "W4A4"): ((23.0, 1.9, 39.0), (25.0, 3.9, 41.0)),
}


def rows(limit: int | None = None, dataset: str = "real_video") -> list[Row]:
    return [
        Row(
            backbone="mgld-mini", method=method, bits=bits, seed=42, dataset=dataset, clip=clip, limit=limit, metric=metric, value=value, frames=10,
            signature=STRICT.signature(metric),
        )
        for (method, bits), clips in VALUES.items()
        for clip, values in zip(("bikes", "bunny"), clips, strict=True)
        for metric, value in zip(METRIC_NAMES, values, strict=True)
    ]  # fmt: skip


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|") and not line.startswith("|-")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_wide_table_for_people() -> None:
    text = tables.metrics_markdown(tables.ordered(rows(), metrics=METRIC_NAMES))
    assert cells(text) == [
        ["Bits", "Method", "psnr (dB) ↑", "ewarp_dis (×10⁻³) ↓", "psnr_fp (dB) ↑"],
        ["–", "ground_truth", "inf", "0.60", "25.00"],
        ["–", "bicubic", "26.00", "2.00", "31.00"],  # best ewarp_dis of all, and not bold
        ["W32A32", "full_precision", "25.00", "3.00", "inf"],
        ["W8A8", "maxmin", "**24.90**", "**3.00**", "51.00"],  # 24.900 and 24.901 print alike: both bold
        ["W8A8", "quantvsr", "**24.90**", "3.10", "**52.00**"],
        ["W4A4", "maxmin", "21.00", "**2.50**", "29.00"],
        ["W4A4", "quantvsr", "**24.00**", "2.90", "**40.00**"],
    ]
    assert text.startswith("### real_video, mgld-mini: 2 clips, 20 frames\n")
    assert "limit=" not in text and "`psnr|strict-v1|impl:qvsr-" in text


SETTINGS = {
    ("maxmin", "W8A8"): tables.RowSetting(), ("maxmin", "W4A4"): tables.RowSetting("native"),
    ("quantvsr", "W8A8"): tables.RowSetting("shared", {"updates": (60, 900), "values": (5, None)}),
    ("quantvsr", "W4A4"): tables.RowSetting("shared", {"updates": (60, 900), "values": (5, None)}),
}  # fmt: skip


def test_a_column_says_how_each_row_was_run() -> None:
    text = tables.metrics_markdown(tables.ordered(rows(), metrics=METRIC_NAMES), settings=SETTINGS)
    assert [line[1:3] for line in cells(text)] == [
        ["Method", "Setting"], ["ground_truth", "–"], ["bicubic", "–"], ["full_precision", "–"], ["maxmin", "shared"],
        ["quantvsr", "shared, *reduced*"], ["maxmin", "native"], ["quantvsr", "shared, *reduced*"],
    ]  # fmt: skip
    below = text.splitlines()[len(cells(text)) + 4 :]
    assert below[0].startswith("[Fairness card](fairness.md): ")  # right below the table
    assert text.count("- quantvsr is reduced (in brackets the published default): updates 60 (900), values 5 (all).\n") == 1
    assert "maxmin is reduced" not in text and text.count("Setting: ") == 1


def test_the_same_column_in_latex(tmp_path: Path) -> None:
    tables.write_metrics(tmp_path, tables.ordered(rows()), settings=SETTINGS)
    text = (tmp_path / "metrics.tex").read_text()
    assert r"W4A4 & quantvsr & shared, \emph{reduced} & " in text and r"\begin{tabular}{lllrrr}" in text
    assert "updates 60 (900), values 5 (all)" in text and "fairness.md" not in text


def test_settings_below_the_defaults_come_from_the_checkpoint() -> None:
    own = SVDQuantSettings(rank=8, iterations=200, granularity="native").model_dump(mode="json")
    header = {"method": "a_variant", "base": "svdquant", "spec": {"settings": own}}
    assert tables.row_setting(header) == tables.RowSetting("native", {"rank": (8, 32)})
    assert tables.row_setting({"method": "a_plug_in", "spec": {"settings": {}}}) == tables.RowSetting("shared", {})


def test_notes_stand_below_every_table(tmp_path: Path) -> None:
    tables.write_metrics(tmp_path, tables.ordered([*rows(), *rows(dataset="other")]), notes=["rotation: quantvsr with branch=false."])
    assert (tmp_path / "metrics.md").read_text().count("\n- rotation: quantvsr with branch=false.\n") == 2
    assert (tmp_path / "metrics.tex").read_text().count("rotation: quantvsr with branch=false.") == 2


def test_without_the_ground_truth_no_line_about_it() -> None:
    assert "ground_truth" in tables.metrics_markdown(tables.ordered(rows()))
    assert "ground_truth" not in tables.metrics_markdown(tables.ordered(row for row in rows() if row.method != "ground_truth"))


def test_a_single_method_is_not_the_best_of_anything() -> None:
    text = tables.metrics_markdown(tables.ordered(row for row in rows() if row.method != "maxmin"))
    assert "**" not in text


def test_a_subset_is_marked_everywhere(tmp_path: Path) -> None:
    tables.write_metrics(tmp_path, tables.ordered(rows(limit=2)))
    markdown = (tmp_path / "metrics.md").read_text()
    assert "2 clips, 20 frames, limit=2" in markdown and "not a result to quote" in markdown
    assert "limit=2" in (tmp_path / "metrics.tex").read_text()
    with (tmp_path / "metrics.csv").open() as file:
        assert all(line["signature"].endswith("|limit:2") for line in csv.DictReader(file))


def test_the_tidy_table_is_exact(tmp_path: Path) -> None:
    tables.write_metrics(tmp_path, tables.ordered(rows()))
    with (tmp_path / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert (
        ",".join(lines[0]) == "backbone,dataset,method,bits,execution,metric,value,low,high,clips,frames,signature,seeds,seed_sd,interval"
    )
    assert len(lines) == len(VALUES) * 3
    found = {(line["method"], line["bits"], line["metric"]): line for line in lines}
    psnr = found["maxmin", "W4A4", "psnr"]
    assert float(psnr["value"]) == 21.0 and (psnr["clips"], psnr["frames"]) == ("2", "20")
    half = 12.706204736  # t of one degree of freedom times the standard error, which is 1
    assert float(psnr["low"]) == pytest.approx(21 - half, rel=1e-9) and float(psnr["high"]) == pytest.approx(21 + half, rel=1e-9)
    for infinite in (found["full_precision", "W32A32", "psnr_fp"], found["ground_truth", "W32A32", "psnr"]):
        assert (infinite["value"], infinite["low"], infinite["high"]) == ("inf", "", "")
    assert float(found["ground_truth", "W32A32", "ewarp_dis"]["high"]) > 0.6  # finite values of the same row keep their interval


def test_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    everything = rows() + rows(dataset="other")
    tables.write_metrics(tmp_path / "a", tables.ordered(everything))
    tables.write_metrics(tmp_path / "b", tables.ordered(random.Random(3).sample(everything, len(everything))))
    for name in ("metrics.csv", "metrics.md", "metrics.tex"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "metrics.md").read_text().count("### ") == 2


REASON = "no alexnet.pth (100% of $HOME/a_b); python -m qvsr assets fetch alexnet"


def without_psnr_fp() -> list[Row]:
    changed = {"value": None, "missing": REASON}
    return [Row(**(row.model_dump() | changed)) if row.metric == "psnr_fp" else row for row in rows()]


def test_a_missing_metric_says_why_once_and_is_never_best(tmp_path: Path) -> None:
    tables.write_metrics(tmp_path, tables.ordered(without_psnr_fp(), metrics=METRIC_NAMES))
    text = (tmp_path / "metrics.md").read_text()
    assert {line[-1] for line in cells(text)[1:]} == {"n/a"}
    assert text.count(f"- n/a in psnr_fp: {REASON}\n") == 1
    assert cells(text)[4][2:4] == ["**24.90**", "**3.00**"]  # the other columns are as ever
    with (tmp_path / "metrics.csv").open() as file:
        missing = [line for line in csv.DictReader(file) if line["metric"] == "psnr_fp"]
    assert len(missing) == len(VALUES) and {(line["value"], line["low"], line["interval"]) for line in missing} == {("", "", "")}
    latex = (tmp_path / "metrics.tex").read_text()
    assert r"n/a in psnr\_fp: no alexnet.pth (100\% of \$HOME/a\_b)" in latex and latex.count("& n/a") == len(VALUES)
    body = "\n".join(line for line in latex.splitlines() if not line.startswith("%"))
    assert body.replace(r"\$", "").count("$") % 2 == 0


def test_one_note_for_each_reason() -> None:
    found = [("lpips", "no a.pth"), ("psnr", ""), ("dists", "no b.pth"), ("clipiqa", "no a.pth"), ("lpips", "no a.pth")]
    assert tables.missing_notes(found) == ["n/a in lpips, clipiqa: no a.pth", "n/a in dists: no b.pth"]


def seeded() -> list[Row]:
    """A second seed of what the noise reaches, 0.2 higher everywhere."""
    noisy = [row for row in rows() if row.method not in ("ground_truth", "bicubic")]
    return [*rows(), *(Row(**(row.model_dump() | {"seed": 43, "value": (row.value or 0) + 0.2})) for row in noisy)]


def test_several_seeds_show_their_spread(tmp_path: Path) -> None:
    tables.write_metrics(tmp_path, tables.ordered(seeded(), metrics=METRIC_NAMES))
    text = (tmp_path / "metrics.md").read_text()
    assert cells(text)[6] == ["W4A4", "maxmin", "21.10 ± 0.14", "**2.60** ± 0.14", "29.10 ± 0.14"]
    assert cells(text)[2][2] == "26.00" and cells(text)[3][4] == "inf"  # bicubic has one seed, inf no spread
    assert text.count("±: standard deviation over 2 seeds of the noise") == 1 and "Frames of ground_truth, bicubic have one" in text
    with (tmp_path / "metrics.csv").open() as file:
        lines = {(line["method"], line["bits"], line["metric"]): line for line in csv.DictReader(file)}
    assert lines["maxmin", "W4A4", "psnr"]["seeds"] == "2" and lines["bicubic", "W32A32", "psnr"]["seeds"] == "1"
    assert float(lines["maxmin", "W4A4", "psnr"]["seed_sd"]) == pytest.approx(0.2 / math.sqrt(2))
    assert lines["bicubic", "W32A32", "psnr"]["seed_sd"] == "" and lines["bicubic", "W32A32", "psnr"]["interval"] == "t"
    assert r"21.10 $\pm$ 0.14" in (tmp_path / "metrics.tex").read_text()


def test_the_footnote_names_the_kind_of_interval_that_is_in_the_csv() -> None:
    assert "has the 95 % Student-t intervals over clips" in tables.metrics_markdown(tables.ordered(rows()))
    (first, *_) = rows()
    many = [Row(**(first.model_dump() | {"method": "maxmin", "clip": f"c{i}", "value": 20.0 + i % 5})) for i in range(20)]
    assert "has the 95 % BCa bootstrap intervals over clips" in tables.metrics_markdown(tables.ordered(many))


def test_links_stand_below_the_table() -> None:
    text = tables.metrics_markdown(tables.ordered(rows()), links=["[Comparisons](comparisons.md): x."])
    assert "|\n\n[Comparisons](comparisons.md): x.\n\n- ↑ higher" in text


def test_a_missing_clip_is_an_error_not_a_smaller_mean() -> None:
    with pytest.raises(ResultError, match="quantvsr W4A4 .* no value for clip bunny"):
        tables.ordered([r for r in rows() if (r.method, r.bits, r.clip) != ("quantvsr", "W4A4", "bunny")])


def test_latex_is_escaped_and_balanced(tmp_path: Path) -> None:
    tables.write_metrics(tmp_path, tables.ordered(rows(dataset="50%_a&b")))
    text = (tmp_path / "metrics.tex").read_text()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert r"50\%\_a\&b" in body and r"full\_precision" in body and r"\textbf{24.90}" in body and r"$\infty$" in body
    assert body.count("{") == body.count("}") and body.count("$") % 2 == 0 and "↑" not in body and "×" not in body
    lines = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 1 + len(VALUES) and {line.count(" & ") for line in lines} == {4}


def test_order_of_rows() -> None:
    methods = ["svdquant", "maxmin", "quantvsr", "bicubic", "full_precision"]
    keys = [(m, b) for m in methods[:3] for b in ("W4A4", "W8A8", "W4A8")] + [("full_precision", "W32A32"), ("bicubic", "W32A32")]
    keys.append(("ground_truth", "W32A32"))
    assert sorted(keys, key=lambda key: tables.row_order(*key)) == [
        ("ground_truth", "W32A32"), ("bicubic", "W32A32"), ("full_precision", "W32A32"),
        ("maxmin", "W8A8"), ("svdquant", "W8A8"), ("quantvsr", "W8A8"),
        ("maxmin", "W4A8"), ("svdquant", "W4A8"), ("quantvsr", "W4A8"),
        ("maxmin", "W4A4"), ("svdquant", "W4A4"), ("quantvsr", "W4A4"),
    ]  # fmt: skip
    listed = sorted(keys, key=lambda key: tables.row_order(*key, methods=["quantvsr", "maxmin", "svdquant"]))
    assert [m for m, b in listed if b == "W8A8"] == ["quantvsr", "maxmin", "svdquant"]


def test_cost_tables(tmp_path: Path) -> None:
    full = Cost("full_precision", "W32A32", 935.321287, 1880.74957, 315.134771, 0.0, 0.0, 935.321287, 2195.884341, 0, 354)
    ours = Cost("quantvsr", "W4A4", 146.352601, 342.169216, 315.134771, 546.395095, 24.0, 148.748823, 1205.058836, 351, 354)
    tables.write_cost(tmp_path / "a", [ours, full], "5 frames")
    tables.write_cost(tmp_path / "b", [full, ours], "5 frames")
    for name in ("cost.csv", "cost.md", "cost.tex"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with (tmp_path / "a" / "cost.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first["method"] == "full_precision" and float(second["params_saved_pct"]) == pytest.approx(
        100 * (1 - 146.352601 / 935.321287), abs=1e-6
    )
    assert second["rank_mean"] == "24.000000" and second["quantized_layers"] == "351"
    table = cells((tmp_path / "a" / "cost.md").read_text())
    assert table[2][:7] == ["W4A4", "quantvsr", "146.353", "84.4", "342.169", "81.8", "24.0"]
    assert table[1][3] == table[1][5] == table[1][6] == "–"
    assert "5 frames" in (tmp_path / "a" / "cost.tex").read_text() and r"saved (\%)" in (tmp_path / "a" / "cost.tex").read_text()
