"""A quantized model in one safetensors file: all that restoring needs, and nothing that made it.

| key | content |
|---|---|
| ``quantized.NAME.ROLE`` | a quantized layer of the U-Net, as in its checkpoint (:mod:`qvsr.quant.checkpoint`): packed integers, scales, branch, bias |
| ``model.diffusion_model.…`` | what is not quantized of the U-Net |
| ``structcond_stage_model.…``, ``first_stage_model.…``, ``video_vae.…`` | structure encoder, encoder of the image autoencoder, video autoencoder |
| ``context`` | the constant text context |

What is not quantized keeps the type that it has in the backbone's weight files. The low-rank branches are `exact`, the checkpoint's own
float32 numbers with their exponents compressed (:func:`squeeze`), or `half`: float16, rounded once when the file is written, which gives
other numbers than the checkpoint's, the same for every execution of this file.

The header is one JSON text under the key ``qvsr_model``: settings of the backbone and of sampling, seed and threads of the run, facts of every
layer, what the checkpoint's header says. It holds no time and no path. Beside it, under ``sha256``, stands the digest of the whole file with
zeros in the digest's place.

Files are copied tensor by tensor, and a layer is brought into the form of its execution before the next one is read: neither
writing nor loading holds a second copy of the model.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qvsr.config import BackboneSettings, Config, SamplingSettings
from qvsr.models.checkpoints import (
    CONTEXT,
    FIRST_STAGE,
    STRUCTURE,
    TYPE_NAMES,
    UNET,
    UNUSED_FIRST_STAGE,
    Backbone,
    WeightFile,
    build,
    files_digest,
    write_tensors,
)
from qvsr.provenance import atomic_path
from qvsr.quant import apply, checkpoint
from qvsr.quant.by_timestep import ByTimestep
from qvsr.quant.cost import FLOAT_BITS, Facts
from qvsr.quant.layer import EXECUTIONS, Geometry, QuantError
from qvsr.registry import suggest

FORMAT = 1
KEY = "qvsr_model"
SEAL = "sha256"
QUANTIZED, VIDEO_VAE = "quantized.", "video_vae."
BRANCH = ("up", "down")
BRANCHES = ("exact", "half")
SQUEEZED = 0.87  # of float32 that a squeezed branch takes, rounded up: 0.860 to 0.867 the mini model's, 0.852 to 0.855 normal values
_UNSEALED = "0" * 64
_NOT_COPIED = ("layers", "by_timestep", "content", "format")  # of the checkpoint's header: they have places of their own here
_BLOCK = 1 << 22


class ModelError(QuantError):
    """An exported model that is missing, damaged, or cannot be made of what was given."""


@dataclass(frozen=True)
class Model:
    """An exported model, ready to restore.

    Attributes:
        backbone: the networks, the U-Net quantized; its digest is that of the file.
        sampling: steps, tiles, guidance as in the configuration that it was exported with.
        header: the file's, see the module's docstring.
    """

    backbone: Backbone
    sampling: SamplingSettings
    header: dict[str, Any]


def write(path: Path, config: Config, quantized: Path, branch: Literal["exact", "half"] = "exact", **facts: Any) -> dict[str, Any]:
    """Write the model that a quantized checkpoint and the backbone's weights make; returns its header.

    The file is read back before it gets its name: one that :func:`load` would refuse does not appear.

    Args:
        config: names the backbone's weights; its sampling settings go into the file.
        quantized: checkpoint of the quantize stage, made from these weights.
        branch: how L1 and L2 are stored, see the module's docstring.
        facts: plain values for the header (licence).
    Raises:
        ModelError: the checkpoint belongs to other weights, or a branch does not fit half precision.
    """
    if branch not in BRANCHES:
        raise ModelError(suggest("branch", branch, BRANCHES))
    made = checkpoint.read_header(quantized)
    weights = WeightFile(config.backbone.weights, "weights")
    vae_weights = WeightFile(config.backbone.vae_weights, "vae_weights")
    digest = files_digest(weights.file, vae_weights.file)
    if made.get("weights") != digest:
        raise ModelError(
            f"{quantized} was made from other weights of backbone {made['backbone']} (digest {made.get('weights')}, {weights.file} and "
            f"{vae_weights.file} have {digest}): quantize these, or set backbone.weights to those"
        )
    sources = _sources(config.backbone, weights, vae_weights, quantized, made)
    with _Readers() as files:
        if branch == "half":
            facts["branch_error"] = _branch_error(quantized, ((key, files.read(*sources[key])) for key in sources if _is_branch(key)))

        def value(key: str) -> Tensor:
            tensor = files.read(*sources[key])
            return tensor if not _is_branch(key) else tensor.half() if branch == "half" else squeeze(tensor)

        layout = {key: files.layout(*source) for key, source in sources.items() if not _is_branch(key)}
        for key in filter(_is_branch, sources):  # how small it becomes is not known before
            stored = value(key)
            layout[key] = tuple(stored.shape), stored.dtype
        header = {
            "format": FORMAT,
            "backbone": config.backbone.model_dump(mode="json", exclude={"weights", "vae_weights", "flow_weights"}),
            "sampling": config.sampling.model_dump(mode="json"),
            "run": {"seed": config.seed, "threads": config.threads},
            "quantized": {key: one for key, one in made.items() if key not in _NOT_COPIED},
            "layers": made["layers"],
            "by_timestep": made.get("by_timestep", {}),
            "branch": branch,
            **facts,
        }
        with atomic_path(path) as partial:
            write_tensors(partial, layout, value, {KEY: json.dumps(header, sort_keys=True), SEAL: _UNSEALED})
            _seal(partial)
            load(partial)
    return read_header(path)


def read_header(path: Path) -> dict[str, Any]:
    """The header of an exported model; no tensor is read.

    Raises:
        ModelError: no such file, no safetensors, no exported model, or one of a later format.
    """
    if not path.is_file():
        raise ModelError(f"no exported model {path}; `python -m qvsr export` writes one")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged or no safetensors file ({error}); export it again") from None
    if KEY not in metadata:
        hint = (
            "; it is a quantized checkpoint: `python -m qvsr export --checkpoint` makes a model of it" if checkpoint.KEY in metadata else ""
        )
        raise ModelError(f"{path} is no exported model of qvsr: its header has no {KEY!r}{hint}")
    header: dict[str, Any] = json.loads(metadata[KEY])
    if header.get("format") != FORMAT:
        raise ModelError(f"{path} has format {header.get('format')}, this program reads {FORMAT}: export it again")
    return header | {"digest": metadata.get(SEAL, "")}


def load(path: Path, execution: str = "simulated") -> Model:
    """The model of a file, on the CPU. Neither a calibration set nor a method is needed.

    Integers stay packed under `packed`; `simulated` keeps them one a byte and, from the first call on, rounded weights in float32 beside them.

    Raises:
        ModelError: the file is damaged, or not one of :func:`write`.
        qvsr.quant.layer.QuantError: an execution that is not known.
    """
    if execution not in EXECUTIONS:
        raise QuantError(suggest("execution", execution, EXECUTIONS))
    header = read_header(path)
    if _digest(path) != header["digest"]:
        raise ModelError(f"{path} is damaged (its content is not what was written); export or fetch it again")
    settings = BackboneSettings.model_validate(header["backbone"])
    file = WeightFile(path, "weights")
    with torch.device("meta"):
        backbone = build(settings)
    unet = backbone.unet
    for name, bounds in header["by_timestep"].items():
        apply.replace(unet, name, ByTimestep([unet.get_submodule(name)] * len(bounds), bounds, name))
    geometries = {name: Geometry.of(unet.get_submodule(name), name) for name in header["layers"]}
    for name in header["layers"]:
        apply.replace(unet, name, nn.Identity())  # has no keys: what remains is what is not quantized
    file.fill(unet, UNET)
    file.fill(backbone.structure, STRUCTURE)
    file.fill(backbone.vae, VIDEO_VAE)
    if not settings.share_encoder:
        backbone.first_stage.decoder = nn.Identity()
        backbone.first_stage.post_quant_conv = nn.Identity()  # type: ignore[assignment]
        file.fill(backbone.first_stage, FIRST_STAGE)
    roles = _by_layer(file.shapes, header["layers"])
    with safe_open(path, "pt", backend="pread") as copied:  # mapped, the file would stay in memory beside the layers
        for name, facts in header["layers"].items():
            state = {role: copied.get_tensor(key) for role, key in roles[name].items()}
            state |= {role: _branch(state[role], role, geometries[name], facts["rank"]) for role in BRANCH if role in state}
            layer = checkpoint.decode(geometries[name], facts, state, name)
            apply.set_execution(layer, execution)
            apply.replace(unet, name, layer)
    apply.follow_timesteps(unet)
    _give_back()
    context = file.read([CONTEXT])[CONTEXT]
    whole = Backbone(settings, unet, backbone.structure, backbone.first_stage, backbone.vae, context, header["digest"][:16])
    return Model(whole, SamplingSettings.model_validate(header["sampling"]), header)


def squeeze(values: Tensor) -> Tensor:
    """float32 values without loss in fewer bytes: the three lower bytes of each, then all the highest, which are much alike, by zlib.

    Returns:
        uint8, one dimension.

    >>> values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    >>> squeezed = squeeze(values)
    >>> len(squeezed) < 0.87 * 4000, torch.equal(unsqueeze(squeezed, (10, 100)), values.view(10, 100))
    (True, True)
    """
    split = values.contiguous().view(-1).numpy().astype("<f4").view(np.uint8).reshape(-1, 4)
    highest = zlib.compress(split[:, 3].tobytes())
    return torch.from_numpy(np.concatenate([split[:, :3].reshape(-1), np.frombuffer(highest, np.uint8)]))


def unsqueeze(squeezed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo :func:`squeeze`."""
    count = math.prod(shape)
    split = np.empty((count, 4), np.uint8)
    split[:, :3] = squeezed[: 3 * count].numpy().reshape(count, 3)
    split[:, 3] = np.frombuffer(zlib.decompress(squeezed[3 * count :].numpy().tobytes()), np.uint8)
    return torch.from_numpy(split.view("<f4").astype(np.float32).reshape(shape))


