"""U-Net, structure encoder and autoencoders against the reference implementation's outputs."""

from __future__ import annotations

import re

import pytest
import torch
from golden import assert_close, load, load_json_gz, matching, settings_from, under

from qvsr.config import AutoencoderSettings, StructureSettings, UNetSettings
from qvsr.models.autoencoder import AutoencoderKL, VideoAutoencoder
from qvsr.models.structure import StructureEncoder
from qvsr.models.unet import InflatedUNet

FRAME = re.compile(r"(\w+)_frame_(\d+)\.(\d+)")  # one frame of an output that has several parts: its number, the part


def build(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    network.load_state_dict(weights, strict=True)
    return network.eval()


def stored(rows: torch.Tensor, meta: dict, name: str) -> torch.Tensor:
    """The rows (and channels) of an output that the set holds."""
    frames, channels = (
        facts.get(name) if isinstance(facts := meta.get(key), dict) else facts for key in ("frames_stored", "channels_stored")
    )
    return (rows if frames is None else rows[frames])[:, :channels]


@pytest.mark.parametrize("name", ["unet", "unet_wide"])
def test_unet(name: str) -> None:
    meta, tensors = load(name)
    unet = build(InflatedUNet(settings_from(UNetSettings, meta["unet_config"])), under(tensors, "unet."))
    structure = None
    if "struct_config" in meta:
        structure = build(StructureEncoder(settings_from(StructureSettings, meta["struct_config"])), under(tensors, "struct."))
    assert len(meta["cases"]) == len(matching(tensors, r"case(\d+)\.out"))
    for i in range(len(meta["cases"])):
        case = under(tensors, f"case{i}.")
        with torch.no_grad():
            struct = under(case, "struct_cond.") or structure(case["latent"], case["timesteps"])
            out = unet(case["x"], case["timesteps"], case["context"], struct)
        assert_close(stored(out, meta, "out"), case["out"], meta, f"{name} case {i}")
        for key, expected in case.items():
            if match := FRAME.fullmatch(key):
                assert_close(struct[match[3]][[int(match[2])]], expected, meta, f"{name} case {i} {key}")


def test_structure_encoder() -> None:
    meta, tensors = load("struct_wide")
    structure = build(StructureEncoder(settings_from(StructureSettings, meta["struct_config"])), under(tensors, "struct."))
    assert len(meta["cases"]) == len(matching(tensors, r"case(\d+)\.latent"))
    for i, facts in enumerate(meta["cases"]):
        case = under(tensors, f"case{i}.")
        with torch.no_grad():
            maps = structure(case["latent"], case["timesteps"])
        assert {key: list(value.shape) for key, value in maps.items()} == facts["struct_keys"]
        for (width,), expected in matching(case, r"struct_cond_frames\.(\d+)").items():
            assert_close(stored(maps[width], meta, "struct_cond_frames"), expected, meta, f"case {i} width {width}")


@pytest.mark.parametrize("name", ["vae", "vae_two_clips"])
def test_video_autoencoder(name: str) -> None:
    meta, tensors = load(name)
    settings = settings_from(AutoencoderSettings, meta["ddconfig"], embed_dim=meta["embed_dim"], fusion_w=meta["fusion_w"])
    vae = build(VideoAutoencoder(settings), under(tensors, "w."))
    with torch.no_grad():
        posterior, features = vae.encode(tensors["x"])
        results = {"mean": posterior.mean, "logvar": posterior.logvar, "sample": posterior.sample(tensors["eps"])}
        for key in tensors:
            if key == "dec" or key == "dec_frames":
                results[key] = stored(vae.decode(tensors["z"], features), meta, key)
            if key.startswith("dec_fusion_w_"):
                results[key] = vae.decode(tensors["z"], features, fusion_w=float(key.removeprefix("dec_fusion_w_")))
            if match := FRAME.fullmatch(key):
                results[key] = features[int(match[3])][[int(match[2])]]
        for i, feature in enumerate(features):
            results[f"enc_fea_frames.{i}"] = stored(feature, meta, "enc_fea_frames")
    expected = {key: value for key, value in tensors.items() if not key.startswith("w.") and key not in ("x", "eps", "z")}
    assert expected, "the set holds no outputs"
    for key, value in expected.items():
        assert_close(results[key], value, meta, f"{name} {key}")


def on_meta(network: type[torch.nn.Module], settings: object) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {key: list(value.shape) for key, value in network(settings).state_dict().items()}


def test_full_size_keys_and_shapes() -> None:
    """The default settings are the published model: every key and shape of its checkpoints, none more."""
    published = load_json_gz("mgld_state_dict")
    ours = {
        "model.diffusion_model.": on_meta(InflatedUNet, UNetSettings()),
        "structcond_stage_model.": on_meta(StructureEncoder, StructureSettings()),
        "first_stage_model.": on_meta(AutoencoderKL, AutoencoderSettings()),
    }
    for prefix, keys in ours.items():
        assert keys == {key: list(shape) for key, shape in under(published, prefix).items()}, prefix
    vae = {key: list(shape) for key, shape in load_json_gz("vae_state_dict").items()}
    assert on_meta(VideoAutoencoder, AutoencoderSettings()) == {key.removeprefix("first_stage_model."): shape for key, shape in vae.items()}
