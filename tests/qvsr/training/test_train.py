"""The whole training of a tiny model: it ends in weights that load, and an interrupted one ends in the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qvsr import config
from qvsr.config import (
    AutoencoderSettings,
    BackboneSettings,
    ScheduleSettings,
    StructureSettings,
    TrainingSettings,
    TrainingStage,
    UNetSettings,
)
from qvsr.models.checkpoints import load_backbone
from qvsr.provenance import ROOT
from qvsr.stages import train as stage
from qvsr.training import train as training
from qvsr.training.clips import TrainingClips, prepare

VAE = AutoencoderSettings(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=8, embed_dim=8, linear_shortcut=True)
STAGE = TrainingStage(steps=2, batch=2, log_every=1, save_every=1)
SETTINGS = TrainingSettings(clips=4, held_out=2, size=64, device="cpu", sampled=2, autoencoder=STAGE, diffusion=STAGE, decoder=STAGE)


def backbone(folder: Path) -> BackboneSettings:
    return BackboneSettings(
        name="tiny",
        weights=folder / "weights.safetensors",
        vae_weights=folder / "vae.safetensors",
        unet=UNetSettings(
            in_channels=16,
            out_channels=8,
            model_channels=32,
            channel_mult=(1, 1),
            num_res_blocks=1,
            attention_resolutions=(),
            num_head_channels=16,
            context_dim=8,
            semb_channels=32,
            spade_channels=8,
        ),
        structure=StructureSettings(
            in_channels=8, model_channels=32, out_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=()
        ),
        first_stage=VAE,
        vae=VAE,
        schedule=ScheduleSettings(parameterization="v"),
        scale_factor=1.0,
        share_encoder=True,
        concat_lq=True,
        context_tokens=2,
    )


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(32):
        small = rng.integers(0, 255, (12, 18, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i:02d}.png"), cv2.resize(small, (180, 120), interpolation=cv2.INTER_CUBIC))
    return folder


def test_interrupted_training_ends_in_the_same_weights(photographs: Path, tmp_path: Path) -> None:
    whole, parts = backbone(tmp_path / "whole"), backbone(tmp_path / "parts")
    assert training.train(whole, SETTINGS, photographs, tmp_path / "whole")
    calls = 0
    while not training.train(parts, SETTINGS, photographs, tmp_path / "parts", seconds=0):
        calls += 1
        assert calls < 20, "no call made progress"
    assert calls == 3, "each of the three stages of two steps stops once after its first"
    for a, b in ((whole.weights, parts.weights), (whole.vae_weights, parts.vae_weights)):
        first, second = load_file(a), load_file(b)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    loaded = load_backbone(whole)
    assert loaded.context.shape == (1, 2, 8)
    report = json.loads((tmp_path / "whole" / "evaluation.json").read_text())
    assert report == json.loads((tmp_path / "parts" / "evaluation.json").read_text())
    assert len(report["levels"]) == 20
    assert report["bicubic_psnr"] > 10


def test_states_of_another_training_are_refused(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished stage is not trained again: with other settings its weights would pass for theirs."""
    begun = SETTINGS.model_copy(update={"clips": 2})
    assert not training.train(backbone(tmp_path), begun, photographs, tmp_path / "state", seconds=0)
    longer = begun.model_copy(update={"autoencoder": STAGE.model_copy(update={"steps": 3})})
    with pytest.raises(ValueError, match=r"state holds a training with another training.autoencoder; remove the folder, or give another"):
        training.train(backbone(tmp_path), longer, photographs, tmp_path / "state", seconds=0)
    more = Path(shutil.copytree(photographs, tmp_path / "more"))
    cv2.imwrite(str(more / "another.png"), np.zeros((120, 180, 3), np.uint8))
    with pytest.raises(ValueError, match=r"another clips.photographs"):
        training.train(backbone(tmp_path), begun, more, tmp_path / "state", seconds=0)
    with monkeypatch.context() as edited, pytest.raises(ValueError, match=r"another code.digest"):
        edited.setattr(training, "code_digest", lambda *_: "edited")
        training.train(backbone(tmp_path), begun, photographs, tmp_path / "state", seconds=0)
    assert not training.train(backbone(tmp_path / "elsewhere"), begun, photographs, tmp_path / "state", seconds=0), "it goes on"


def test_photographs_of_ones_own_are_collected_again(photographs: Path, tmp_path: Path) -> None:
    """Somebody who is told that there are too few adds some, and calls again."""
    own = tmp_path / "own"
    own.mkdir()
    settings = config.load(ROOT / "config" / "default.yaml", {"training": {"photographs": str(own), "clips": 2, "held_out": 2, "size": 64}})
    picture = cv2.resize(cv2.imread(str(photographs / "00.png")), (390, 260))
    collected = tmp_path / "state" / "photographs"
    for count in (1, 2):
        cv2.imwrite(str(own / f"{count}.png"), picture)
        with pytest.raises(ValueError, match=f"photographs holds {count} photographs; at least 32 are needed"):
            stage.run(settings, tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "state", None)
        assert len(list(collected.glob("*.jpg"))) == count
    (own / "1.png").unlink()
    with pytest.raises(ValueError, match="holds 1 photographs"):
        stage.run(settings, tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "state", None)


def test_clips_are_made_once_and_held_out_photographs_stay_out(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = TrainingClips(photographs, tmp_path, SETTINGS, torch.device("cpu"))
    gt, up = clips.frames([0, 5])
    assert gt.shape == up.shape == (2, 5, 3, 64, 64)
    assert gt.min() >= -1 and gt.max() <= 1
    stamp = (tmp_path / "clips.gt.npy").stat().st_mtime_ns
    prepare(photographs, tmp_path, SETTINGS)
    assert (tmp_path / "clips.gt.npy").stat().st_mtime_ns == stamp
    prepare(photographs, tmp_path, SETTINGS.model_copy(update={"seed": 8}))
    assert (tmp_path / "clips.gt.npy").stat().st_mtime_ns != stamp


def test_too_few_photographs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 0 photographs; at least 32 are needed"):
        prepare(tmp_path, tmp_path / "state", SETTINGS)
