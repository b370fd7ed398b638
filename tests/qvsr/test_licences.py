"""Facts of metrics that are read without importing them; what `licenses: permissive` leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

import metrics  # noqa: F401 (fills the registry)
from qvsr import plan
from qvsr.config import ConfigError
from qvsr.data import assets
from qvsr.plan import PERMISSIVE, Plan, assets_of, declared_facts, resolve
from qvsr.registry import METRICS

TEXT = """
datasets: {clips: {kind: folder, path: a}, calibration: {kind: folder, path: b}}
evaluate: [clips]
licenses: permissive
"""


def config(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(TEXT + text)
    return file


def test_what_is_read_from_the_source_is_what_is_registered() -> None:
    found = declared_facts("metrics", "METRICS")
    assert set(found) == {name for name in METRICS if METRICS[name].function.__module__.startswith("metrics.")}
    for name, facts in found.items():
        for key in ("licence", "weights", "program"):
            assert facts.get(key) == METRICS[name].facts.get(key), f"{name}: {key} is no literal in the decorator"
        assert facts["licence"], name


def test_every_file_that_a_metric_needs_is_listed() -> None:
    assert set(assets_of(declared_facts("metrics", "METRICS"))) <= set(assets.read())
    assert assets_of(["dists", "psnr", "lpips"]) == ["vgg16", "dists", "alexnet"]
    assert plan.users_of("vgg16") == ["dists"]


def test_other_licences_are_left_out_and_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config(tmp_path, "metrics: [lpips, dists, ewarp_dis, dover]\n")
    said: list[str] = []
    resolved = resolve([file], {}, said.append)
    assert resolved.metrics == ("lpips", "ewarp_dis")
    line = "licenses: permissive leaves out dists (PolyForm-Noncommercial-1.0.0), dover (LicenseRef-S-Lab-1.0)"
    assert said == [line]
    again = tmp_path / "again.json"
    again.write_text(plan.to_json(resolved))
    assert resolve([again], {}, said.append).metrics == resolved.metrics and said == [line]  # a job reads the filtered list
    assert resolve([file], {"licenses": "any"}).metrics == ("lpips", "dists", "ewarp_dis", "dover")
    whole = Plan(resolved)
    whole.remarks = [line]
    whole.print_remarks()
    assert capsys.readouterr().err == line + "\n"


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"licenses: permissive leaves no metric: dists \(PolyForm-Noncommercial-1.0.0\); name others in metrics"
    ):
        resolve([config(tmp_path, "metrics: [dists]\n")], {})


def test_permissive_is_a_short_list_of_names_that_need_no_reading() -> None:
    assert "MIT" in PERMISSIVE and not [
        name for name in PERMISSIVE if "NC" in name or "oncommercial" in name or name.startswith(("GPL", "LicenseRef"))
    ]


def test_files_of_the_configured_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVSR_ASSETS", str(tmp_path / "here"))
    run = Plan(resolve([config(tmp_path, "metrics: [lpips, ewarp_dis]\n")], {}))
    assert run.assets() == [str(tmp_path / "here" / "alexnet-owt-7be5be79.pth")] and run.assets_here() == []
    monkeypatch.chdir(tmp_path)
    assert run.assets() == ["here/alexnet-owt-7be5be79.pth"]
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "alexnet-owt-7be5be79.pth").write_bytes(b"")
    assert run.assets_here() == ["alexnet-owt-7be5be79.pth"]


def test_the_command_of_vsreval_reaches_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metrics import _vsreval

    monkeypatch.setattr(_vsreval.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("QVSR_VSREVAL", "of the shell")
    plan.export(resolve([config(tmp_path, "")], {}))
    assert _vsreval.command() == ["of", "the", "shell"]  # the default does not hide it
    plan.export(resolve([config(tmp_path, "vsreval: {command: \"uvx --from 'a b' vsreval\"}\n")], {}))
    assert _vsreval.command() == ["uvx", "--from", "a b", "vsreval"]
    monkeypatch.delenv("QVSR_VSREVAL")
    assert _vsreval.command() == ["vsreval"]
