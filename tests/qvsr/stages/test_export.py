"""What an export writes, what its card says, and which rows and places it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qvsr import results
from qvsr.config import Config
from qvsr.models.checkpoints import load_backbone
from qvsr.plan import resolve
from qvsr.provenance import ROOT
from qvsr.quant import exported
from qvsr.results import Row
from qvsr.stages import export as stage
from qvsr.stages.export import ExportError
from tests.exporting import configured, quantized


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = configured(folder)
    quantized(config, folder / "q.safetensors", rank=3)
    return config


@pytest.fixture
def checkpoint(config: Config) -> Path:
    return Path(str(config.backbone.weights)).with_name("q.safetensors")


def row(method: str, clip: str, value: float, **changes: object) -> Row:
    bits = "W4A4" if method == "maxmin" else "W32A32"
    fields = {"backbone": "tiny", "bits": bits, "seed": 42, "dataset": "real", "metric": "psnr", "frames": 3, "signature": "psnr|a"}
    return Row(**{**fields, "method": method, "clip": clip, "value": value, **changes})  # type: ignore[arg-type]


def test_a_file_and_its_card(tmp_path: Path, config: Config, checkpoint: Path) -> None:
    rows = [row("maxmin", "a", 24.0), row("maxmin", "b", 26.0), row("bicubic", "a", 22.0), row("bicubic", "b", 23.0)]
    results.write(tmp_path / "m.jsonl", [*rows, row("maxmin", "a", 1.0, backbone="other"), row("quantvsr", "a", 2.0, bits="W4A4")])
    file = stage.run(config, checkpoint, tmp_path / "small.safetensors", [tmp_path / "m.jsonl"], licence="CC0-1.0")
    assert file == tmp_path / "small.safetensors"
    card = (tmp_path / "small.md").read_text()
    header = exported.read_header(file)
    for line in (
        "# tiny, maxmin W4A4",
        f"`small.safetensors`, {file.stat().st_size / 1e6:.1f} MB,",
        "| bits | W4A4: weights 4, activations 4 |",
        "| low-rank branch | ranks 3 to 3, mean 3.0; float32, the checkpoint's own numbers, compressed without loss |",
        "| licence | CC0-1.0 |",
        "| real | psnr ↑ | maxmin W4A4 | simulated | 25",
        "| real | psnr ↑ | bicubic W32A32 | simulated | 22.5",
        header["digest"],
    ):
        assert line in card, line
    assert "quantvsr" not in card and str(tmp_path) not in card
    unet = 4 * sum(one.numel() for one in load_backbone(config.backbone).unet.parameters())
    assert f"| U-Net | {exported.unet_bytes(file) / 1e6:.1f} MB, in float32 {unet / 1e6:.1f} MB: " in card


def test_a_folder_with_half_branches_says_so(tmp_path: Path, config: Config, checkpoint: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("stays")
    assert stage.run(config, checkpoint, tmp_path / "out", branch="half") == tmp_path / "out" / "model.safetensors"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["README.md", "mine.txt", "model.safetensors"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "float16, which changes it by 0.0002" in card and "results are not byte for byte the checkpoint's" in card
    assert "Nothing: `python -m qvsr export --measured FILE.jsonl`" in card and "| licence | that of the backbone's weights |" in card


def test_rows_of_another_model_and_places_are_refused(tmp_path: Path, config: Config, checkpoint: Path) -> None:
    results.write(tmp_path / "m.jsonl", [row("bicubic", "a", 22.0)])
    with pytest.raises(ExportError, match=r"m.jsonl: no row of tiny maxmin W4A4; found tiny bicubic W32A32: give its measure file"):
        stage.run(config, checkpoint, tmp_path / "out", [tmp_path / "m.jsonl"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"file is a file: give a folder, or a name that ends in .safetensors"):
        stage.run(config, checkpoint, tmp_path / "file")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "m.jsonl"]


def test_the_licence_is_that_of_the_official_weights() -> None:
    assert stage.official_licence(resolve([ROOT / "config" / "paper.yaml"], {})) == "LicenseRef-S-Lab-1.0 (of the weights mgldvsr-unet)"


def test_sizes_without_weights() -> None:
    text = stage.sizes(
        resolve([ROOT / "config" / "paper.yaml"], {"methods": ["maxmin", "quantvsr"], "bits": ["W4A4"]}), rank=24
    ).splitlines()
    assert text[0] == "U-Net of mgld in float32: 3741.3 MB. In an exported file:"
    assert re.fullmatch(r"maxmin W4A4: 47\d\.\d MB \(87\.\d\d % less\)", text[1])
    assert text[2].startswith("quantvsr W4A4, rank 24: at most 577.2 MB (84.57 % less), with --branch half 533.6 MB")


def test_the_command_wants_a_checkpoint_and_a_place() -> None:
    done = subprocess.run([sys.executable, "-m", "qvsr", "export"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: export needs --checkpoint, the file that quantize wrote, and --out; or --sizes\n")
