"""The keys that the converter expects against the key maps of the published checkpoints."""

from __future__ import annotations

from golden import load_json_gz, under

from qvsr.config import BackboneSettings
from qvsr.models.checkpoints import UNET
from qvsr.models.convert import UNKNOWN, _left_out, official_keys, vae_keys


def published(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in load_json_gz(name).items()}


def test_keys_of_the_diffusion_checkpoint() -> None:
    expected = published("mgld_state_dict")
    flow = {key for key in expected if key.startswith("flownet_model.")}
    assert official_keys(BackboneSettings()) == {key: shape for key, shape in expected.items() if key not in flow}
    assert len(flow) == 179


def test_keys_of_the_video_autoencoder() -> None:
    assert vae_keys(BackboneSettings()) == published("vae_state_dict")


def test_every_key_belongs_to_a_part() -> None:
    parts = {part: len(keys) for part, keys in _left_out(published("mgld_state_dict")).items() if part != "image autoencoder"}
    # 876 + 200 keys are kept and have no other part; counts of the rest from the table of networks
    assert parts == {"flow network": 179, "image decoder": 140, "schedule": 12, "text tower": 294, UNKNOWN: 876 + 200}


def test_names_without_dots_stay_different() -> None:
    names = [key.replace(".", "") for key in under(load_json_gz("mgld_state_dict"), UNET)]
    assert len(set(names)) == len(names) == 876
