"""A quantized network in one safetensors file: packed integers and everything needed to read them.

Per layer ``NAME.ROLE`` with the roles of :meth:`qvsr.quant.layer.QuantLayer.state`: `weight` as a packed bit stream
(:mod:`qvsr.kernels.packing`), `zero_point` in the smallest integer type that holds it, `signs` of the rotations as bits (the matrices follow
from them), the rest in float32. Layers that were not quantized are not in the file: they belong to the backbone, whose digest is.

A layer with forms by timestep (:class:`qvsr.quant.by_timestep.ByTimestep`) is in the file once a form, as ``NAME.rows.0``, ``NAME.rows.1``, …

The header is one JSON text under the key ``qvsr``: what the caller gave (method, bits, settings, digests, seed), what the method noted
(losses), the facts of each layer, a digest of the content, the timesteps of layers with several forms. It holds no time and no path, so
the same run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qvsr.kernels.packing import pack, unpack
from qvsr.provenance import atomic_path
from qvsr.quant import affine, apply
from qvsr.quant.by_timestep import ByTimestep
from qvsr.quant.layer import Geometry, QuantError, QuantLayer

FORMAT = 1
KEY = "qvsr"
_AT_A_TIME = 2**18  # integers that are unpacked together; eights of them fill whole bytes


class CheckpointError(QuantError):
    """A quantized checkpoint that is missing, damaged, or belongs to other weights."""


def save(unet: nn.Module, path: str | Path, header: dict[str, Any]) -> None:
    """Write a quantized network; the file appears whole or not at all.

    Args:
        unet: with at least one :class:`QuantLayer`, as a method returned it.
        header: plain values; must name at least `method`, `bits` and `backbone`.
    Raises:
        CheckpointError: nothing is quantized, or the header lacks a name.
    """
    layers = apply.quant_layers(unet)
    if not layers:
        raise CheckpointError(f"{path}: the network has no quantized layer; full precision needs no checkpoint")
    for key in ("method", "bits", "backbone"):
        if key not in header:
            raise CheckpointError(f"{path}: the header must name {key}")
    if "unet_digest" not in apply.record(unet):
        raise CheckpointError(
            f"{path}: the digest of the full-precision weights is not noted; quantize with qvsr.quant.apply.quantize_layers"
        )
    tensors = {f"{name}.{role}": tensor for name, layer in layers.items() for role, tensor in _encode(layer).items()}
    facts = {name: layer.describe() for name, layer in layers.items()}
    noted = apply.record(unet)
    forms = {name: list(module.bounds) for name, module in unet.named_modules() if isinstance(module, ByTimestep)}
    full = {**header, **noted, "noted": sorted(noted), "format": FORMAT, "layers": facts, "content": _content_digest(tensors)}
    if forms:
        full["by_timestep"] = forms
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {KEY: json.dumps(full, sort_keys=True)})


def read_header(path: str | Path) -> dict[str, Any]:
    """The header of a quantized checkpoint; the tensors are not read.

    Raises:
        CheckpointError: no such file, not safetensors, not ours, or of a later format.
    """
    with _open(path) as file:
        return _header(path, file.metadata())


def contents(path: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, tuple[tuple[int, ...], int]]]]:
    """The header of a quantized checkpoint, and shape and bits of each tensor by layer and role; no tensor is read.

    Raises:
        CheckpointError: as :func:`read_header`.
    """
    with _open(path) as file:
        header = _header(path, file.metadata())
        found: dict[str, dict[str, tuple[tuple[int, ...], int]]] = {name: {} for name in header["layers"]}
        for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            part, name = file.get_slice(key), _layer_of(key, found)
            shape = tuple(part.get_shape())
            found[name][key.removeprefix(name + ".")] = shape, math.prod(shape) * int(re.sub(r"\D", "", part.get_dtype()))
    return header, found


def load(path: str | Path, unet: nn.Module) -> nn.Module:
    """Replace the layers of a full-precision network by those of a checkpoint, in place; returns the network.

    Raises:
        CheckpointError: the file is damaged, or was made from other weights than `unet` has.
    """
    with _open(path) as file:
        header = _header(path, file.metadata())
        found = apply.weights_digest(unet)
        if found != header["unet_digest"]:
            raise CheckpointError(
                f"{path} was made from other weights of backbone {header['backbone']} (digest {header['unet_digest'][:12]}, these have {found[:12]}): "
                "quantize these, or set backbone.weights to those"
            )
        try:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error}); make it again with the quantize stage") from None
    if _content_digest(tensors) != header["content"]:
        raise CheckpointError(f"{path} is damaged (its content is not what was written); make it again with the quantize stage")
    by_layer: dict[str, dict[str, Tensor]] = {name: {} for name in header["layers"]}
    for key, tensor in tensors.items():
        name = _layer_of(key, by_layer)
        by_layer[name][key.removeprefix(name + ".")] = tensor
    for name, bounds in header.get("by_timestep", {}).items():
        apply.replace(unet, name, ByTimestep([unet.get_submodule(name)] * len(bounds), bounds, name))
    for name, facts in header["layers"].items():
        apply.replace(unet, name, decode(Geometry.of(unet.get_submodule(name), name), facts, by_layer[name], name))
    apply.note(unet, **{key: header[key] for key in header["noted"]})
    apply.follow_timesteps(unet)
    return unet


def stored_bits(layer: QuantLayer) -> dict[str, int]:
    """Bits that a file takes for each tensor of a layer, by role; `weight` without the bits that fill its last byte."""
    bits = {role: 8 * tensor.element_size() * tensor.numel() for role, tensor in _encode(layer).items()}
    return bits | {"weight": layer.weight_bits * math.prod(layer.geometry.weight_shape)}


def _layer_of(key: str, layers: Container[str]) -> str:
    """Name of the layer whose tensor has this key; a role may have a dot."""
    return next(name for name in (key.rsplit(".", dots)[0] for dots in (1, 2)) if name in layers)


def _encode(layer: QuantLayer) -> dict[str, Tensor]:
    """The layer's tensors as they are stored."""
    state = {role: tensor.detach().cpu().contiguous() for role, tensor in layer.state().items()}
    state["weight"] = pack(state["weight"], layer.weight_bits)
    state["zero_point"] = _smallest(state["zero_point"])
    if "signs" in state:
        state["signs"] = torch.from_numpy(np.packbits((state["signs"] > 0).numpy(), bitorder="little"))
    return state


