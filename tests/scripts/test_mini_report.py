"""The report about the small model: on a tiny one with random weights, and on what is committed."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qvsr.config import BackboneSettings
from qvsr.models.checkpoints import build
from qvsr.provenance import ROOT
from tests.workflow import tiny

SCRIPT = ROOT / "scripts" / "mini_report.py"
NAMES = runpy.run_path(str(SCRIPT), run_name="mini_report")
FACTS = ["psnr", "ssim", "gmsd", "ssim_gradient", "ewarp_dis", "gradient_energy"]


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project and two reports about it."""
    folder = tmp_path_factory.mktemp("report")
    tiny.write_frames(folder / "videos" / "clips" / "walk", seed=1)
    tiny.write_frames(folder / "videos" / "calibration" / "run", seed=2)
    tiny.write_weights(folder, tiny.BACKBONE)
    tiny.write_config(folder / "tiny.yaml", tiny.CONFIG)
    for stage, columns in (("autoencoder", "step,loss,psnr"), ("diffusion", "step,loss"), ("decoder", "step,loss,psnr")):
        width = columns.count(",") + 1
        rows = [",".join(str(step + 1 + column) for column in range(width)) for step in range(8)]
        (folder / f"{stage}.csv").write_text("\n".join([columns, *rows]) + "\n")
    for out in ("one", "two"):
        printed = run(folder, str(SCRIPT), "--config", "tiny.yaml", "--curves", ".", "--out", out)
    (folder / "printed.txt").write_text(printed)
    return folder


def test_two_reports_are_the_same_bytes(project: Path) -> None:
    names = {file.name for file in (project / "one").iterdir()}
    assert names == {"curves.png", "activations.png", "activations.csv", "ablation.csv"}
    for name in names:
        assert (project / "one" / name).read_bytes() == (project / "two" / name).read_bytes(), name


def test_times_are_printed_and_not_kept(project: Path) -> None:
    assert "time / full" in (project / "printed.txt").read_text()
    table = pd.read_csv(project / "one" / "ablation.csv")
    assert list(table) == ["row", *FACTS, "psnr_change", "change_low", "change_high"]


def test_every_change_changes_the_output(project: Path) -> None:
    table = pd.read_csv(project / "one" / "ablation.csv").set_index("row")[FACTS]
    assert list(table.index) == [
        "ground truth",
        "bicubic",
        "autoencoder alone",
        "full model",
        "motion guidance off",
        "motion guidance as released",
        "temporal layers of the U-Net off",
        "temporal layers of the decoder off",
        "feature fusion off",
        "structure maps zero",
        "LQ latent zero",
        "1 step",
        "5 steps",
        "20 steps",
        "50 steps",
    ]
    full = table.loc["full model"]
    same = [row for row, values in table.iterrows() if (values == full).all()]
    assert same == ["full model", "motion guidance as released"]  # the tiny settings have the released guidance
    assert table.loc["ground truth"].drop("ewarp_dis").tolist() == [np.inf, 1, 0, 1, 1]


def test_the_full_model_is_what_the_workflow_restores(project: Path) -> None:
    from PIL import Image

    run(
        project,
        "-m",
        "qvsr",
        "clips",
        "--config",
        "tiny.yaml",
        "--dataset",
        "clips",
        "--clip",
        "walk",
        "--gt",
        "GT/walk",
        "--lq",
        "LQ/walk",
    )
    (project / "clips").mkdir()  # the noise is keyed by dataset/clip, read from the path
    (project / "LQ").rename(project / "clips" / "LQ")
    command = ("restore", "--config", "tiny.yaml", "--method", "full_precision", "--bits", "W32A32", "--lq", "clips/LQ/walk", "--out", "sr")
    run(project, "-m", "qvsr", *command)

    def frames(folder: str) -> np.ndarray:
        return np.stack([np.asarray(Image.open(file), float) for file in sorted((project / folder).glob("*.png"))])

    psnr = 10 * np.log10(255**2 / np.square(frames("sr") - frames("GT/walk")).mean((1, 2, 3)))
    table = pd.read_csv(project / "one" / "ablation.csv").set_index("row")
    assert table.loc["full model", "psnr"] == pytest.approx(psnr.mean(), rel=1e-5)  # the table has 6 digits


def test_every_layer_has_its_input_and_weight(project: Path) -> None:
    table = pd.read_csv(project / "one" / "activations.csv")
    assert list(table) == ["layer", "kind", "tensor", *NAMES["FACTS"]]
    assert set(table["kind"]) == set(NAMES["KINDS"])
    assert (table.groupby("layer")["tensor"].apply(list).map(tuple) == ("input", "weight")).all()
    unet = build(BackboneSettings.model_validate(tiny.BACKBONE)).unet
    layers = [
        name for name, layer in unet.named_modules() if "weight" in dict(layer.named_parameters(recurse=False)) and "norm" not in name
    ]
    skipped = ("time_embed.0", "input_blocks.0.0", "out.2")  # the published exclusions
    expected = [
        name for name in layers if name not in skipped and type(unet.get_submodule(name)).__name__ in ("Linear", "Conv2d", "Conv3d")
    ]
    assert list(table["layer"].unique()) == expected


