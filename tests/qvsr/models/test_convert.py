"""Official checkpoints become the weights that are loaded; what runs code, is cut short or of another model is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qvsr.config import AutoencoderSettings, BackboneSettings, StructureSettings, UNetSettings
from qvsr.models import convert as module
from qvsr.models.checkpoints import CONTEXT, load_backbone
from qvsr.models.convert import convert, official_keys, random_checkpoint, read_official, vae_keys
from qvsr.models.text import empty_prompt

VAE = AutoencoderSettings(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)
UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"
FORMS = ("zip.ckpt", "zip.pth", "legacy.ckpt", "plain-2.pth", "plain-5.ckpt")


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    return official_keys(tiny(Path()), text_layers=2)


def tiny(folder: Path) -> BackboneSettings:
    return BackboneSettings(
        name="tiny",
        weights=folder / "weights.safetensors",
        vae_weights=folder / "vae.safetensors",
        unet=UNetSettings(
            model_channels=32,
            channel_mult=(1, 1),
            num_res_blocks=1,
            attention_resolutions=(2,),
            num_head_channels=16,
            context_dim=64,
            semb_channels=32,
        ),
        structure=StructureSettings(model_channels=32, out_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(2,)),
        first_stage=VAE,
        vae=VAE,
        context_tokens=4,
    )


def random_state(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


class Case:
    """Official files of a tiny model, their tensors, and where the converted ones go."""

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        self.folder, self.settings = folder, tiny(folder / "out")
        self.source, self.vae_source = folder / "unet.ckpt", folder / "vae.ckpt"
        self.state, self.vae = random_state(shapes, 1), random_state(vae_keys(self.settings), 2)
        self.save()

    def save(self, **more: Any) -> None:
        torch.save({"state_dict": self.state, **more}, self.source)
        torch.save({"state_dict": self.vae}, self.vae_source)

    def run(self, **more: Any) -> list[str]:
        said: list[str] = []
        convert(self.settings, self.source, self.vae_source, say=said.append, **more)
        return said

    def refused(self, **more: Any) -> str:
        """The message, one line; neither of the two files is there."""
        with pytest.raises(ValueError) as caught:
            self.run(**more)
        assert list(self.settings.weights.parent.glob("*")) == []
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def case(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> Case:
    return Case(tmp_path, shapes)


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


# --- what is right ----------------------------------------------------------------------------------------------------


def test_every_tensor_arrives(case: Case) -> None:
    case.state["flownet_model.fnet.conv1.weight"] = torch.zeros(2)
    case.save()
    said = case.run()
    backbone = load_backbone(case.settings)
    for network, prefix, source in (
        (backbone.unet, "model.diffusion_model.", case.state),
        (backbone.structure, "structcond_stage_model.", case.state),
        (backbone.first_stage, "first_stage_model.", case.state),
        (backbone.vae, "", case.vae),
    ):
        loaded = network.state_dict()
        assert loaded, prefix
        for key, value in loaded.items():
            assert torch.equal(value, source[prefix + key]), prefix + key
    tower = {key.removeprefix("cond_stage_model.model."): value for key, value in case.state.items() if key.startswith("cond_stage_model")}
    assert torch.equal(backbone.context, empty_prompt(tower, "here"))
    stored = load_file(case.settings.weights)
    assert not [key for key in stored if key.startswith(("cond_stage", "flownet", "betas", "first_stage_model.decoder"))]
    facts = header(case.settings.weights)
    decoder = [key for key in case.state if key.startswith(("first_stage_model.decoder.", "first_stage_model.post_quant_conv."))]
    assert json.loads(facts["left_out"]) == {"flow network": 1, "image decoder": len(decoder), "schedule": 12, "text tower": len(tower)}
    assert facts["source_sha256"] == hashlib.sha256(case.source.read_bytes()).hexdigest()
    assert facts["source"] == "unet.ckpt" and facts["backbone"] == "tiny" and facts["ema"] == "not used"
    assert said[0].startswith(
        f"unet.ckpt: {len(stored) - 1} tensors kept; left out: flow network 1, image decoder {len(decoder)}, schedule 12,"
    )


@pytest.mark.parametrize("form", ["legacy", "safetensors", "bare", "prefixed"])
def test_other_forms_of_the_files(case: Case, form: str) -> None:
    if form == "legacy":
        torch.save({"state_dict": case.state}, case.source, _use_new_zipfile_serialization=False)
    elif form == "safetensors":
        case.source = case.folder / "unet.safetensors"
        save_file(case.state, case.source)
    elif form == "bare":
        torch.save(case.vae | {"loss.logvar": torch.zeros(1)}, case.vae_source)
    else:
        torch.save({"state_dict": {f"first_stage_model.{key}": value for key, value in case.vae.items()}}, case.vae_source)
    case.run()
    assert torch.equal(load_file(case.settings.weights)[UNET_KEY], case.state[UNET_KEY])
    assert torch.equal(load_file(case.settings.vae_weights)["decoder.conv_in.weight"], case.vae["decoder.conv_in.weight"])


def test_what_a_training_framework_leaves_behind(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callbacks filed under their class and numbers wrapped by numpy are read; their packages are not."""
    framework = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    framework.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": framework.__name__})  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", framework.__name__):
            patched.setitem(sys.modules, name, types.ModuleType(name))
        patched.setitem(sys.modules, framework.__name__, framework)
        case.save(callbacks={framework.ModelCheckpoint: {"best_model_score": np.float64(0.25), "current": {1}}}, epoch=3)
    assert b"ModelCheckpoint" in case.source.read_bytes() and b"multiarray" in case.source.read_bytes()
    case.run()
    assert "pytorch_lightning" not in sys.modules
    assert torch.equal(load_file(case.settings.weights)[UNET_KEY], case.state[UNET_KEY])


