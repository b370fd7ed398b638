"""Weights come back as they were saved, and those of another configuration are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvsr.config import AutoencoderSettings, BackboneSettings, StructureSettings, UNetSettings
from qvsr.models.checkpoints import CheckpointError, build, load_backbone, save_backbone

VAE = AutoencoderSettings(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)


def tiny(folder: Path, share: bool = False, channels: int = 32) -> BackboneSettings:
    return BackboneSettings(
        name="tiny",
        weights=folder / "weights.safetensors",
        vae_weights=folder / "vae.safetensors",
        unet=UNetSettings(
            model_channels=channels,
            channel_mult=(1, 1),
            num_res_blocks=1,
            attention_resolutions=(2,),
            num_head_channels=16,
            context_dim=8,
            semb_channels=32,
        ),
        structure=StructureSettings(model_channels=32, out_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(2,)),
        first_stage=VAE,
        vae=VAE,
        context_tokens=3,
        share_encoder=share,
    )


@pytest.fixture
def saved(tmp_path: Path) -> BackboneSettings:
    settings = tiny(tmp_path)
    torch.manual_seed(0)
    save_backbone(build(settings), settings.weights, settings.vae_weights, torch.float32)
    return settings


@pytest.mark.parametrize("share", [False, True])
def test_round_trip(tmp_path: Path, share: bool) -> None:
    settings = tiny(tmp_path, share)
    torch.manual_seed(1)
    original = build(settings)
    save_backbone(original, settings.weights, settings.vae_weights, torch.float32)
    loaded = load_backbone(settings)
    for name in ("unet", "structure", "vae"):
        for key, value in getattr(original, name).state_dict().items():
            assert torch.equal(getattr(loaded, name).state_dict()[key], value), f"{name}.{key}"
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.first_stage.encode(x)[0].mean, original.first_stage.encode(x)[0].mean)
    assert (loaded.first_stage is loaded.vae) == share
    assert loaded.digest == load_backbone(settings).digest


def test_half_precision_widens(tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    save_backbone(build(settings), settings.weights, settings.vae_weights, torch.float16)
    assert next(load_backbone(settings).unet.parameters()).dtype == torch.float32


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights .*weights\.safetensors; set backbone\.weights"):
        load_backbone(tiny(tmp_path))


def test_damaged_file(saved: BackboneSettings) -> None:
    content = saved.weights.read_bytes()
    saved.weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is damaged"):
        load_backbone(saved)


def test_other_width_is_refused(saved: BackboneSettings) -> None:
    other = tiny(saved.weights.parent, channels=64)
    with pytest.raises(
        CheckpointError, match=r"of another configuration: model\.diffusion_model\..* is \(.*\), expected \(.*\); check backbone"
    ):
        load_backbone(other)


def test_missing_and_extra_keys_are_named(saved: BackboneSettings) -> None:
    tensors = load_file(saved.weights)
    gone = "model.diffusion_model.middle_block.1.temporal_alpha"
    save_file({key: value for key, value in tensors.items() if key != gone}, saved.weights)
    with pytest.raises(CheckpointError, match=f"misses 1 keys, first {gone}"):
        load_backbone(saved)
    save_file(tensors | {"model.diffusion_model.surplus": torch.zeros(1)}, saved.weights)
    with pytest.raises(CheckpointError, match=r"1 keys too many, first model\.diffusion_model\.surplus"):
        load_backbone(saved)


def test_not_finite_is_refused(saved: BackboneSettings) -> None:
    tensors = load_file(saved.weights)
    tensors["structcond_stage_model.time_embed.0.bias"][0] = float("nan")
    save_file(tensors, saved.weights)
    with pytest.raises(CheckpointError, match=r"structcond_stage_model\.time_embed\.0\.bias holds values that are not finite"):
        load_backbone(saved)