def unet_bytes(path: Path) -> int:
    """Bytes of a file that are the U-Net's tensors, quantized or not."""
    with safe_open(path, "pt") as file:
        slices = [file.get_slice(key) for key in file.keys() if key.startswith((UNET, QUANTIZED))]  # noqa: SIM118  (it is no dict)
        return sum(math.prod(one.get_shape()) * _TYPES[one.get_dtype()].itemsize for one in slices)


def planned_unet_bytes(facts: Facts, branch: str = "exact") -> int:
    """What :func:`unet_bytes` will be of a network with these layers whose unquantized part is stored in float32; needs no weights.

    With `half` branches to the byte; how far `exact` ones are compressed depends on their values, :data:`SQUEEZED` is on the safe side.
    """
    kept = 0.5 if branch == "half" else SQUEEZED
    bits = facts.other_params * FLOAT_BITS
    for layer in facts.layers:
        filling = -(layer.weights * layer.weight_bits) % 8  # of the last byte
        bits += layer.stored_bits + filling - round(layer.branch_params * FLOAT_BITS * (1 - kept))
    return bits // 8


def _sources(
    settings: BackboneSettings, weights: WeightFile, vae_weights: WeightFile, quantized: Path, made: dict[str, Any]
) -> dict[str, tuple[Path, str]]:
    """Where each tensor of the model is read: a file and its key there."""
    replaced = {name.rpartition(".rows.")[0] or name for name in made["layers"]}
    for name in replaced:
        if f"{UNET}{name}.weight" not in weights.shapes:
            raise ModelError(
                f"{quantized} quantizes {name}, which {weights.file} does not have: set backbone.weights to what it was made from"
            )
    own = {
        key
        for key in weights.shapes
        if key == CONTEXT
        or key.startswith(STRUCTURE)
        or (key.startswith(UNET) and key.removeprefix(UNET).rpartition(".")[0] not in replaced)
        or (not settings.share_encoder and key.startswith(FIRST_STAGE) and not key.removeprefix(FIRST_STAGE).startswith(UNUSED_FIRST_STAGE))
    }
    sources = {key: (weights.file, key) for key in own}
    sources |= {VIDEO_VAE + key: (vae_weights.file, key) for key in vae_weights.shapes}
    with safe_open(quantized, "pt") as file:
        sources |= {QUANTIZED + key: (quantized, key) for key in file.keys()}  # noqa: SIM118  (it is no dict)
    return sources