@pytest.mark.parametrize(
    ("stored", "precision", "written"),
    [
        (torch.float16, "keep", torch.float16),
        (torch.bfloat16, "keep", torch.bfloat16),
        (torch.float64, "keep", torch.float32),
        (torch.float16, "single", torch.float32),
        (torch.float32, "half", torch.float16),
    ],
)
def test_precision(case: Case, stored: torch.dtype, precision: str, written: torch.dtype) -> None:
    case.state = {key: value.to(stored) for key, value in case.state.items()}
    case.save()
    case.run(precision=precision)
    found = load_file(case.settings.weights)
    assert {value.dtype for key, value in found.items() if key != CONTEXT} == {written}
    assert torch.equal(found[UNET_KEY], case.state[UNET_KEY].to(written))
    assert found[CONTEXT].dtype == torch.float32
    assert load_backbone(case.settings).unet.state_dict()["out.2.weight"].dtype == torch.float32


def test_moving_averages(case: Case) -> None:
    joined = "model_ema.diffusion_modelinput_blocks00weight"
    case.state |= {joined: torch.ones(case.state[UNET_KEY].shape), "model_ema.decay": torch.tensor(0.9)}
    case.save()
    case.run()
    assert torch.equal(load_file(case.settings.weights)[UNET_KEY], case.state[UNET_KEY])
    assert json.loads(header(case.settings.weights)["left_out"])["moving averages"] == 2
    case.run(ema=True)
    found = load_file(case.settings.weights)
    assert torch.equal(found[UNET_KEY], case.state[joined])
    assert torch.equal(found["model.diffusion_model.out.2.weight"], case.state["model.diffusion_model.out.2.weight"])
    assert header(case.settings.weights)["ema"].startswith("1 of ")


def test_text_tower_from_a_file_of_its_own(case: Case) -> None:
    tower = {key: value for key, value in case.state.items() if key.startswith("cond_stage_model.model.")}
    case.state = {key: value for key, value in case.state.items() if key not in tower}
    case.save()
    assert (
        case.refused() == f"{case.source} holds no text tower (cond_stage_model.model.*): name OpenCLIP's ViT-H-14 weights in official.text"
    )
    file = case.folder / "open_clip_pytorch_model.bin"
    own = {key.removeprefix("cond_stage_model.model."): value for key, value in tower.items()}
    torch.save(own | {"visual.proj": torch.zeros(2, 2)}, file)
    case.run(text_tower=file)
    assert torch.equal(load_backbone(case.settings).context, empty_prompt(own, "here"))
    assert header(case.settings.weights)["context"] == "empty prompt, from open_clip_pytorch_model.bin"


