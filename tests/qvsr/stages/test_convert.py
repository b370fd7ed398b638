"""``python -m qvsr convert``: from the settings to the two weight files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qvsr import config as settings
from qvsr.config import Config, ConfigError
from qvsr.data import assets
from qvsr.models.checkpoints import load_backbone
from qvsr.models.convert import official_keys, random_checkpoint, vae_keys
from qvsr.stages import convert as stage
from tests.workflow import tiny

BACKBONE = {**tiny.BACKBONE, "unet": {**tiny.BACKBONE["unet"], "context_dim": 64}}  # a text tower's head is 64 wide


def resolved(tmp_path: Path, **official: Any) -> Config:
    backbone = BACKBONE | {"weights": str(tmp_path / "out" / "a.safetensors"), "vae_weights": str(tmp_path / "out" / "b.safetensors")}
    return settings.validate({**tiny.CONFIG, "backbone": backbone, "official": official}, "test")


def test_an_asset_and_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVSR_ASSETS", str(tmp_path))
    config = resolved(tmp_path, weights="official-unet", vae_weights=str(tmp_path / "vae.ckpt"), precision="single")
    random_checkpoint(tmp_path / "unet.ckpt", official_keys(config.backbone, text_layers=2))
    random_checkpoint(tmp_path / "vae.ckpt", vae_keys(config.backbone))
    right = assets.digest(tmp_path / "unet.ckpt")
    for digest, words in (("0" * 64, r"unet.ckpt is damaged \(its SHA-256 begins with"), (right, "")):
        listed = assets.Asset(file="unet.ckpt", sha256=digest, page="here", licence="MIT", use="a test")
        monkeypatch.setattr(assets, "read", lambda listed=listed: {"official-unet": listed})
        if words:
            with pytest.raises(assets.AssetError, match=words):
                stage.run(config)
            assert not (tmp_path / "out").exists()
        else:
            stage.run(config)
    loaded = load_backbone(config.backbone)
    state = torch.load(tmp_path / "unet.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(loaded.unet.state_dict()["out.2.weight"], state["model.diffusion_model.out.2.weight"].float())
    assert loaded.context.shape == (1, 3, 64)


def test_nothing_to_convert(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"official.weights and official.vae_weights are not both set: name the official checkpoints"):
        stage.run(resolved(tmp_path))
