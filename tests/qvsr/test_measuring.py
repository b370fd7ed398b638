"""One clip through every metric: files and tensors, chunks, what is refused, weights that are not there, values by content."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import metrics  # noqa: F401 (fills the registry)
from qvsr import measuring, protocols
from qvsr.data import assets, clips
from qvsr.measuring import measure_clip, source_digest
from qvsr.protocols import Protocol
from qvsr.registry import METRICS
from qvsr.results import Context, ResultError, Row

STRICT = protocols.read("strict-v1")
CONTEXT = Context(backbone="mgld-mini", method="maxmin", bits="W4A4", seed=42, dataset="real", clip="bikes")
NAMES = ["psnr", "ssim", "gmsd", "ewarp_dis", "psnr_fp", "ssim_fp"]


def waves(seed: int, frames: int, height: int = 64, width: int = 72) -> np.ndarray:
    """A smooth picture that moves slowly, with some noise: every metric takes it."""
    rng = np.random.default_rng(seed)
    phase, (y, x) = rng.uniform(0, 6, 3), np.mgrid[0:height, 0:width]
    moving = [127 + 70 * np.sin(x / (4 + c) + 0.1 * t + phase[c]) * np.cos(y / (5 + c)) for t in range(frames) for c in range(3)]
    smooth = np.array(moving).reshape(frames, 3, height, width).transpose(0, 2, 3, 1)
    return (smooth + rng.integers(-3, 4, smooth.shape)).clip(0, 255).round().astype(np.uint8)


def tensor(seed: int, frames: int = 3) -> torch.Tensor:
    return torch.from_numpy(waves(seed, frames)).permute(0, 3, 1, 2).float().div(255).contiguous()


def write(folder: Path, seed: int, frames: int = 5, height: int = 64, width: int = 72) -> clips.Source:
    clips.write_clip(folder, waves(seed, frames, height, width), {"source": "waves"})
    return clips.open_clip(folder)


def changed(**changes: object) -> Protocol:
    """strict-v1 with other conventions, and blocks of metrics that tests add."""
    data = yaml.safe_load((protocols.FOLDER / "strict-v1.yaml").read_text())
    data["metrics"] |= changes.pop("metrics", {})  # type: ignore[arg-type]
    return Protocol.model_validate(data | changes)


@pytest.fixture
def added() -> Iterator[type]:
    """Lets a test register metrics, which are taken away again."""
    before = dict(METRICS.entries)
    yield METRICS.add
    METRICS.entries.clear()
    METRICS.entries.update(before)


FACTS = {"unit": "", "higher_is_better": True, "digits": 2, "licence": "Apache-2.0", "version": "1"}
BLOCK = {"implementation": "qvsr==1", "options": {}}


# --- values --------------------------------------------------------------------------------------------------------------


def test_a_clip_is_measured_by_every_metric_of_the_protocol() -> None:
    pred, gt = tensor(0), (tensor(0) * 0.99)
    rows = measure_clip(pred, gt, pred, NAMES, CONTEXT, STRICT)
    assert [r.metric for r in rows] == NAMES
    by_name = {r.metric: r for r in rows}
    assert [len(r.per_frame) for r in rows] == [3, 3, 3, 2, 3, 3] and {r.frames for r in rows} == {3}
    assert by_name["psnr"].value == pytest.approx(sum(by_name["psnr"].per_frame) / 3)
    assert by_name["psnr_fp"].value == float("inf") and by_name["ssim_fp"].value == pytest.approx(1.0, abs=1e-12)
    assert by_name["psnr"].signature.startswith("psnr|strict-v1|impl:") and "colour:rgb" in by_name["ssim"].signature


def test_files_give_the_values_of_the_frames_in_memory(tmp_path: Path) -> None:
    sources = [write(tmp_path / name, seed) for seed, name in enumerate(("pred", "gt", "fp"))]
    tensors = [clips.read_frames_TCHW(source.path) for source in sources]
    streamed = measure_clip(*sources, NAMES, CONTEXT, STRICT, chunk=2)
    for name, row in zip(NAMES, streamed, strict=True):
        facts = METRICS[name].facts
        operands = [tensors[0], *({"gt": tensors[1:2], "fp": tensors[2:], "none": []}[facts["needs"]])]
        assert row.per_frame == tuple(METRICS[name](*operands, **STRICT.options(METRICS[name])).tolist()), name
        assert row.inputs["pred"] == sources[0].facts() | {"sha256": clips.read_clip(sources[0].path).info["sha256"]}
        assert set(row.inputs) == {"pred", facts["needs"]} - {"none"}


def test_every_frame_is_decoded_once_for_all_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [write(tmp_path / name, seed) for seed, name in enumerate(("pred", "gt", "fp"))]
    decoded, read_png = [], clips.read_png
    monkeypatch.setattr(clips, "read_png", lambda path: decoded.append(path) or read_png(path))
    measure_clip(*sources, NAMES, CONTEXT, STRICT, chunk=2)
    assert len(decoded) == len(set(decoded)) == 15
    decoded.clear()
    measure_clip(sources[0], sources[1], sources[2], ["psnr"], CONTEXT, STRICT)
    assert len(decoded) == 10  # nobody asked for the full-precision output
    for bound, times in ((measuring.KEPT, 1), (0, 2)):  # a long clip is not kept in memory while its values are looked for
        decoded.clear()
        monkeypatch.setattr(measuring, "KEPT", bound)
        rows = measure_clip(*sources, NAMES, CONTEXT, STRICT, cache=tmp_path / f"cache{bound}")
        assert len(decoded) == 15 * times and rows == measure_clip(*sources, NAMES, CONTEXT, STRICT)


def test_no_more_than_a_chunk_is_held(tmp_path: Path, added: type) -> None:
    lengths: list[int] = []

    @added("spy", needs="none", frames="pairs", **FACTS)
    def spy(pred_TCHW: torch.Tensor) -> torch.Tensor:
        lengths.append(len(pred_TCHW))
        return pred_TCHW[1:, 0, 0, 0].double()

    measure_clip(write(tmp_path / "pred", 0, frames=7), None, None, ["spy"], CONTEXT, changed(metrics={"spy": BLOCK}), chunk=3)
    assert lengths == [3, 4, 2]  # the last frame of the chunk before, and what is new


def test_a_clip_s_value_is_rounded_where_the_protocol_says_so() -> None:
    block = STRICT.metrics["psnr"].model_dump() | {"clip_digits": 2}
    (row,) = measure_clip(tensor(0), tensor(1), None, ["psnr"], CONTEXT, changed(metrics={"psnr": block}))
    assert row.value == round(sum(row.per_frame) / 3, 2) != sum(row.per_frame) / 3
    assert "|clip_digits:2|" in row.signature and Row.parse(row.line()) == row


def test_a_metric_of_whole_clips_gets_the_path(tmp_path: Path, added: type) -> None:
    @added("length", needs="none", frames="clip", **FACTS)
    def length(pred: Path, *, add: int) -> float:
        return len(list(pred.glob("*.png"))) + add

    protocol = changed(metrics={"length": BLOCK | {"options": {"add": 10}}})
    (row,) = measure_clip(write(tmp_path / "pred", 0), None, None, ["length"], CONTEXT, protocol)
    assert (row.value, row.per_frame, row.frames) == (15.0, (), 5)
    with pytest.raises(ResultError, match="real/bikes, maxmin W4A4: length measures files, not frames in memory"):
        measure_clip(tensor(0), None, None, ["length"], CONTEXT, protocol)


# --- what is refused -----------------------------------------------------------------------------------------------------


def test_frames_that_a_metric_needs_and_does_not_get() -> None:
    with pytest.raises(ResultError, match="real/bikes, maxmin W4A4: psnr_fp needs the full-precision output, which is not given"):
        measure_clip(tensor(0), tensor(1), None, ["psnr_fp"], CONTEXT, STRICT)
    with pytest.raises(ResultError, match="real/bikes, maxmin W4A4: psnr needs the ground truth"):
        measure_clip(tensor(0), None, None, ["psnr"], CONTEXT, STRICT)
    assert measure_clip(tensor(0), None, None, ["ewarp_dis"], CONTEXT, STRICT)[0].frames == 3


def test_other_numbers_or_sizes_of_frames_are_named_with_both_and_the_clip() -> None:
    words = (
        "real/bikes, maxmin W4A4: the prediction has 3 frames of 72x64, the ground truth 2 frames of 72x64; check upscale and the clips, "
        "nothing is cut under protocol strict-v1"
    )
    with pytest.raises(ResultError, match=re.escape(words)):
        measure_clip(tensor(0), tensor(0, 2), None, ["psnr"], CONTEXT, STRICT)
    with pytest.raises(ResultError, match="the prediction has 3 frames of 72x64, the full-precision output 3 frames of 70x64"):
        measure_clip(tensor(0), tensor(0), tensor(0)[..., :70], ["psnr", "psnr_fp"], CONTEXT, STRICT)
    nameless = CONTEXT.model_copy(update={"dataset": "", "method": "", "bits": ""})  # `measure` on two folders
    with pytest.raises(ResultError, match=r"^bikes: the prediction has"):
        measure_clip(tensor(0), tensor(0, 2), None, ["psnr"], nameless, STRICT)


def test_a_protocol_may_cut_to_what_is_common(tmp_path: Path) -> None:
    pred, gt = write(tmp_path / "pred", 0, 5, 66, 72), write(tmp_path / "gt", 1, 4, 64, 80)
    (row,) = measure_clip(pred, gt, None, ["psnr"], CONTEXT, changed(frames="common"), chunk=3)
    a, b = (clips.read_frames_TCHW(source.path)[:4, :, :64, :72] for source in (pred, gt))
    assert row.per_frame == tuple(METRICS["psnr"](a, b, colour="rgb", crop=0, eps=0.0).tolist()) and row.frames == 4
    assert row.provenance["cut"] == "pred of 5 frames of 72x66, gt of 4 frames of 80x64 cut to 4 frames of 72x64"
    assert [row.inputs[side]["sha256"] for side in ("pred", "gt")] == [source.info["sha256"] for source in (pred, gt)]  # of the whole
    (whole,) = measure_clip(gt, gt, None, ["psnr"], CONTEXT, changed(frames="common"))
    assert "cut" not in whole.provenance


def test_errors_of_a_metric_name_the_clip_and_where_its_frames_are_counted_from(tmp_path: Path, added: type) -> None:
    @added("fussy", needs="none", frames="each", **FACTS)
    def fussy(pred_TCHW: torch.Tensor) -> torch.Tensor:
        if len(pred_TCHW) < 3:
            raise ValueError("fussy: frame 1 is not to my taste")
        return pred_TCHW[:, 0, 0, 0].double()

    protocol = changed(metrics={"fussy": BLOCK})
    source = write(tmp_path / "pred", 0)
    with pytest.raises(ValueError, match=r"^real/bikes, maxmin W4A4: fussy: frame 1 .* \(frames are counted from frame 3 of the clip\)$"):
        measure_clip(source, None, None, ["fussy"], CONTEXT, protocol, chunk=3)
    with pytest.raises(ValueError, match=r"^real/bikes, maxmin W4A4: fussy: frame 1 is not to my taste$"):
        measure_clip(source, None, None, ["fussy"], CONTEXT, protocol, chunk=2)
    with pytest.raises(ValueError, match="no metric 'psrn'; did you mean psnr"):
        measure_clip(tensor(0), tensor(0), None, ["psrn"], CONTEXT, STRICT)


@pytest.mark.parametrize(
    ("value", "message"), [("nan", "odd is NaN; such a clip has no value"), ("short", "odd gives 4 values for 5 frames")]
)
def test_what_a_metric_must_not_give(tmp_path: Path, added: type, value: str, message: str) -> None:
    @added("odd", needs="none", frames="each", **FACTS)
    def odd(pred_TCHW: torch.Tensor) -> torch.Tensor:
        return pred_TCHW[:, 0, 0, 0] * torch.nan if value == "nan" else pred_TCHW[1:, 0, 0, 0]

    with pytest.raises(ResultError, match=f"real/bikes, maxmin W4A4: {message}"):
        source = write(tmp_path / "pred", 0)
        measure_clip(source, None, None, ["odd"], CONTEXT, changed(metrics={"odd": BLOCK}), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# --- weights that are not there ----------------------------------------------------------------------------------------------


def test_missing_weights_are_a_row_without_value_and_others_are_measured(
    tmp_path: Path, added: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[str] = []

    def paths(names: tuple[str, ...]) -> dict[str, Path]:
        if not there:
            raise assets.MissingError("lpips-heads is not there; python -m qvsr assets fetch lpips-heads")
        return {name: tmp_path / name for name in names}

    @added("learned", needs="none", frames="each", weights=("lpips-heads",), **FACTS)
    def learned(pred_TCHW: torch.Tensor, *, weights: dict[str, Path]) -> torch.Tensor:
        return torch.full((len(pred_TCHW),), len(str(weights["lpips-heads"])), dtype=torch.float64)

    monkeypatch.setattr(assets, "paths", paths)
    protocol = changed(metrics={"learned": BLOCK | {"weights": {"lpips-heads": "0123abcd"}}})
    source, cache = write(tmp_path / "pred", 0), tmp_path / "cache"
    first, second = measure_clip(source, None, None, ["learned", "ewarp_dis"], CONTEXT, protocol, cache=cache)
    assert first.value is None and first.missing.endswith("python -m qvsr assets fetch lpips-heads") and first.per_frame == ()
    assert second.value is not None and Row.parse(first.line()) == first
    with pytest.raises(ResultError, match="real/bikes, maxmin W4A4: learned has no value: lpips-heads is not there; python -m qvsr assets"):
        measure_clip(source, None, None, ["learned", "ewarp_dis"], CONTEXT, protocol, require_all=True)
    there.append("now")  # a value that was missing is not remembered
    first, _ = measure_clip(source, None, None, ["learned", "ewarp_dis"], CONTEXT, protocol, cache=cache)
    assert first.value == len(str(tmp_path / "lpips-heads"))


def test_a_missing_program_is_a_row_without_value_too(tmp_path: Path, added: type) -> None:
    @added("outside", needs="none", frames="clip", program="vsreval", **FACTS)
    def outside(pred: Path) -> float:
        raise assets.MissingError("the program vsreval is not there; pip install vsreval")

    protocol = changed(metrics={"outside": BLOCK | {"implementation": "vsreval==0.1.0"}})
    (row,) = measure_clip(write(tmp_path / "pred", 0), None, None, ["outside"], CONTEXT, protocol)
    assert row.value is None and row.missing == "the program vsreval is not there; pip install vsreval"


# --- values by content -------------------------------------------------------------------------------------------------------


class Counting:
    """Which metrics were computed, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        stream = measuring._stream

        def counted(asked, *arguments):  # type: ignore[no-untyped-def]
            self.names += [metric.name for metric in asked]
            return stream(asked, *arguments)

        monkeypatch.setattr(measuring, "_stream", counted)

    def take(self) -> list[str]:
        found, self.names = self.names, []
        return found


