import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qvsr.config import Config, ConfigError, TrainingSettings, explain, load, merge, parse_bits, schema
from qvsr.provenance import ROOT

MINIMAL = """
datasets:
  clips: {kind: folder, path: a}
  calibration: {kind: folder, path: b}
evaluate: [clips]
"""


def written(tmp_path: Path, text: str = "") -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL + text)
    return path


def test_the_committed_configurations_are_valid():
    for path in sorted(set((ROOT / "config").glob("*.yaml")) - {ROOT / "config" / "assets.yaml"}):  # that is a list of files
        load(path)


def test_defaults_are_the_published_model(tmp_path):
    config = load(written(tmp_path))
    assert config.sampling.steps == 50
    assert config.backbone.unet.model_channels == 320
    assert config.calibration.samples == 1800


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metric: [psnr]", "config.yaml: unknown key metric: no key 'metric'; did you mean metrics? known: ablation, backbone, bits"),
        ("sampling: {step: 5}", "unknown key sampling.step: no key 'step'; did you mean steps?"),
        ("method: {quantvsr: {rank: 5}}", "unknown key method.quantvsr.rank: no key 'rank'"),
        ("variants: {a: {method: maxmin, setting: {}}}", "unknown key variants.a.setting: no key 'setting'; did you mean settings?"),
        ("bits: [W4]", "bits: bits 'W4' is not WxAy with x and y from 2 to 8, such as W4A4"),
        ("bits: [W9A9]", "bits 'W9A9' is not WxAy"),
        ("sampling: {steps: 0}", "sampling.steps: Input should be greater than or equal to 1 (found 0)"),
        ("sampling: {tile: 32, tile_overlap: 32}", "tile_overlap 32 must be at least 0 and below tile 32"),
        ("method: {quantvsr: {rank_min: 9, rank_max: 8}}", "rank_min 9 is above rank_max 8"),
        ("backbone: {unet: {in_channels: 8}}", "unet.in_channels is 8, first_stage.embed_dim 4 with concat_lq=False needs 4"),
        ("calibration: {dataset: clips}", "dataset 'clips' is both calibrated on and evaluated: use two"),
        ("calibration: {dataset: clip}", "no dataset 'clip'; did you mean clips?"),
        ("bits: [W4A4, W6A6, W4A4]", "bits: 'W4A4' is listed 2 times, once is needed"),
        ("methods: [maxmin, maxmin]", "methods: 'maxmin' is listed 2 times"),
        ("metrics: []", "metrics is empty: nothing would be in the tables; name at least one"),
        ("seed: [", "config.yaml: not YAML"),
        ("threads: many", "threads: Input should be a valid integer"),
    ],
)
def test_what_cannot_work_is_one_line_that_names_file_and_key(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(written(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "config.yaml" in str(caught.value)


def test_a_missing_file_says_which_would_work(tmp_path):
    with pytest.raises(ConfigError, match=r"no configuration .*none\.yaml; try config/default\.yaml"):
        load(tmp_path / "none.yaml")


def test_extends_and_overrides_win_in_order(tmp_path):
    written(tmp_path, "sampling: {steps: 20, tile: 48}\nseed: 1\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: config.yaml\nsampling: {steps: 10}\n")
    config = load(child, {"seed": 3})
    assert (config.sampling.steps, config.sampling.tile, config.seed) == (10, 48, 3)


def test_settings_do_not_change_under_one(tmp_path):
    config = load(written(tmp_path))
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 2


def test_json_round_trip(tmp_path):
    config = load(written(tmp_path))
    again = tmp_path / "again.json"
    again.write_text(json.dumps(config.model_dump(mode="json")))
    assert load(again) == config


def test_schema_is_json_and_refuses_unknown_keys():
    found = json.loads(schema())
    assert found["additionalProperties"] is False
    assert set(found["properties"]) == set(Config.model_fields)


def test_merge_leaves_its_arguments_alone():
    base: dict[str, Any] = {"a": {"b": 1}}
    assert merge(base, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}}


def test_parse_bits_refuses():
    with pytest.raises(ConfigError, match="bits '4' is not WxAy"):
        parse_bits("4")


def test_every_key_is_explained_in_config_readme():
    """The table in config/README.md is `python -m qvsr schema --markdown`: every key, its default, what it does."""
    readme = (ROOT / "config" / "README.md").read_text()
    rows = [f"| `{key}` | {default} | {text} |" for key, default, text in explain()]
    table = readme.split("<!-- keys: begin -->\n")[1].split("<!-- keys: end -->")[0].splitlines()[2:]
    assert table == rows, "run: python scripts/update_readme.py --keys"
    assert all(text for _, _, text in explain()), "a key without a description in qvsr/config.py"


def test_explained_defaults_are_those_of_the_outer_class():
    shown = {key: default for key, default, _ in explain()}
    for stage in ("autoencoder", "diffusion", "decoder"):
        assert shown[f"training.{stage}.learning_rate"] == str(getattr(TrainingSettings(), stage).learning_rate)
    assert shown["datasets.<name>.kind"] == "required"
    assert shown["bits"] == "[W8A8, W6A6, W4A4]"


def test_every_field_has_a_reader():
    """A setting that nobody reads is a promise that nobody keeps."""
    code = "".join(
        file.read_text()
        for package in ("qvsr", "baselines", "metrics")
        for file in (ROOT / package).rglob("*.py")
        if file.name != "config.py"
    )
    config = (ROOT / "qvsr" / "config.py").read_text()
    for key, _, _ in explain():
        name = key.split(".")[-1]
        read = re.search(rf"""(\.{name}\b|["']{name}["']|\b{name}=)""", code) or re.search(rf"(self|settings|given)\.{name}\b", config)
        assert read, f"nothing reads the setting {key}"