class _Readers:
    """Open weight files, read a tensor at a time."""

    def __enter__(self) -> _Readers:
        self._open: dict[Path, Any] = {}
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, "pt", backend="pread").__enter__()
        return self._open[path]

    def read(self, path: Path, key: str) -> Tensor:
        tensor: Tensor = self._file(path).get_tensor(key)
        return tensor

    def layout(self, path: Path, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        one = self._file(path).get_slice(key)
        return tuple(one.get_shape()), _TYPES[one.get_dtype()]


_TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}


def _is_branch(key: str) -> bool:
    return key.startswith(QUANTIZED) and key.rpartition(".")[2] in BRANCH


def _branch_error(quantized: Path, branches: Iterable[tuple[str, Tensor]]) -> float:
    """What half precision changes of all L1 and L2 together: norm of the difference over the norm, three digits."""
    squared = error = 0.0
    for key, tensor in branches:
        rounded = tensor.half()
        if not bool(torch.isfinite(rounded).all()):
            raise ModelError(
                f"{quantized}: {key.removeprefix(QUANTIZED)} holds {float(tensor.abs().max()):g}, beyond half precision: export with --branch exact"
            )
        squared += float(tensor.double().square().sum())
        error += float((rounded.double() - tensor.double()).square().sum())
    return float(f"{math.sqrt(error / squared):.3g}") if squared else 0.0