def test_only_what_changed_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed, cache, names = Counting(monkeypatch), tmp_path / "cache", ["psnr", "ewarp_dis"]
    sources = {name: (write(tmp_path / "pred" / name, seed), write(tmp_path / "gt" / name, seed + 9)) for seed, name in enumerate("ab")}

    def measure(protocol: Protocol = STRICT) -> list[Row]:
        return [
            row
            for name, (pred, gt) in sources.items()
            for row in measure_clip(pred, gt, None, names, CONTEXT.model_copy(update={"clip": name}), protocol, cache=cache)
        ]

    first = measure()
    assert computed.take() == names * 2
    for file in (tmp_path / "pred").rglob("*"):
        os.utime(file, (1, 1))
    assert measure() == first and computed.take() == []

    pixels = clips.read_clip(tmp_path / "pred" / "b").frames_THWC.copy()
    pixels[4, 63, 71, 2] ^= 1
    clips.write_clip(tmp_path / "pred" / "b", pixels, {"source": "waves"})
    sources["b"] = (clips.open_clip(tmp_path / "pred" / "b"), sources["b"][1])
    second = measure()
    assert computed.take() == names and second[:2] == first[:2]
    assert all(one.value != other.value for one, other in zip(second[2:], first[2:], strict=True))

    sources["b"] = (sources["b"][0], write(tmp_path / "gt" / "b", 5))  # another ground truth: the prediction's own metric stays
    measure()
    assert computed.take() == ["psnr"]
    measure(changed(metrics={"psnr": STRICT.metrics["psnr"].model_dump() | {"options": {"colour": "y", "crop": 0, "eps": 0.0}}}))
    assert computed.take() == ["psnr", "psnr"]  # another signature
    monkeypatch.setattr(measuring, "source_digest", lambda metric: "edited" if metric.name == "ewarp_dis" else source_digest(metric))
    measure()
    assert computed.take() == ["ewarp_dis", "ewarp_dis"]  # another version of the metric


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"values": ["1.0"], "sha256": "0"}', '{"values": [], "sha256": "0"}'])
def test_a_damaged_value_is_computed_and_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    computed, cache, source = Counting(monkeypatch), tmp_path / "cache", write(tmp_path / "pred", 0)
    first = measure_clip(source, source, None, ["psnr"], CONTEXT, STRICT, cache=cache)
    (file,) = cache.rglob("*.json")
    whole = file.read_text()
    assert json.loads(whole)["values"] == ["inf"] * 5
    file.write_text(damage)
    assert measure_clip(source, source, None, ["psnr"], CONTEXT, STRICT, cache=cache) == first
    assert computed.take() == ["psnr", "psnr"] and file.read_text() == whole