def decode(geometry: Geometry, facts: dict[str, Any], state: dict[str, Tensor], name: str) -> QuantLayer:
    """The layer that a file's facts and tensors, by role, tell of."""
    state = dict(state)
    state["weight"] = _unpack(state["weight"], facts["weight_bits"], math.prod(geometry.weight_shape)).view(geometry.weight_shape)
    state["zero_point"] = state["zero_point"].to(state["scale"].dtype)
    if "signs" in state:
        bits = np.unpackbits(state["signs"].numpy(), count=geometry.in_channels, bitorder="little")
        state["signs"] = torch.from_numpy(bits.astype(np.int8) * 2 - 1)
    return QuantLayer.from_state(geometry, facts, state, name)


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """All integers of a layer, some at a time: the intermediate results take many times their bytes."""
    values = torch.empty(count, dtype=affine.storage(bits))
    for start in range(0, count, _AT_A_TIME):
        stop = min(start + _AT_A_TIME, count)
        values[start:stop] = unpack(packed[start * bits // 8 : -(-stop * bits // 8)], bits, stop - start)
    return values


def _smallest(zero_point: Tensor) -> Tensor:
    """Whole numbers in the smallest integer type that holds them; float32 beyond 32 bits."""
    low, high = zero_point.min().item(), zero_point.max().item()
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return zero_point.to(dtype)
    return zero_point


def _content_digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise CheckpointError(f"no quantized checkpoint {path}; make it with the quantize stage")
    try:
        return safe_open(path, framework="pt")  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}); make it again with the quantize stage") from None


def _header(path: str | Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    if not metadata or KEY not in metadata:
        raise CheckpointError(f"{path} is no quantized checkpoint of qvsr: its header has no {KEY!r}")
    header: dict[str, Any] = json.loads(metadata[KEY])
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {header.get('format')}, this program reads {FORMAT}: make it again with the quantize stage"
        )
    return header
