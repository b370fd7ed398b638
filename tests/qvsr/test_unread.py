"""A setting that its method does not read beside its others is refused, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qvsr import plan
from qvsr.config import Config, ConfigError, load
from qvsr.method_settings import MethodSettings, unread
from qvsr.settings import Settings

TEXT = """
datasets: {clips: {kind: folder, path: a}, calibration: {kind: folder, path: b}}
evaluate: [clips]
"""


def resolve(tmp_path: Path, text: str = "", overrides: dict[str, Any] | None = None) -> Config:
    (tmp_path / "config.yaml").write_text(TEXT + text)
    return plan.resolve([tmp_path / "config.yaml"], overrides or {})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("quarot: {gptq_damp: 0.02}", "method.quarot.gptq_damp: it is read with weights: gptq only; leave it out or set that"),
        ("quarot: {gptq_damp: 0.01}", "method.quarot.gptq_damp: it is read with weights: gptq only"),  # its default, written
        ("quarot: {gptq_act_order: true}", "method.quarot.gptq_act_order: "),
        ("svdquant: {group_size: 32}", "method.svdquant.group_size: it is read with granularity: native only"),
        ("svdquant: {gptq_rows: 32}", "method.svdquant.gptq_rows: it is read with weights: gptq only"),
        ("vidit_q: {alpha: 0.3, balance: false}", "method.vidit_q.alpha: it is read with balance: true only"),
        ("vidit_q: {native_activations: frame}", "method.vidit_q.native_activations: it is read with granularity: native only"),
        ("maxmin: {ema: 0.9}", "method.maxmin.ema: it is read with activations: static only"),
        ("quantvsr: {branch: false, rank_min: 8}", "method.quantvsr.rank_min: it is read with branch: true only"),
        ("quantvsr: {branch: false, refine: true}", "method.quantvsr.refine: it is read with branch: true only"),
        ("quantvsr: {stca: false, quantile: 0.2}", "method.quantvsr.quantile: it is read with branch: true and stca: true only"),
        (
            "quantvsr: {refine: false, lba: false, accumulate: 2}",
            "method.quantvsr.accumulate: it is read with branch: true and refine: true or lba: true and bias: trained only",
        ),
        (
            "q_diffusion: {step_updates: 0, step_learning_rate: 0.1}",
            "method.q_diffusion.step_learning_rate: it is read with step_updates above 0 only",
        ),
        (
            "q_diffusion: {step_updates: 0, round_updates: 0, batch: 2}",
            "method.q_diffusion.batch: it is read with round_updates above 0 or step_updates above 0 only",
        ),
    ],
)
def test_refused_by_name(tmp_path: Path, method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}") as caught:
        resolve(tmp_path, f"method: {{{method}}}\n")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "method",
    [
        "quarot: {gptq_damp: 0.02, weights: gptq}",
        "quarot: {gptq_act_order: false}",
        "svdquant: {group_size: 32, granularity: native}",
        "vidit_q: {alpha: 0.3}",
        "quantvsr: {branch: false, refine: false, stca: false}",
        "quantvsr: {refine: false, accumulate: 2}",
        "quantvsr: {lba: false, learning_rate: 0.1}",
        "q_diffusion: {step_updates: 0, batch: 2}",
        "maxmin: {ema: 0.9, activations: static}",
    ],
)
def test_what_is_read_or_off_is_taken(tmp_path: Path, method: str) -> None:
    resolve(tmp_path, f"method: {{{method}}}\n")


def test_defaults_are_never_refused(tmp_path: Path) -> None:
    resolve(tmp_path, "method: {quantvsr: {branch: false}, vidit_q: {balance: false}}\n")


def test_a_variant_answers_for_its_own_keys(tmp_path: Path) -> None:
    base = "method: {quantvsr: {rank_min: 8, refine_updates: 5}}\n"
    resolve(tmp_path, base + "variants: {a: {method: quantvsr, settings: {branch: false, refine: false}}}\n")
    with pytest.raises(ConfigError, match=r"^variants.a.settings.rank_min: it is read with branch: true only; leave it out or set that$"):
        resolve(tmp_path, base + "variants: {a: {method: quantvsr, settings: {branch: false, rank_min: 8}}}\n")


def test_what_only_a_variant_reads_may_stand_in_the_method(tmp_path: Path) -> None:
    resolve(tmp_path, "method: {quarot: {gptq_damp: 0.02}}\nvariants: {a: {method: quarot, settings: {weights: gptq}}}\n")


def test_a_file_may_switch_off_what_the_one_it_extends_sets(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(TEXT + "method: {quantvsr: {rank_min: 8}}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nmethod: {quantvsr: {branch: false}}\n")
    assert plan.resolve([tmp_path / "child.yaml"], {}).method.quantvsr.rank_min == 8
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nmethod: {quantvsr: {branch: false, rank_max: 99}}\n")
    with pytest.raises(ConfigError, match=r"^method.quantvsr.rank_max: it is read with branch: true and stca: true only"):
        plan.resolve([tmp_path / "child.yaml"], {})


def test_overrides_may_switch_off_too_and_repeat_the_file(tmp_path: Path) -> None:
    """Snakemake hands the file's values over once more, as if somebody had written them on the command line."""
    text = "method: {quantvsr: {rank_min: 8}}\n"
    resolve(tmp_path, text, {"method": {"quantvsr": {"rank_min": 8, "branch": False}}})
    with pytest.raises(ConfigError, match=r"^method.quantvsr.rank_min: "):
        resolve(tmp_path, text, {"method": {"quantvsr": {"rank_min": 9, "branch": False}}})


def test_the_settings_that_a_run_keeps_are_taken_as_they_are(tmp_path: Path) -> None:
    config = resolve(tmp_path, "method: {quantvsr: {branch: false}}\nvariants: {a: {method: quarot, settings: {weights: gptq}}}\n")
    kept = tmp_path / "config.json"
    kept.write_text(plan.to_json(config))
    assert plan.resolve([kept], {}) == config
    with pytest.raises(ConfigError, match=r"^method.quantvsr.rank_max: "):
        plan.resolve([kept], {"method": {"quantvsr": {"rank_max": 99}}})


def test_the_committed_configurations_set_nothing_in_vain() -> None:
    for path in sorted(set((plan.ROOT / "config").glob("*.yaml")) - {plan.ROOT / "config" / "assets.yaml"}):  # that is a list of files
        written = load(path)
        if str(written.backbone.flow_weights) == "raft-things":  # an asset's name, of which a run knows the place
            placed = written.backbone.model_copy(update={"flow_weights": Path("resources/assets/raft-things.pth")})
            written = written.model_copy(update={"backbone": placed})
        assert plan.resolve([path], {}) == written


def test_every_mark_names_settings_of_its_class() -> None:
    classes = [field.annotation for field in MethodSettings.model_fields.values() if field.annotation is not tuple[str, ...]]
    marked = [one for one in classes if getattr(one, "READ_IF", None)]
    assert len(marked) >= 6
    for owner in marked:
        assert isinstance(owner, type) and issubclass(owner, Settings)
        seen: list[str] = []
        for keys, alternatives in owner.READ_IF.items():  # type: ignore[attr-defined]
            seen += keys.split()
            for conditions in alternatives:
                assert set(conditions) <= set(owner.model_fields), owner
                values = {name: wanted if wanted is not True else 1 for name, wanted in conditions.items()}
                assert all(unread(owner, key, {**values, key: values.get(key, 1)}) is None for key in keys.split())
        assert len(seen) == len(set(seen)) and set(seen) <= set(owner.model_fields), owner