def test_a_value_that_was_changed_by_hand_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed, cache = Counting(monkeypatch), tmp_path / "cache"
    pred, gt = write(tmp_path / "pred", 0), write(tmp_path / "gt", 1)
    first = measure_clip(pred, gt, None, ["psnr"], CONTEXT, STRICT, cache=cache)
    (file,) = cache.rglob("*.json")
    file.write_text(re.sub(r'"values": \["\d', '"values": ["9', file.read_text()))
    assert measure_clip(pred, gt, None, ["psnr"], CONTEXT, STRICT, cache=cache) == first
    assert computed.take() == ["psnr", "psnr"]


def test_frames_that_clip_json_does_not_describe_are_refused_with_a_cache_too(tmp_path: Path) -> None:
    source = write(tmp_path / "pred", 0)
    measure_clip(source, source, None, ["psnr"], CONTEXT, STRICT, cache=tmp_path / "cache")
    (tmp_path / "pred" / "00000001.png").write_bytes((tmp_path / "pred" / "00000002.png").read_bytes())
    with pytest.raises(clips.ClipError, match=r"the frames are not those that clip.json describes"):
        measure_clip(source, source, None, ["psnr"], CONTEXT, STRICT, cache=tmp_path / "cache")


def test_a_metric_s_version_is_its_file_and_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (
        ("a", "from metrics._shared import x\nfrom metrics import b\n"),
        ("b", "import metrics.c\n"),
        ("c", ""),
        ("_shared", ""),
        ("other", ""),
    ):
        (tmp_path / "metrics").mkdir(exist_ok=True)
        (tmp_path / "metrics" / f"{name}.py").write_text(text)
    monkeypatch.setattr(measuring, "ROOT", tmp_path)
    digest = measuring._source_digest.__wrapped__
    before = digest(tmp_path / "metrics" / "a.py")
    for name, differs in (("a", True), ("b", True), ("c", True), ("_shared", True), ("other", False)):
        file = tmp_path / "metrics" / f"{name}.py"
        text = file.read_text()
        file.write_text(text + "# edited\n")
        assert (digest(tmp_path / "metrics" / "a.py") != before) == differs, name
        file.write_text(text)
    assert source_digest(METRICS["psnr"]) != source_digest(METRICS["psnr_fp"])
