"""Result rows: what is stored, what is refused, means and intervals."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import metrics  # noqa: F401 (fills the registry)
from qvsr import protocols, results
from qvsr.results import Context, ResultError, Row

STRICT = protocols.read("strict-v1")
CONTEXT = Context(backbone="mgld-mini", method="maxmin", bits="W4A4", seed=42, dataset="real", clip="bikes")


def row(value: float | None = 24.5, **changes: object) -> Row:
    facts = CONTEXT.model_dump() | {"metric": "psnr", "value": value, "frames": 10, "signature": STRICT.signature("psnr")} | changes
    return Row(**facts)


def test_lines_are_json_and_come_back_the_same(tmp_path: Path) -> None:
    rows = [
        row(),
        row(math.inf, metric="psnr_fp", per_frame=(math.inf, 50.0), limit=2, provenance={"git": "abc"}),
        row(1 / 3, clip="bunny"),
    ]
    results.write(tmp_path / "a.jsonl", rows)
    assert results.read(tmp_path / "a.jsonl") == rows
    plain = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert plain[1]["value"] == "inf" and plain[1]["per_frame"] == ["inf", 50.0]  # strict JSON has no infinity
    results.append(tmp_path / "a.jsonl", [row(clip="carphone")])
    assert [r.clip for r in results.read(tmp_path / "a.jsonl")] == ["bikes", "bikes", "bunny", "carphone"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_lines_by_frame(tmp_path: Path) -> None:
    rows = [row(math.inf, metric="psnr_fp", per_frame=(math.inf, 50.0)), row(0.5, metric="dover", signature="dover|strict-v1")]
    results.write_frames(tmp_path / "frames.jsonl", rows)
    lines = [json.loads(line) for line in (tmp_path / "frames.jsonl").read_text().splitlines()]
    assert [(line["clip"], line["metric"], line["frame"], line["value"]) for line in lines] == [
        ("bikes", "psnr_fp", 0, "inf"),
        ("bikes", "psnr_fp", 1, 50.0),
    ]


def test_what_was_read_stands_in_the_row() -> None:
    inputs = {"pred": {"codec": "h264", "pixels": "yuv420p", "loss": "h264 may be lossy", "frames": 10, "size": [64, 48]}}
    assert Row.parse(row(inputs=inputs).line()).inputs == inputs and row().inputs == {}


def test_lq_draws() -> None:
    def of(draw: str, clip: str = "bikes", **changes: object) -> Row:
        return row(clip=clip, provenance={"lq": draw}, **changes)

    made = [of("mild 856b0902fe05468b", clip) for clip in "ab"]
    given = [of("given 00aa", "a", dataset="reds4"), of("given 00bb", "b", dataset="reds4")]
    found = results.lq_draws([*made, *given, row(dataset="others")])
    assert (list(found), found["real"]) == (["real", "reds4"], "mild 856b0902fe05468b")
    assert found["reds4"] == "given " + hashlib.sha256(b'{"a": "given 00aa", "b": "given 00bb"}').hexdigest()[:16]
    assert results.lq_draws(given[::-1]) == {"reds4": found["reds4"]}
    with pytest.raises(
        ResultError, match=r"real/a: LQ frames are mild 856b0902fe05468b in one row and bicubic 12 for quarot W6A6; numbers from different"
    ):
        results.lq_draws([*made, of("bicubic 12", "a", method="quarot", bits="W6A6")])


def test_nan_is_no_result() -> None:
    with pytest.raises(ValidationError, match="NaN is no result"):
        row(math.nan)
    with pytest.raises(ValidationError, match="is not the mean of per_frame"):
        row(2.0, per_frame=(1.0, 2.0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], r"line 2: not JSON"),
        (lambda text: text.replace('"metric"', '"metrik"'), r"line 1: not a result row: metric: Field required"),
        (
            lambda text: text.replace('"frames": 10', '"frames": 0'),
            r"line 1: not a result row: frames: Input should be greater than or equal to 1",
        ),
        (lambda text: text.replace("24.5", '"many"'), r"line 1: not a result row: value: Input should be a valid number"),
        (lambda text: "[]\n" + text, r"line 1: not a result row"),
        (lambda text: "", r"empty; delete it and measure again"),
    ],
)
def test_damaged_files_are_named_with_line_and_reason(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "m.jsonl"
    text = row().line() + "\n" + row(clip="bunny").line() + "\n"
    if "line 2" in message:
        file.write_text(text[: len(text) * 3 // 4])  # what a killed writer would leave
    else:
        file.write_text(damage(text))
    with pytest.raises(ResultError, match=rf"m\.jsonl.*{message}"):
        results.read(file)
    with pytest.raises(ResultError, match="no such file; the measure stage writes it"):
        results.read(tmp_path / "none.jsonl")


def test_a_mean_has_its_interval_over_clips() -> None:
    values = [24.1, 25.9, 23.3, 27.2]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    (summary,) = results.aggregate(row(value, clip=f"clip{i}") for i, value in enumerate(values))
    assert (summary.low, summary.high) == pytest.approx((expected.low, expected.high), rel=1e-12) and summary.interval == "t"
    (many,) = results.aggregate(row(24 + i % 7, clip=f"clip{i}") for i in range(20))
    assert many.interval == "bca"


SEEDS = {(42, "a"): 10.0, (43, "a"): 12.0, (42, "b"): 20.0, (43, "b"): 21.0}


def test_the_mean_over_seeds_comes_first_and_its_spread_is_that_of_means_over_clips() -> None:
    rows = [row(value, seed=seed, clip=clip) for (seed, clip), value in SEEDS.items()]
    (summary,) = results.aggregate(reversed(rows))
    assert (summary.value, summary.clips, summary.frames, summary.seeds) == (15.75, 2, 20, 2)
    assert summary.seed_sd == pytest.approx(abs(16.5 - 15.0) / math.sqrt(2))  # means over clips: 15 and 16.5
    expected = scipy.stats.ttest_1samp([11.0, 20.5], 0).confidence_interval(0.95)  # of the clips, each a mean over seeds
    assert (summary.low, summary.high) == pytest.approx((expected.low, expected.high))
    (single,) = results.aggregate([row()])
    assert (single.seeds, single.seed_sd) == (1, None)


def test_what_the_noise_does_not_reach_has_one_seed() -> None:
    rows = [row(value, seed=seed, clip=clip) for (seed, clip), value in SEEDS.items()]
    fixed = [
        row(30.0, clip=clip, **facts)
        for clip in "ab"
        for facts in ({"method": "bicubic"}, {"method": "ground_truth"}, {"method": "theirs", "execution": "external"})
    ]
    assert {s.method: s.seeds for s in results.aggregate([*rows, *fixed])} == {"maxmin": 2, "bicubic": 1, "ground_truth": 1, "theirs": 1}


def test_a_missing_value_is_the_mean_s_too() -> None:
    reason = "no file lpips.pth"
    rows = [row(24.0, clip="a"), row(None, clip="b", missing=reason)]
    (summary,) = results.aggregate(rows)
    assert (summary.value, summary.low, summary.interval, summary.missing, summary.clips) == (None, None, "", reason, 2)
    (seeds,) = results.aggregate([row(24.0, clip="a"), row(None, clip="a", seed=43, missing=reason)])
    assert (seeds.value, seeds.seed_sd, seeds.missing) == (None, None, reason)
    assert results.by_clip({"a": {42: rows[0]}, "b": {42: rows[1]}}) == {"a": 24.0, "b": None}


def test_mean_over_frames_then_over_clips() -> None:
    short, long = row(10.0, clip="a", frames=2), row(20.0, clip="b", frames=8)
    (summary,) = results.aggregate([short, long])
    assert (summary.value, summary.clips, summary.frames) == (15.0, 2, 10)  # not weighted by frames


def test_an_infinite_clip_makes_an_infinite_mean_without_interval() -> None:
    (summary,) = results.aggregate([row(30.0, clip="a"), row(math.inf, clip="b")])
    assert summary.value == math.inf and summary.low is None and summary.high is None


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_the_order_of_clips_and_files_does_not_matter(values: list[float], seed: int) -> None:
    rows = [row(value, clip=f"clip{i}", method=method) for i, value in enumerate(values) for method in ("maxmin", "quantvsr")]
    shuffled = random.Random(seed).sample(rows, len(rows))
    whole = results.aggregate(rows)
    assert results.aggregate(shuffled) == whole
    assert results.aggregate([*shuffled[len(rows) // 2 :], *shuffled[: len(rows) // 2]]) == whole  # merged shards
    assert whole[0].value == pytest.approx(float(np.mean(values)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no result rows"),
        ([row(), row()], r"real, maxmin W4A4 \(mgld-mini, simulated\), psnr: clip bikes is there twice"),
        (
            [row(), row(clip="b"), row(method="quantvsr")],
            "quantvsr W4A4 .* psnr: no value for clip b, which others have; nothing is left out",
        ),
        ([row(), row(clip="b", seed=43)], "psnr: clip b has seed 43, clip bikes seed 42; restore and measure all with the same"),
        (
            [row(), row(seed=43), row(method="quantvsr")],
            "quantvsr W4A4 .* psnr: seed 42, another method has seeds 42, 43; restore and measure all",
        ),
        ([row(), row(seed=43), row()], "clip bikes is there twice"),
        ([row(), row(clip="b", signature="psnr|paper-v1")], "rows of more than one signature"),
        ([row(), row(clip="b", limit=2)], "rows of more than one limit"),
        ([row(), row(method="quantvsr", frames=9)], "clip bikes has 9 frames, elsewhere 10"),
    ],
)
def test_what_has_no_common_mean(rows: list[Row], message: str) -> None:
    with pytest.raises(ResultError, match=message):
        results.aggregate(rows)
