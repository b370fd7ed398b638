"""What the rehearsal serves is what the workflow builds from, its cut is one of the paper's settings, and its checks find what is missing."""

from __future__ import annotations

import runpy
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from qvsr.data import assets
from qvsr.data.build import build
from qvsr.data.published import PUBLISHED
from qvsr.plan import Plan, resolve
from qvsr.provenance import ROOT

REHEARSAL = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "rehearsal.py")))


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """The settings' file beside config/paper.yaml."""
    file = tmp_path / "cut.yaml"
    file.write_text(yaml.safe_dump(REHEARSAL.CUT))
    return file


def test_the_archives_are_those_that_the_settings_name(cut: Path) -> None:
    run = Plan(resolve([ROOT / "config" / "paper.yaml", cut], {}))
    needed = {
        asset.file
        for dataset in run.used()
        for path in run.archives(dataset)
        for asset in assets.read().values()
        if asset.unpack == Path(path).name
    }
    assert needed == set(REHEARSAL.ARCHIVES) and REHEARSAL.BY_HAND in needed
    assert run.config.backbone.unet.model_channels == 320 and set(run.config.methods) == {method for method, _ in run.quantized()}


@pytest.mark.parametrize("dataset", ["reds4", "spmcs", "mvsr4x", "reds30"])
def test_sets_are_built_from_its_archives(dataset: str, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = PUBLISHED[dataset]
    small = replace(facts, count=len(facts.clips[:4]) or 2, clips=facts.clips[:4], size=facts.size and (192, 128))
    monkeypatch.setitem(PUBLISHED, dataset, small)
    sources = []
    for name, (kind, place, parts) in REHEARSAL.ARCHIVES.items():
        if kind == dataset:
            REHEARSAL.archive(tmp_path / name, kind, place, parts)
            with zipfile.ZipFile(tmp_path / name) as packed:
                packed.extractall(tmp_path / name.removesuffix(".zip"))
            sources.append(tmp_path / name.removesuffix(".zip"))
    config = resolve([ROOT / "config" / "paper.yaml", cut], {"datasets": {dataset: {"path": str(tmp_path / "built")}}})
    report = build(config, dataset, *sources, say=lambda line: None)
    assert (report.clips, report.errors) == (1, [])
    assert Plan(config).clips(dataset) == [next(iter(facts.clips), "clip_00")]


def test_a_missing_row_and_another_model_are_named(tmp_path: Path) -> None:
    tables = tmp_path / "results" / "paper" / "tables"
    tables.mkdir(parents=True)
    (tables / "cost.csv").write_text("method,params_m\nfull_precision,935.4\n")
    rows = [("reds4", "maxmin", "W4A4", "psnr_fp", "20.0"), ("spmcs", "maxmin", "W4A4", "psnr_fp", "")]
    lines = ["dataset,method,bits,metric,value", *(",".join(row) for row in rows)]
    (tables / "metrics.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "resources").mkdir()
    (tmp_path / "resources" / ".partial-1-REDS4").mkdir()
    faults = REHEARSAL.check(tmp_path)
    assert "metrics.csv has no psnr_fp of spmcs maxmin W4A4" in faults and "metrics.csv has no psnr_fp of reds4 maxmin W4A4" not in faults
    assert len([fault for fault in faults if fault.startswith("metrics.csv")]) == 3 * 6 - 1
    assert "cost.csv: full precision has 935.4 million parameters, the published model has 935.321" in faults
    assert any(fault.endswith(".partial-1-REDS4 is left over") for fault in faults)
