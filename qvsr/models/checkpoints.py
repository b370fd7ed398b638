"""Reads a backbone's weights, refuses those of another configuration, and writes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qvsr.config import BackboneSettings
from qvsr.models.autoencoder import AutoencoderKL, VideoAutoencoder
from qvsr.models.structure import StructureEncoder
from qvsr.models.unet import InflatedUNet
from qvsr.provenance import atomic_path

UNET = "model.diffusion_model."
STRUCTURE = "structcond_stage_model."
FIRST_STAGE = "first_stage_model."
UNUSED_FIRST_STAGE = ("decoder.", "post_quant_conv.")
"""Of the image autoencoder only the encoder is used."""
CONTEXT = "context"
TYPE_NAMES = {  # as safetensors calls them
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


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

    Weights stored in half precision are widened to float32, a tensor at a time; those in float32 stay in the file and are mapped into
    memory, so that jobs on one machine share them. Keys of networks that a restoration does not use (the image decoder, the text tower,
    schedule buffers) may be there or not.

    Raises:
        CheckpointError: a file is missing or damaged, or its keys or shapes are not the configuration's; one line.
    """
    weights, vae_weights = WeightFile(settings.weights, "weights"), WeightFile(settings.vae_weights, "vae_weights")
    # First, from begin to end: the tensors, which are asked for in another order, are in the system's cache then.
    digest = files_digest(weights.file, vae_weights.file)
    with torch.device("meta"):
        backbone = build(settings)
    weights.fill(backbone.unet, UNET)
    weights.fill(backbone.structure, STRUCTURE)
    vae_weights.fill(backbone.vae, "")
    if not settings.share_encoder:
        # The decoder of the image autoencoder need not be in the file.
        backbone.first_stage.decoder = nn.Identity()
        backbone.first_stage.post_quant_conv = nn.Identity()  # type: ignore[assignment]
        weights.fill(backbone.first_stage, FIRST_STAGE, unused=UNUSED_FIRST_STAGE)
    if CONTEXT not in weights.shapes:
        raise CheckpointError(
            f"{settings.weights} has no key {CONTEXT!r}: `python -m qvsr convert` computes the text context once and stores it there"
        )
    expected = (1, settings.context_tokens, settings.unet.context_dim)
    if weights.shapes[CONTEXT] != expected:
        raise CheckpointError(
            f"{settings.weights}: {CONTEXT} is {weights.shapes[CONTEXT]}, the configuration {settings.name} needs {expected}"
        )
    context = weights.read([CONTEXT])[CONTEXT]
    return Backbone(settings, backbone.unet, backbone.structure, backbone.first_stage, backbone.vae, context, digest)


def files_digest(weights: Path, vae_weights: Path) -> str:
    """What a backbone is known by: SHA-256 of its weight files, first 16 hex digits."""
    digest = hashlib.sha256()
    for file in (weights, vae_weights):
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


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


def write_tensors(
    path: Path,
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    value: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file a tensor at a time, which the library cannot: it wants all of them in memory.

    Args:
        path: written directly; give a name from :func:`qvsr.provenance.atomic_path`.
        layout: shape and type of every key.
        value: gives the tensor of a key, of that shape and type; called once a key.
        metadata: goes into the header.
    """
    keys = sorted(layout, key=lambda key: (-layout[key][1].itemsize, key))  # the widest first, so that all lie at multiples of their size
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for key in keys:
        shape, dtype = layout[key]
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[key] = {"dtype": TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            tensor = value(key).detach().contiguous()
            if (tuple(tensor.shape), tensor.dtype) != layout[key]:
                raise CheckpointError(f"{path}: {key} is {tuple(tensor.shape)} {tensor.dtype}, announced was {layout[key]}")
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))


class WeightFile:
    """A weight file that a setting names: keys and shapes at once, tensors when they are asked for."""

    def __init__(self, file: Path | None, key: str) -> None:
        if file is None:
            raise CheckpointError(f"backbone.{key} is not set: name the safetensors file with the weights")
        if not file.is_file():
            raise CheckpointError(
                f"no weights {file}; set backbone.{key}, convert official ones with `python -m qvsr convert`, "
                "or make the small model's with `snakemake mini_weights`"
            )
        self.file = file
        try:
            with safe_open(file, "pt") as opened:
                slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  (it is no dict)
                self.shapes: dict[str, tuple[int, ...]] = {key: tuple(one.get_shape()) for key, one in slices.items()}
                self._types = {key: one.get_dtype() for key, one in slices.items()}
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged or no safetensors file ({error}); fetch it again") from None

    def read(self, keys: list[str]) -> dict[str, Tensor]:
        """Tensors in float32, all finite.

        Narrower ones are read and widened one after the other: mapped, the file would stay in memory beside the result.
        """
        found = {}
        with safe_open(self.file, "pt") as mapped, safe_open(self.file, "pt", backend="pread") as copied:
            for key in keys:
                found[key] = (mapped if self._types[key] == "F32" else copied).get_tensor(key).float()
                if not finite(found[key]):
                    raise CheckpointError(f"{self.file}: {key} holds values that are not finite; fetch it again")
        return found

    def fill(self, network: nn.Module, prefix: str, unused: tuple[str, ...] = ()) -> None:
        """Put tensors into a network on the meta device, every key and shape as expected; nothing is read before they are."""
        expected = network.state_dict()
        found = [key.removeprefix(prefix) for key in self.shapes if key.startswith(prefix)]
        found = [key for key in found if not key.startswith(unused)] if unused else found
        missing, extra = sorted(expected.keys() - set(found)), sorted(set(found) - expected.keys())
        if missing or extra:
            what = (
                f"misses {len(missing)} keys, first {prefix}{missing[0]}"
                if missing
                else f"has {len(extra)} keys too many, first {prefix}{extra[0]}"
            )
            raise CheckpointError(f"{self.file} is of another configuration: it {what}; check backbone.* in the configuration")
        for key in found:
            if self.shapes[prefix + key] != tuple(expected[key].shape):
                raise CheckpointError(
                    f"{self.file} is of another configuration: {prefix}{key} is {self.shapes[prefix + key]}, "
                    f"expected {tuple(expected[key].shape)}; check backbone.*"
                )
        tensors = self.read([prefix + key for key in found])
        network.load_state_dict({key.removeprefix(prefix): value for key, value in tensors.items()}, assign=True)
        network.requires_grad_(False)


def finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN; smallest and largest say it without a copy, and a NaN is both."""
    return all(bool(torch.isfinite(one)) for one in torch.aminmax(tensor))