def test_unknown_keys_are_listed(case: Case) -> None:
    case.state |= {"lvlb_weights": torch.zeros(3)}
    case.save()
    assert case.run()[1] == "unet.ckpt: 1 keys of no known part are left out: lvlb_weights"
    assert json.loads(header(case.settings.weights)["unknown"]) == ["lvlb_weights"]


# --- what is refused --------------------------------------------------------------------------------------------------


class RunsCode:
    """Unpickled without a guard, it creates a file."""

    def __init__(self, file: Path) -> None:
        self.command = f"touch {file}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def write_pickle(path: Path, content: Any) -> None:
    """In one of FORMS: torch's zip form, its form before 1.6, or a pickle as Python writes it."""
    form = path.stem.partition("-")
    if form[0] == "plain":
        path.write_bytes(pickle.dumps(content, protocol=int(form[2])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form[0] == "zip")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("blind", [False, True], ids=["named", "by torch alone"])
def test_a_pickle_that_runs_code(case: Case, form: str, blind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made, case.source = case.folder / "made", case.folder / form
    state = {} if form.startswith("plain") else case.state  # Python's own pickle of a tensor calls more than is allowed
    write_pickle(case.source, {"state_dict": state, "callbacks": RunsCode(made)})
    if blind:  # the second guard holds alone
        monkeypatch.setattr(module, "_globals", lambda file: iter(()))
        assert case.refused().startswith(f"{case.source} is damaged or no torch checkpoint")
    else:
        called = "posix.system (pickle protocol 4)" if form == "plain-5.ckpt" else "posix.system"
        assert case.refused() == (
            f"{case.source} is refused: its pickle would call {called}, which a checkpoint of weights does not need; "
            "nothing of it was run; use the official file"
        )
    assert not made.exists()


def test_a_name_behind_an_allowed_one(case: Case) -> None:
    """The strings before the lookup are those of an allowed name; what is looked up was put aside earlier."""
    made = case.folder / "made"
    case.source.write_bytes(
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x8c\x0bcollections\x8c\x0bOrderedDict00h\x00h\x01\x93"
        + b"X"
        + len(f"touch {made}").to_bytes(4, "little")
        + f"touch {made}".encode()
        + b"\x85R."
    )
    assert "is refused: its pickle would call collections.OrderedDict (pickle protocol 4)" in case.refused()
    assert not made.exists()
    pickle.loads(case.source.read_bytes())
    assert made.exists(), "it would have run"


def test_that_pickle_would_have_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(RunsCode(tmp_path / "made")))
    assert (tmp_path / "made").exists()


def test_every_refused_name_is_said_and_numpy_arrays_are_none(case: Case) -> None:
    case.save(array=np.zeros(3), folder=Path("x"))
    message = case.refused()
    assert "its pickle would call numpy._core.multiarray._reconstruct, numpy.ndarray, pathlib" in message


@pytest.mark.parametrize("form", ["zip.ckpt", "legacy.ckpt"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_a_truncated_file(case: Case, form: str, share: float) -> None:
    case.source = case.folder / form
    write_pickle(case.source, {"state_dict": case.state})
    whole = case.source.read_bytes()
    case.source.write_bytes(whole[: int(share * len(whole))])
    assert re.match(rf"{re.escape(str(case.source))} is damaged or (cut short|no torch checkpoint) \(.+\); fetch it again$", case.refused())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged or no torch checkpoint"),
        (b"<!DOCTYPE html><html>Sign in", "is damaged or no torch checkpoint"),
        (None, "no checkpoint "),
    ],
)
def test_what_is_no_checkpoint(case: Case, content: bytes | None, message: str) -> None:
    case.source.unlink()
    if content is not None:
        case.source.write_bytes(content)
    assert message in case.refused()


def test_a_checkpoint_of_something_else(case: Case) -> None:
    torch.save([1, 2], case.source)
    assert case.refused() == f"{case.source} holds no weights: found a list; a dict of tensors is expected, or one under state_dict"
    torch.save({"model": 1, "steps": 2}, case.source)
    assert "holds no weights: found keys model, steps; a dict of tensors" in case.refused()


def test_a_checkpoint_of_another_model(case: Case) -> None:
    other = {f"unet.{key}": value for key, value in case.state.items()}
    torch.save({"state_dict": other}, case.source)
    message = case.refused()
    assert (
        f"{case.source} is the checkpoint of another model than tiny: it has no U-Net (model.diffusion_model.* such as time_embed.0.weight)"
        in message
    )
    case.state["model.diffusion_model.middle_block.9.weight"] = case.state.pop("model.diffusion_model.middle_block.1.temporal_alpha")
    case.state[UNET_KEY] = torch.zeros(8, 4, 3, 3)
    case.save()
    message = case.refused()
    for words in (
        "its U-Net misses 1 keys, first model.diffusion_model.middle_block.1.temporal_alpha",
        "its U-Net has 1 keys too many, first model.diffusion_model.middle_block.9.weight",
        f"its U-Net has 1 of another shape, first {UNET_KEY} (8, 4, 3, 3), expected (32, 4, 3, 3)",
    ):
        assert words in message
    assert "structure encoder" not in message


def test_a_video_autoencoder_of_another_model(case: Case) -> None:
    case.vae["decoder.surplus"] = case.vae.pop("decoder.fusion_layer_1.encode_enc_1.conv1.weight")
    case.save()
    assert case.refused().endswith(
        "another model than tiny: its video autoencoder misses 1 keys, first decoder.fusion_layer_1.encode_enc_1.conv1.weight; "
        "its video autoencoder has 1 keys too many, first decoder.surplus; check backbone.vae"
    )


def test_safetensors_with_missing_keys(case: Case) -> None:
    case.source = case.folder / "unet.safetensors"
    gone = "structcond_stage_model.time_embed.0.weight"
    save_file({key: value for key, value in case.state.items() if key != gone}, case.source)
    assert f"its structure encoder misses 1 keys, first {gone}; check backbone" in case.refused()
    case.source.write_bytes(case.source.read_bytes()[:-5])
    assert "unet.safetensors is damaged or no safetensors file" in case.refused()


def test_values_that_are_not_finite(case: Case) -> None:
    case.state[UNET_KEY][0, 0, 0, 0] = 7e4
    case.save()
    case.run(precision="keep")
    for file in (case.settings.weights, case.settings.vae_weights):
        file.unlink()
    wanted = f"{UNET_KEY} holds values that are not finite; they are too large for float16, set official.precision to keep"
    assert case.refused(precision="half").endswith(wanted)
    case.state[UNET_KEY][0, 0, 0, 0] = float("nan")
    case.save()
    assert case.refused(precision="half").endswith(f"{UNET_KEY} holds values that are not finite; fetch it again")


def test_no_moving_averages(case: Case) -> None:
    assert case.refused(ema=True) == f"{case.source} holds no moving averages (model_ema.*): set official.ema to false"


def test_a_text_tower_of_another_width(case: Case) -> None:
    file = case.folder / "tower.pth"
    random_checkpoint(file, module.text.tower_shapes(128, 2, 4))
    assert case.refused(text_tower=file) == f"{file}: the text tower gives (1, 4, 128), the configuration tiny needs (1, 4, 64)"


# --- random ones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_a_random_checkpoint_converts_and_gives_numbers(case: Case, shapes: dict[str, tuple[int, ...]], name: str) -> None:
    case.source = case.folder / name
    random_checkpoint(case.source, shapes, torch.float16, seed=3)
    random_checkpoint(case.vae_source, vae_keys(case.settings), torch.float16, seed=4)
    assert {key: tuple(value.shape) for key, value in read_official(case.source).items()} == shapes
    assert {value.dtype for value in read_official(case.source).values()} == {torch.float16}
    case.run()
    backbone = load_backbone(case.settings)
    with torch.no_grad():
        latent, t = torch.randn(5, 4, 16, 16), torch.tensor([500])
        out = backbone.unet(latent, t, backbone.context, backbone.structure(latent, t))
    assert torch.isfinite(out).all() and out.std() > 0.01
    first = case.source.read_bytes()
    random_checkpoint(case.source, shapes, torch.float16, seed=3)
    assert case.source.read_bytes() == first, "the same seed gives the same file"
