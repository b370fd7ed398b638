"""Methods of other packages: known by name without an import, refused in one line where something is wrong, stale by version."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qvsr import plan, registry
from qvsr.config import ConfigError
from qvsr.registry import BASELINES, PluginError, load_plugin, plugins
from tests.plugin import METHOD, install

TEXT = """
datasets: {clips: {kind: folder, path: a}, calibration: {kind: folder, path: b}}
evaluate: [clips]
methods: [maxmin, mine]
bits: [W4A4]
"""


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a package for one test."""

    def add(**facts: Any) -> None:
        monkeypatch.syspath_prepend(str(install(tmp_path / "installed", **facts)))
        importlib.invalidate_caches()
        plugins.cache_clear()

    yield add
    plugins.cache_clear()
    for name in ("mine", "other", "maxmin2"):
        BASELINES.entries.pop(name, None)
    for module in ("qvsr_mine", "qvsr_other"):
        sys.modules.pop(module, None)


def resolved(tmp_path: Path, overrides: dict[str, Any] | None = None) -> plan.Plan:
    (tmp_path / "config.yaml").write_text(TEXT)
    return plan.Plan(plan.resolve([tmp_path / "config.yaml"], overrides or {}))


def test_without_a_package_there_is_no_such_method(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no method 'mine'; did you mean maxmin"):
        resolved(tmp_path)
    with pytest.raises(ConfigError, match=re.escape("unknown key method.mine: no key 'mine'; did you mean maxmin? known: ")):
        resolved(tmp_path, {"methods": ["maxmin"], "method": {"mine": {"floored": True}}})


def test_a_package_is_known_by_name_and_not_imported(tmp_path: Path, offer: Callable[..., None]) -> None:
    offer(code="raise RuntimeError('imported')")
    run = resolved(tmp_path)
    assert run.quantized() == [("maxmin", "W4A4"), ("mine", "W4A4")] and run.checkpoint("mine", "W4A4")
    assert "qvsr_mine" not in sys.modules


def test_settings_wait_for_the_class_of_the_package(tmp_path: Path, offer: Callable[..., None]) -> None:
    offer()
    run = resolved(tmp_path, {"method": {"mine": {"floored": True}}})
    assert plan.Plan(run.config).config.resolve_method("mine")[1].model_dump() == {"floored": True}  # type: ignore[union-attr]
    load_plugin("mine")
    owner = BASELINES["mine"].facts["settings"]
    assert run.config.plugin_settings("mine", owner) == {"floored": True, "scale_floor": 1e-4}
    assert resolved(tmp_path).config.plugin_settings("mine", owner) == {"floored": False, "scale_floor": 1e-4}
    again = tmp_path / "config.json"
    again.write_text(plan.to_json(run.config))
    assert plan.resolve([again], {}) == run.config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"floord": True}, "method.mine: unknown key floord: no key 'floord'; did you mean floored? known: floored, scale_floor"),
        ({"floored": "often"}, "method.mine: floored: Input should be a valid boolean, unable to interpret input (found 'often')"),
        ({"scale_floor": 0.1}, "method.mine.scale_floor: it is read with floored: true only; leave it out or set that"),
    ],
)
def test_settings_that_the_package_refuses(tmp_path: Path, offer: Callable[..., None], settings: dict[str, Any], message: str) -> None:
    offer()
    load_plugin("mine")
    owner = BASELINES["mine"].facts["settings"]
    config = resolved(tmp_path, {"method": {"mine": settings}}).config
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        config.plugin_settings("mine", owner)
    variants = {"a": {"method": "mine", "settings": settings}}
    with pytest.raises(ConfigError, match=re.escape(message.replace("method.mine", "variants.a.settings"))):
        resolved(tmp_path, {"variants": variants}).config.plugin_settings("a", owner)


def test_a_variant_may_switch_off_what_the_method_sets(tmp_path: Path, offer: Callable[..., None]) -> None:
    offer()
    load_plugin("mine")
    data = {
        "method": {"mine": {"floored": True, "scale_floor": 0.1}},
        "variants": {"a": {"method": "mine", "settings": {"floored": False}}},
    }
    found = resolved(tmp_path, data).config.plugin_settings("a", BASELINES["mine"].facts["settings"])
    assert found == {"floored": False, "scale_floor": 0.1}


def test_a_package_without_settings_takes_none(tmp_path: Path, offer: Callable[..., None]) -> None:
    offer(code=METHOD.replace(", settings=MineSettings", ""))
    load_plugin("mine")
    assert resolved(tmp_path).config.plugin_settings("mine", None) == {}
    with pytest.raises(ConfigError, match=re.escape("method.mine: unknown key rank: mine of package qvsr-mine 1.0 has no settings")):
        resolved(tmp_path, {"method": {"mine": {"rank": 3}}}).config.plugin_settings("mine", None)


@pytest.mark.parametrize("name", ["maxmin", "quantvsr", "bicubic", "exclude"])
def test_a_name_of_ours(tmp_path: Path, offer: Callable[..., None], name: str) -> None:
    offer(name=name)
    with pytest.raises(
        PluginError, match=f"^package qvsr-mine 1.0: its method '{name}' has the name of one of ours; give its entry point another"
    ):
        resolved(tmp_path, {"methods": ["maxmin"]})


def test_a_name_that_no_file_can_have(tmp_path: Path, offer: Callable[..., None]) -> None:
    offer(name="a/b")
    with pytest.raises(PluginError, match="package qvsr-mine 1.0: name 'a/b' is not made of letters"):
        resolved(tmp_path, {"methods": ["maxmin"]})


def test_two_packages_with_one_name(offer: Callable[..., None]) -> None:
    offer()
    offer(package="qvsr-other", version="2.0")
    with pytest.raises(
        PluginError, match=r"^package qvsr-\w+ \d.0: its method 'mine' is also that of package qvsr-\w+ \d.0; uninstall one"
    ):
        plugins()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"code": "import no_such_package"},
            "its method 'mine' cannot be loaded from qvsr_mine (ModuleNotFoundError: No module named 'no_such_p",
        ),
        (
            {"target": "qvsr_mine:absent"},
            "cannot be loaded from qvsr_mine:absent (AttributeError: module 'qvsr_mine' has no attribute 'absent')",
        ),
        (
            {"code": METHOD.replace("NAME", "other")},
            "loading qvsr_mine registers no method 'mine'; its decorator must be @BASELINES.add('mine')",
        ),
    ],
)
def test_a_broken_package(offer: Callable[..., None], facts: dict[str, Any], message: str) -> None:
    offer(**facts)
    with pytest.raises(PluginError, match=re.escape(message)) as caught:
        load_plugin("mine")
    assert str(caught.value).startswith("package qvsr-mine 1.0: ") and "\n" not in str(caught.value)


def test_another_version_or_setting_makes_its_jobs_stale_and_no_other(tmp_path: Path, offer: Callable[..., None]) -> None:
    def digests(**overrides: Any) -> tuple[str, str]:
        run = resolved(tmp_path, overrides)
        return run.method_digest("maxmin"), run.method_digest("mine")

    offer()
    first, changed = digests(), digests(method={"mine": {"floored": True}})
    assert changed[0] == first[0] and changed[1] != first[1]
    offer(version="1.1")
    assert registry.plugins()["mine"].version == "1.1"
    newer = digests()
    assert newer[0] == first[0] and newer[1] not in (first[1], changed[1])


def test_nothing_is_loaded_for_a_method_of_ours(offer: Callable[..., None]) -> None:
    offer(code="raise RuntimeError('imported')")
    load_plugin("maxmin")