@pytest.mark.parametrize(("shape", "axis"), [((4, 6, 5, 3), 1), ((7, 9, 6), -1)])
def test_facts_of_a_distribution(shape: tuple[int, ...], axis: int) -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    parts = [rng.standard_t(3, shape) * 2 + 1 for _ in range(3)]
    parts[1].flat[5] = 60.0
    distribution = NAMES["Distribution"](axis)
    for look in (distribution.first, distribution.second):
        for part in parts:
            look(torch.from_numpy(part))
    facts = distribution.facts()
    values = np.concatenate([part.ravel() for part in parts])
    channels = np.concatenate([np.moveaxis(part, axis, 0).reshape(6, -1) for part in parts], axis=1)
    ranges = np.ptp(channels, axis=1)
    away = np.abs(values - values.mean()) / values.std()
    expected = [
        stats.kurtosis(values, fisher=False),
        values.min(),
        values.max(),
        values.std(),
        away.max(),
        (away > 6).mean(),
        ranges.max() / np.median(ranges),
    ]
    assert facts["beyond_6_std"] > 0
    assert list(facts.values()) == pytest.approx(expected, rel=1e-9)


def test_constant_values_have_no_kurtosis() -> None:
    distribution = NAMES["Distribution"](1)
    distribution.first(torch.zeros(2, 3))
    distribution.second(torch.zeros(2, 3))
    assert np.isnan(distribution.facts()["kurtosis"])


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    network = build(BackboneSettings.model_validate(tiny.BACKBONE))
    for module in (network.unet, network.structure, network.vae):
        for name, parameter in module.named_parameters():
            if "alpha" in name:
                parameter.fill_(0.5)
            elif not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return network


def call(backbone, x: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    t = torch.tensor([500])
    return backbone.unet(torch.cat([x, lq], dim=1), t, backbone.context, backbone.structure(lq, t))


def test_without_temporal_layers_frames_do_not_see_each_other(backbone) -> None:
    x, lq, other = torch.randn(3, 5, 4, 8, 8)
    features = [torch.randn(5, 32, 16, 16), torch.randn(5, 32, 8, 8)]
    changed = torch.cat([x[:4], other[4:]])
    for switch, network in (
        (lambda: NAMES["temporal_off"](backbone.unet), lambda z: call(backbone, z, lq)),
        (lambda: NAMES["temporal_off"](backbone.vae), lambda z: backbone.vae.decode(z, features)),
    ):
        assert not torch.allclose(network(x)[3], network(changed)[3])
        switch()
        torch.testing.assert_close(network(x)[:4], network(changed)[:4])


def test_without_fusion_the_features_do_not_matter(backbone) -> None:
    z, features = torch.randn(5, 4, 8, 8), [torch.randn(5, 32, 16, 16), torch.randn(5, 32, 8, 8)]
    assert not torch.allclose(backbone.vae.decode(z, features), backbone.vae.decode(z))
    NAMES["fusion_off"](backbone)
    torch.testing.assert_close(backbone.vae.decode(z, features), backbone.vae.decode(z))


def test_without_structure_and_lq_latent_the_lq_frames_do_not_matter(backbone) -> None:
    x, lq, other = torch.randn(3, 5, 4, 8, 8)
    NAMES["lq_latent_off"](backbone)
    assert not torch.allclose(call(backbone, x, lq), call(backbone, x, other))
    NAMES["structure_off"](backbone)
    torch.testing.assert_close(call(backbone, x, lq), call(backbone, x, other))


def between(text: str, mark: str) -> str:
    return text.split(f"<!-- {mark}: begin -->\n")[1].split(f"<!-- {mark}: end -->")[0].strip()


@pytest.mark.parametrize("mark", ["ablation", "activations"])
def test_the_document_shows_the_committed_numbers(mark: str) -> None:
    table = pd.read_csv(ROOT / "docs" / "mini" / f"{mark}.csv")
    assert between((ROOT / "docs" / "mini.md").read_text(), mark) == NAMES[f"{mark}_markdown"](table), "run: python scripts/mini_report.py"


def test_the_committed_table_has_every_row() -> None:
    from qvsr.config import load

    rows = pd.read_csv(ROOT / "docs" / "mini" / "ablation.csv")["row"].tolist()
    assert rows[3:] == [variant.name for variant in NAMES["variants"](load(ROOT / "config" / "default.yaml"))]


def test_the_study_is_a_line_a_method_and_a_column_a_width(tmp_path: Path) -> None:
    rows = [
        f"m,d,{method},{bits},simulated,{metric},{value},0,0,8,80,s"
        for method, bits, value in (("full_precision", "W32A32", 9), ("maxmin", "W8A8", 44.25), ("maxmin", "W4A4", 23.4))
        for metric in ("psnr", "psnr_fp")
    ]
    head = "backbone,dataset,method,bits,execution,metric,value,low,high,clips,frames,signature"
    (tmp_path / "metrics.csv").write_text("\n".join([head, *rows]) + "\n")
    printed = run(tmp_path, str(SCRIPT), "--study", "metrics.csv", "--out", ".")
    assert "| maxmin                | 44.25 / 44.25 | 23.40 / 23.40 |" in printed
    assert "W32A32" not in printed and "full_precision" not in (tmp_path / "quantization.csv").read_text()


def test_the_committed_study_is_the_one_shown() -> None:
    table = pd.read_csv(ROOT / "docs" / "mini" / "quantization.csv")
    assert NAMES["study_markdown"](table) in (ROOT / "docs" / "mini.md").read_text()