def _seal(path: Path) -> None:
    """Put the digest of a file that has zeros in its place there."""
    digest = _digest(path)
    with path.open("r+b") as file:
        header = file.read(8 + int.from_bytes(file.read(8), "little"))
        file.seek(8 + _place(header))
        file.write(digest.encode())


def _digest(path: Path) -> str:
    """SHA-256 of a file, the header's own digest counted as zeros."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        place = _place(header)
        digest = hashlib.sha256(length + header[:place] + _UNSEALED.encode() + header[place + len(_UNSEALED) :])
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _place(header: bytes) -> int:
    """Where the digest begins; the text of our own key cannot hold the mark, its quotation marks have a backslash in front."""
    mark = f'"{SEAL}":"'.encode()
    return header.find(mark) + len(mark)


def _give_back() -> None:
    """Hand freed memory back to the system: after layers were unpacked, glibc keeps several times what they take in the end."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _branch(stored: Tensor, role: str, geometry: Geometry, rank: int) -> Tensor:
    """L1 or L2 in float32, whatever the form in the file."""
    if stored.dtype != torch.uint8:
        return stored.float()
    return unsqueeze(stored, (geometry.out_channels, rank) if role == "up" else (rank, geometry.in_channels, *geometry.kernel))


def _by_layer(keys: Iterable[str], layers: Iterable[str]) -> dict[str, dict[str, str]]:
    """Keys of the quantized layers by layer and role."""
    found: dict[str, dict[str, str]] = {name: {} for name in layers}
    for key in keys:
        if key.startswith(QUANTIZED):
            whole = key.removeprefix(QUANTIZED)
            name = next(name for name in (whole.rsplit(".", dots)[0] for dots in (1, 2)) if name in found)  # a role may have a dot in it
            found[name][whole.removeprefix(name + ".")] = key
    return found
