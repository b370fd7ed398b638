"""Which layers of a network are quantized, and putting quantized layers in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qvsr.kernels import cpu
from qvsr.quant.by_timestep import ByTimestep
from qvsr.quant.layer import EXECUTIONS, KINDS, QuantError, QuantLayer, Timestep
from qvsr.registry import suggest

RECORD = "quantization_record"


def choose_execution(asked: str, device: str) -> str:
    """The execution that a setting means on a device: `auto` is packed on a processor with integer kernels, else simulated.

    On a GPU too: its kernels have not been measured on one yet.

    Raises:
        QuantError: a setting that is not known.
    """
    if asked != "auto":
        if asked not in EXECUTIONS:
            raise QuantError(suggest("execution", asked, ("auto", *EXECUTIONS)))
        return asked
    return "packed" if torch.device(device).type == "cpu" and cpu.missing() is None else "simulated"


def set_precision(network: nn.Module, dtype: torch.dtype) -> None:
    """Compute what is not quantized in a type; quantized layers read and write it, round and scale in float32, and multiply integers as before.

    Packed and simulated execution then give the same bytes again, other ones than in float32.
    """
    for module in network.modules():
        for name, parameter in () if isinstance(module, QuantLayer) else list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))  # a new one: networks share parameters


def excluded(name: str, exclude: Iterable[str]) -> bool:
    """Whether a layer's name is one of the prefixes or lies below one; prefixes end at a dot.

    >>> excluded("time_embed.0", ["time_embed.0"]), excluded("time_embed.01", ["time_embed.0"])
    (True, False)
    """
    return any(name == prefix or name.startswith(prefix + ".") for prefix in exclude)


def quantizable(network: nn.Module, exclude: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Linear, Conv1d, Conv2d and Conv3d layers by name, in the order of the network's modules, without the excluded ones.

    Raises:
        QuantError: a prefix that excludes nothing (a typo), or a network with nothing left to quantize.
    """
    exclude = tuple(exclude)
    layers = {name: module for name, module in network.named_modules() if type(module) in KINDS}
    for prefix in exclude:
        if not any(excluded(name, [prefix]) for name in layers):
            raise QuantError(f"method.exclude: {suggest('layer', prefix, _prefixes(layers))[:300]}")
    kept = {name: module for name, module in layers.items() if not excluded(name, exclude)}
    if not kept:
        raise QuantError(f"{type(network).__name__}: no layer is left to quantize; shorten method.exclude")
    return kept


def quantize_layers(network: nn.Module, exclude: Iterable[str], make: Callable[[str, nn.Module], QuantLayer]) -> dict[str, QuantLayer]:
    """Replace every layer that is not excluded by ``make(name, layer)``, in place; returns the new layers by name.

    The digest of the full-precision weights is noted on the network: a checkpoint names the weights that it belongs to.
    """
    note(network, unet_digest=weights_digest(network))
    replaced = {}
    for name, module in quantizable(network, exclude).items():
        replaced[name] = make(name, module)
        replace(network, name, replaced[name])
    return replaced


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of a network's state, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def replace(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


@contextmanager
def exchanged(network: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block, the modules of these names are replaced by others; those that were there are put back at its end."""
    before = {name: network.get_submodule(name) for name in modules}
    for name, module in modules.items():
        replace(network, name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            replace(network, name, module)


def quant_layers(network: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a network by name, in its order."""
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantLayer)}


def freeze(network: nn.Module) -> None:
    """Turn every open layer into integers and fold what was learned beside them."""
    for layer in quant_layers(network).values():
        layer.fold_correction()
        if layer.is_open:
            layer.freeze()


def follow_timesteps(network: nn.Module) -> None:
    """Let layers with a table or forms by timestep know the timestep: the second argument of the network, all of whose entries must agree."""
    tables = [
        layer
        for layer in network.modules()
        if isinstance(layer, ByTimestep) or (isinstance(layer, QuantLayer) and max(len(layer.act_timesteps), len(layer.bias_timesteps)) > 1)
    ]
    if not tables:
        return
    shared = Timestep()
    for layer in tables:
        layer.timestep = shared

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        t: Tensor = kwargs["t"] if "t" in kwargs else args[1]
        if t.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # it cannot be read back; the call before, of the same rows, has noted it (qvsr.kernels.graphs)
        values = torch.unique(t)
        if values.numel() != 1:
            raise QuantError(f"tables by timestep need one timestep a call, found {values.tolist()}")
        shared.value = int(values)

    names = ("bounds", "act_timesteps", "bias_timesteps")
    note.bounds = sorted({bound for layer in tables for name in names for bound in getattr(layer, name, ())})  # type: ignore[attr-defined]
    network.register_forward_pre_hook(note, with_kwargs=True)


def set_execution(network: nn.Module, execution: str) -> None:
    """Choose how the quantized layers compute; packed execution packs their weights in memory.

    Raises:
        QuantError: an execution that is not known, or packed where a layer is not frozen; then no layer is changed.
    """
    if execution not in EXECUTIONS:
        raise QuantError(suggest("execution", execution, EXECUTIONS))
    layers = quant_layers(network)
    for layer in layers.values():
        layer.check_execution(execution)
    for layer in layers.values():
        layer.set_execution(execution)


def note(network: nn.Module, **facts: Any) -> None:
    """Keep facts about how a network was quantized (losses, ranks); they go into the checkpoint's header. Plain values only."""
    setattr(network, RECORD, {**record(network), **facts})


def record(network: nn.Module) -> dict[str, Any]:
    """What :func:`note` was told."""
    return dict(getattr(network, RECORD, {}))


def _prefixes(names: Iterable[str]) -> set[str]:
    """Every name and every prefix of it that ends before a dot."""
    return {".".join(parts[: end + 1]) for parts in (name.split(".") for name in names) for end in range(len(parts))}
