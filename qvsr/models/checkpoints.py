"""Reads a backbone's weights, refuses those of another configuration, and writes them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qvsr.config import BackboneSettings
from qvsr.models.autoencoder import AutoencoderKL, VideoAutoencoder
from qvsr.models.structure import StructureEncoder
from qvsr.models.unet import InflatedUNet
from qvsr.provenance import atomic_path

UNET = "model.diffusion_model."
STRUCTURE = "structcond_stage_model."
FIRST_STAGE = "first_stage_model."
CONTEXT = "context"


class CheckpointError(ValueError):
    """Weights that are missing, damaged or of another configuration."""


@dataclass(frozen=True)
class Backbone:
    """The networks of a diffusion video super-resolution model, in evaluation mode."""

    settings: BackboneSettings
    unet: InflatedUNet
    structure: StructureEncoder
    first_stage: AutoencoderKL
    vae: VideoAutoencoder
    context: Tensor
    """(1, tokens, context_dim): the constant text context."""
    digest: str
    """SHA-256 of the weight files, first 16 hex digits; '' where the weights are random."""


def build(settings: BackboneSettings) -> Backbone:
    """The networks with PyTorch's initial values (random from its global generator), nothing loaded."""
    vae = VideoAutoencoder(settings.vae)
    first_stage = vae if settings.share_encoder else AutoencoderKL(settings.first_stage)
    context = torch.zeros(1, settings.context_tokens, settings.unet.context_dim)
    backbone = Backbone(settings, InflatedUNet(settings.unet), StructureEncoder(settings.structure), first_stage, vae, context, "")
    for network in (backbone.unet, backbone.structure, backbone.first_stage, backbone.vae):
        network.eval().requires_grad_(False)
    return backbone


def load_backbone(settings: BackboneSettings) -> Backbone:
    """Build the networks and fill them from the two weight files that the settings name.

    Weights stored in half precision are widened to float32. Keys of networks that a restoration does not use (the image
    decoder, the text tower, schedule buffers) may be there or not.

    Raises:
        CheckpointError: a file is missing or damaged, or its keys or shapes are not the configuration's; one line.
    """
    weights, vae_weights = _read(settings.weights, "weights"), _read(settings.vae_weights, "vae_weights")
    with torch.device("meta"):
        backbone = build(settings)
    _fill(backbone.unet, _under(weights, UNET), settings.weights, UNET)
    _fill(backbone.structure, _under(weights, STRUCTURE), settings.weights, STRUCTURE)
    _fill(backbone.vae, vae_weights, settings.vae_weights, "")
    if not settings.share_encoder:
        # Only the encoder of the image autoencoder is used: its decoder need not be in the file.
        first_stage = _under(weights, FIRST_STAGE)
        backbone.first_stage.decoder = nn.Identity()
        backbone.first_stage.post_quant_conv = nn.Identity()  # type: ignore[assignment]
        _fill(backbone.first_stage, first_stage, settings.weights, FIRST_STAGE, unused=("decoder.", "post_quant_conv."))
    if CONTEXT not in weights:
        raise CheckpointError(
            f"{settings.weights} has no key {CONTEXT!r}: the text context is computed once by `python -m qvsr assets import`"
        )
    context = weights[CONTEXT].float()
    expected = (1, settings.context_tokens, settings.unet.context_dim)
    if tuple(context.shape) != expected:
        raise CheckpointError(
            f"{settings.weights}: {CONTEXT} is {tuple(context.shape)}, the configuration {settings.name} needs {expected}"
        )
    digest = hashlib.sha256()
    for file in (settings.weights, settings.vae_weights):
        digest.update(Path(str(file)).read_bytes())
    return Backbone(settings, backbone.unet, backbone.structure, backbone.first_stage, backbone.vae, context, digest.hexdigest()[:16])


def save_backbone(backbone: Backbone, weights: Path, vae_weights: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the two weight files with the official key names; each appears whole or not at all."""
    tensors = {UNET + key: value for key, value in backbone.unet.state_dict().items()}
    tensors |= {STRUCTURE + key: value for key, value in backbone.structure.state_dict().items()}
    if not backbone.settings.share_encoder:
        tensors |= {FIRST_STAGE + key: value for key, value in backbone.first_stage.state_dict().items()}
    tensors[CONTEXT] = backbone.context
    for file, content in ((weights, tensors), (vae_weights, backbone.vae.state_dict())):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            save_file(
                {key: value.to(dtype).contiguous() for key, value in content.items()}, temporary, {"backbone": backbone.settings.name}
            )


def _read(file: Path | None, key: str) -> dict[str, Tensor]:
    if file is None:
        raise CheckpointError(f"backbone.{key} is not set: name the safetensors file with the weights")
    if not file.is_file():
        raise CheckpointError(f"no weights {file}; set backbone.{key}, or make the small model's with `snakemake mini_weights`")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file ({error}); fetch it again") from None


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _fill(network: nn.Module, tensors: dict[str, Tensor], file: Path | None, prefix: str, unused: tuple[str, ...] = ()) -> None:
    """Put tensors into a network on the meta device, every key and shape as expected."""
    expected = network.state_dict()
    found = {key: value for key, value in tensors.items() if not key.startswith(unused)} if unused else tensors
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        what = (
            f"misses {len(missing)} keys, first {prefix}{missing[0]}"
            if missing
            else f"has {len(extra)} keys too many, first {prefix}{extra[0]}"
        )
        raise CheckpointError(f"{file} is of another configuration: it {what}; check backbone.* in the configuration")
    for key, value in found.items():
        if value.shape != expected[key].shape:
            raise CheckpointError(
                f"{file} is of another configuration: {prefix}{key} is {tuple(value.shape)}, expected {tuple(expected[key].shape)}; check backbone.*"
            )
        if not torch.isfinite(value.float()).all():
            raise CheckpointError(f"{file}: {prefix}{key} holds values that are not finite; fetch it again")
    network.load_state_dict({key: value.float() for key, value in found.items()}, assign=True)
    network.requires_grad_(False)
