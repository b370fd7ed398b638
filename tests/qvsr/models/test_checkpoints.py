"""Weights come back as they were saved, and those of another configuration are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qvsr.config import AutoencoderSettings, BackboneSettings, StructureSettings, UNetSettings
from qvsr.models.checkpoints import CONTEXT, CheckpointError, build, load_backbone, save_backbone, write_tensors

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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what a process has mapped")
@pytest.mark.parametrize(("dtype", "mapped"), [(torch.float32, True), (torch.float16, False), (torch.bfloat16, False)])
def test_a_file_counts_once_in_memory(tmp_path: Path, dtype: torch.dtype, mapped: bool) -> None:
    """float32 is the file itself; of narrower weights nothing stays beside the widened ones."""
    settings = tiny(tmp_path)
    save_backbone(build(settings), settings.weights, settings.vae_weights, dtype)
    loaded = load_backbone(settings)
    assert loaded.unet.state_dict()["out.2.weight"].dtype == torch.float32
    assert (str(settings.weights) in Path("/proc/self/maps").read_text()) == mapped


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


def test_no_context(saved: BackboneSettings) -> None:
    save_file({key: value for key, value in load_file(saved.weights).items() if key != CONTEXT}, saved.weights)
    with pytest.raises(CheckpointError, match=r"has no key 'context': `python -m qvsr convert` computes the text context once"):
        load_backbone(saved)


def test_tensors_are_written_one_by_one(tmp_path: Path) -> None:
    """What the library reads back, types mixed and lengths odd; a tensor that is not as announced is an error."""
    file = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 5, 1).half(), "c": torch.tensor(2.5), "d": torch.randn(7).bfloat16()}
    tensors["e"] = torch.randn(4, 6).T
    layout = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
    write_tensors(file, layout, tensors.__getitem__, {"of": "a test"})
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for key, value in tensors.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "of": "a test"}
    with pytest.raises(CheckpointError, match=r"x\.safetensors: a is \(2,\) torch.float32, announced was \(\(3,\), torch.float32\)"):
        write_tensors(file, layout, lambda key: torch.zeros(2) if key == "a" else tensors[key])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_refused(saved: BackboneSettings, value: float) -> None:
    tensors = load_file(saved.weights)
    tensors["structcond_stage_model.time_embed.0.bias"][1] = value
    save_file(tensors, saved.weights)
    with pytest.raises(CheckpointError, match=r"structcond_stage_model\.time_embed\.0\.bias holds values that are not finite"):
        load_backbone(saved)
