"""Parameters and multiply-accumulates of a U-Net, full precision or quantized, counted for one forward pass.

Two countings stand side by side.

*The published one* (``params_m``, ``macs_g``; QuantVSR, arXiv 2508.04485, cost table), in 32-bit equivalents: **everything** times
b/32, the unquantized layers too, plus the low-rank branch at 32 bits: ``P_b = P b/32 + sum r (N + K taps)`` and
``F_b = F b/32 + sum r positions (N + K taps)``. F are the multiply-accumulates of convolutions and linear layers of one call and one
operation a bias addition; attention products and rotations are not in it. For WxAy with x != y, parameters take x and operations max(x, y).

*The exact one* (``params_exact_m``, ``macs_exact_g``): every number at the precision that it is really kept or multiplied in: quantized
weights at their bits; branch, biases, norms, unquantized layers at 32 bits; scales, zero points, rotation signs as a checkpoint file holds
them (:func:`qvsr.quant.checkpoint.stored_bits`); attention products and rotations counted, at 32 bits. The constant that an offset leaves
(:mod:`qvsr.quant.layer`) is stored tap by tap and counted so; its map is the same for every frame, laid out once a size and added with the
bias, so its operations are the bias's.

The counting works on a plain list of :class:`LayerFact`, which :func:`count` takes from a model by hooks, on the meta device too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qvsr.quant.apply import excluded
from qvsr.quant.checkpoint import contents, stored_bits
from qvsr.quant.layer import KINDS, QuantLayer, halves
from qvsr.quant.rotation import can_rotate

if TYPE_CHECKING:
    from qvsr.config import Config, UNetSettings

FULL = 32  # bits of what is not quantized
FLOAT_BITS = 32
MERGING = ("efficientdm",)  # methods whose low-rank update ends up in the integers: nothing of its rank is stored or computed


class CostError(ValueError):
    """A model whose cost cannot be counted."""


@dataclass(frozen=True)
class LayerFact:
    """What the cost of one layer depends on.

    Attributes:
        name, kind: as in the network; Linear, Conv1d, Conv2d or Conv3d.
        weight_shape: (N, K / groups, *kernel).
        positions: output positions in one call of the network, all frames together; 0 if the layer was not reached.
        input_positions: the same at its input; a rotation acts there.
        bias: number of bias values.
        weight_bits, act_bits: 32 where not quantized.
        rank: of the low-rank branch, 0 without one.
        rotated: sizes of the input-channel groups that are rotated.
        side_bits: bits that a checkpoint file takes for scales, zero points, signs, offsets and the like: for all but weight, branch and bias.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    positions: int
    input_positions: int = 0
    bias: int = 0
    weight_bits: int = FULL
    act_bits: int = FULL
    rank: int = 0
    rotated: tuple[int, ...] = ()
    side_bits: int = 0

    @property
    def quantized(self) -> bool:
        return self.weight_bits < FULL

    @property
    def weights(self) -> int:
        return math.prod(self.weight_shape)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the layer itself."""
        return self.weights * self.positions

    @property
    def stored_bits(self) -> int:
        """Everything that a checkpoint file holds for the layer, the bias too."""
        return self.weights * self.weight_bits + (self.bias + self.branch_params) * FULL + self.side_bits

    @property
    def branch_params(self) -> int:
        return self.rank * (self.weight_shape[0] + math.prod(self.weight_shape[1:]))

    @property
    def branch_macs(self) -> int:
        return self.branch_params * self.positions

    @property
    def rotation_macs(self) -> int:
        """By dense matrices, as the simulated layer computes them; a fast transform needs n log n."""
        return self.input_positions * sum(size * size for size in self.rotated)


@dataclass(frozen=True)
class Facts:
    """A network's layers, its remaining parameters (norms, mixing weights) and the multiply-accumulates of its attention products."""

    layers: tuple[LayerFact, ...]
    other_params: int
    attention_macs: int


@dataclass(frozen=True)
class Cost:
    """One row of the cost table. Parameters in 1e6, multiply-accumulates of one network call in 1e9, in 32-bit equivalents."""

    method: str
    bits: str
    params_m: float
    macs_g: float
    attention_macs_g: float
    rotation_macs_g: float
    rank_mean: float
    params_exact_m: float
    macs_exact_g: float
    quantized_layers: int
    layers: int

    def row(self) -> dict[str, Any]:
        return asdict(self)


class _AttentionCounter(TorchFunctionMode):
    """Counts the two products of every scaled_dot_product_attention, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (named[name].shape for name in ("query", "key", "value"))
            self.macs += math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
        return func(*args, **kwargs)


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """Linear, convolution and quantized layers by name; what lies inside a quantized layer belongs to it."""
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if isinstance(child, (QuantLayer, *KINDS)):
                found[prefix + name] = child
            else:
                walk(child, f"{prefix}{name}.")

    walk(network, "")
    return found


def count(network: nn.Module, *inputs: Any) -> Facts:
    """Facts of a network from one forward pass; values do not matter, so it may be on the meta device.

    Args:
        network: full precision or with quantized layers.
        inputs: what its forward takes; see :func:`example_inputs`.
    Raises:
        CostError: nothing that can be counted in it.
    """
    layers = layers_of(network)
    if not layers:
        raise CostError(f"{type(network).__name__} has no linear, convolution or quantized layer to count")
    outputs: dict[str, int] = dict.fromkeys(layers, 0)
    entries: dict[str, int] = dict.fromkeys(layers, 0)

    with ExitStack() as stack, torch.no_grad():
        for name, layer in layers.items():

            def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                shape = _weight_shape(layer)
                outputs[name] += output.numel() // shape[0]
                entries[name] += args[0].numel() // (shape[1] * getattr(layer, "groups", 1))

            stack.callback(layer.register_forward_hook(note).remove)
        attention = stack.enter_context(_AttentionCounter())
        network(*inputs)

    facts = tuple(_fact(name, layer, outputs[name], entries[name]) for name, layer in layers.items())
    return Facts(facts, _other_params(network, layers), attention.macs)


def _other_params(network: nn.Module, layers: Mapping[str, nn.Module]) -> int:
    """Parameters that belong to none of the layers: norms and the like."""
    own = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    return sum(parameter.numel() for parameter in network.parameters() if id(parameter) not in own)


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    return layer.geometry.weight_shape if isinstance(layer, QuantLayer) else tuple(layer.weight.shape)  # type: ignore[arg-type]


def _fact(name: str, layer: nn.Module, positions: int, input_positions: int) -> LayerFact:
    if not isinstance(layer, QuantLayer):
        bias = layer.bias.numel() if isinstance(layer.bias, Tensor) else 0
        return LayerFact(name, KINDS[type(layer)], _weight_shape(layer), positions, input_positions, bias)
    total = layer._total_bias()
    # a call adds one row of a bias table; the others are stored beside it
    rows = len(total) if total is not None and total.dim() == 2 else 1
    stored = stored_bits(layer)
    return LayerFact(
        name,
        layer.geometry.kind,
        layer.geometry.weight_shape,
        positions,
        input_positions,
        bias=0 if total is None else total.shape[-1],
        weight_bits=layer.weight_bits,
        act_bits=layer.act_bits,
        rank=layer.rank,
        rotated=tuple(size for size, yes in zip(layer.parts, layer.rotated, strict=True) if yes),
        side_bits=sum(bits for role, bits in stored.items() if role not in ("weight", "up", "down", "bias"))
        + stored.get("bias", 0) * (rows - 1) // rows,
    )


def plan(
    facts: Facts,
    weight_bits: int,
    act_bits: int,
    exclude: Sequence[str] = (),
    rank: int | Mapping[str, int] = 0,
    split: bool = False,
    rotate: bool = False,
    forms: int = 1,
) -> Facts:
    """The facts of a network as if it were quantized; needs no weights.

    What only calibration makes is left out: smoothing scales, offsets, static activation ranges, and the biases that an alignment gives to
    layers without one.

    Args:
        facts: of the network at full precision.
        exclude: layers that stay at full precision, by name prefix.
        rank: of every layer, or by layer name; a layer gets no more than its weight allows.
        split: input channels in two halves, each with its own scales.
        rotate: rotate the parts for which a Hadamard matrix exists.
        forms: of each layer, of which a call takes one (:mod:`qvsr.quant.by_timestep`).
    """

    def quantize(layer: LayerFact) -> Sequence[LayerFact]:
        if excluded(layer.name, exclude):
            return [layer]
        outputs, inputs = layer.weight_shape[:2]
        parts = halves(inputs) if split else (inputs,)
        rotated = tuple(size for size in parts if rotate and can_rotate(size))
        wanted = rank if isinstance(rank, int) else rank[layer.name]
        planned = replace(
            layer,
            weight_bits=weight_bits,
            act_bits=act_bits,
            rank=min(wanted, outputs, math.prod(layer.weight_shape[1:])),
            rotated=rotated,
            # zero points fit a byte where every channel's range holds 0, which only the weights themselves can tell; a sign is a bit
            side_bits=(FLOAT_BITS + 8) * outputs * len(parts) + (8 * math.ceil(inputs / 8) if rotated else 0),
        )
        if forms == 1:
            return [planned]
        first, *others = (replace(planned, name=f"{layer.name}.rows.{row}") for row in range(forms))
        return [first, *(replace(other, positions=0, input_positions=0) for other in others)]

    return replace(facts, layers=tuple(one for layer in facts.layers for one in quantize(layer)))


def cost(facts: Facts, method: str, bits: str) -> Cost:
    """The row of a network in both countings; see the module's docstring.

    Args:
        bits: the row's name, such as W4A4; the published counting also takes unquantized layers times these bits.

    >>> layer = LayerFact("l", "Linear", (100, 100), positions=10, weight_bits=4, act_bits=4, rank=1)
    >>> row = cost(Facts((layer,), other_params=0, attention_macs=0), "quantvsr", "W4A4")
    >>> round(row.params_m * 1e6), round(row.macs_g * 1e9)  # 10000 * 4/32 + 200, ten times that
    (1450, 14500)
    """
    nominal_weight, nominal_act = (int(part) for part in bits.removeprefix("W").split("A"))
    nominal = max(nominal_weight, nominal_act)
    params = float(facts.other_params * nominal_weight)
    exact_params, macs, exact_macs = float(facts.other_params * FULL), 0.0, float(facts.attention_macs * FULL)
    for layer in facts.layers:
        own = (layer.weight_bits, max(layer.weight_bits, layer.act_bits)) if layer.quantized else (nominal_weight, nominal)
        bias_additions = layer.bias * layer.positions
        params += layer.weights * own[0] + layer.bias * nominal_weight + layer.branch_params * FULL
        macs += layer.macs * own[1] + bias_additions * nominal + layer.branch_macs * FULL
        exact_params += layer.stored_bits
        exact_macs += (
            layer.macs * max(layer.weight_bits, layer.act_bits) + (bias_additions + layer.branch_macs + layer.rotation_macs) * FULL
        )
    quantized = [layer for layer in facts.layers if layer.quantized]
    return Cost(
        method,
        bits,
        params_m=params / FULL / 1e6,
        macs_g=macs / FULL / 1e9,
        attention_macs_g=facts.attention_macs / 1e9,
        rotation_macs_g=sum(layer.rotation_macs for layer in quantized) / 1e9,
        rank_mean=sum(layer.rank for layer in quantized) / len(quantized) if quantized else 0.0,
        params_exact_m=exact_params / FULL / 1e6,
        macs_exact_g=exact_macs / FULL / 1e9,
        quantized_layers=len(quantized),
        layers=len(facts.layers),
    )


def example_inputs(
    settings: UNetSettings, tile: int, context_tokens: int, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Zeros for one call of the U-Net: one segment of frames of a square latent tile, as the sampler calls it.

    Returns:
        x (T, C, tile, tile), t (1,), context (1, tokens, D), structure maps by width.
    """
    frames = settings.num_frames
    widths = [tile >> level for level in range(len(settings.channel_mult))]
    if tile % (1 << (len(widths) - 1)):
        raise CostError(f"sampling.tile {tile} is no multiple of {1 << (len(widths) - 1)}, which {len(widths)} levels of the U-Net need")
    return (
        torch.zeros(frames, settings.in_channels, tile, tile, device=device),
        torch.zeros(1, dtype=torch.long, device=device),
        torch.zeros(1, context_tokens, settings.context_dim, device=device),
        {str(width): torch.zeros(frames, settings.semb_channels, width, width, device=device) for width in widths},
    )


@functools.cache
def full_facts(settings: UNetSettings, tile: int, context_tokens: int) -> Facts:
    """Facts of the full-precision U-Net, counted on the meta device."""
    from qvsr.models.unet import InflatedUNet

    with torch.device("meta"):
        unet = InflatedUNet(settings).eval()
    return count(unet, *example_inputs(settings, tile, context_tokens, "meta"))


def stored_costs(paths: Sequence[Path], config: Config) -> list[Cost]:
    """The row of full precision, and of each quantized checkpoint with the ranks and bits that it has."""
    full = full_facts(config.backbone.unet, config.sampling.tile, config.backbone.context_tokens)
    found = [checkpoint_facts(path, config) for path in paths]
    return [cost(full, "full_precision", "W32A32"), *(cost(facts, header["method"], header["bits"]) for header, facts in found)]


def checkpoint_facts(path: Path, config: Config) -> tuple[dict[str, Any], Facts]:
    """Header of a quantized checkpoint, and facts of the U-Net with its layers, by one call on a tile of the configured size.

    Nothing is computed and no weight read: the file says what its layers are, and how often each is applied follows from the network's sizes. Of
    a layer with forms by timestep the first one runs.

    Raises:
        CostError: the file is of another network than the configuration's.
    """
    header, stored = contents(path)
    full = full_facts(config.backbone.unet, config.sampling.tile, config.backbone.context_tokens)
    facts, left = [], dict(header["layers"])
    for layer in full.layers:
        forms = len(header.get("by_timestep", {}).get(layer.name, ()))
        names = [f"{layer.name}.rows.{form}" for form in range(forms)] or [layer.name] * (layer.name in left)
        facts += [layer] if not names else []
        for place, name in enumerate(names):
            described = left.pop(name)
            if tuple(described["shape"]) != layer.weight_shape:
                found = f"{name} {tuple(described['shape'])}, the configuration has {layer.weight_shape}"
                raise CostError(f"{path} is of another network: {found}; give the configuration that it was made with")
            runs = place == 0
            applied = replace(layer, name=name, positions=layer.positions * runs, input_positions=layer.input_positions * runs)
            facts.append(_stored_fact(applied, described, stored[name]))
    if left:
        raise CostError(f"{path} is of another network: the configuration has no {min(left)}; give the configuration that it was made with")
    return header, replace(full, layers=tuple(facts))


def _stored_fact(layer: LayerFact, described: Mapping[str, Any], stored: Mapping[str, tuple[tuple[int, ...], int]]) -> LayerFact:
    """A layer as :meth:`qvsr.quant.layer.QuantLayer.describe` and the shapes and bits of its tensors tell."""
    shape, bits = stored.get("bias", ((0,), 0))
    rows = shape[0] if len(shape) == 2 else 1  # a call adds one row of a bias table; the others are stored beside it
    return replace(
        layer,
        bias=shape[-1],
        weight_bits=described["weight_bits"],
        act_bits=described["act_bits"],
        rank=described["rank"],
        rotated=tuple(size for size, yes in zip(described["parts"], described["rotated"], strict=True) if yes),
        side_bits=sum(size for role, (_, size) in stored.items() if role not in ("weight", "up", "down", "bias"))
        + bits * (rows - 1) // rows,
    )


def planned_costs(config: Config, rank: int | None = None) -> list[Cost]:
    """The rows of a whole configuration without weights: full precision, then every method at every bits.

    Args:
        rank: of every low-rank branch; default: the method's own, its smallest where the allocation needs calibration.
    """
    return [cost(facts, method, bits) for method, bits, facts in planned_facts(config, rank)]


def planned_facts(config: Config, rank: int | None = None) -> list[tuple[str, str, Facts]]:
    """Method, bits and facts of every row of :func:`planned_costs`."""
    from qvsr.config import parse_bits

    facts = full_facts(config.backbone.unet, config.sampling.tile, config.backbone.context_tokens)
    rows = [("full_precision", "W32A32", facts)]
    for bits in config.bits:
        for method in config.methods:
            if method in ("full_precision", "bicubic", *config.external):
                continue
            base, own = config.resolve_method(method)
            smallest = getattr(own, "rank_min", getattr(own, "rank", 0))  # a range of ranks, one rank, or no branch
            branch = getattr(own, "branch", smallest > 0) and base not in MERGING
            planned = plan(
                facts,
                *parse_bits(bits),
                exclude=config.method.exclude,
                rank=(smallest if rank is None else rank) if branch else 0,
                split=getattr(own, "channel_split", False),
                rotate=getattr(own, "rotation", False),
                forms=max(1, len(getattr(own, "timestep_bounds", ()))),
            )
            rows.append((method, bits, planned))
    return rows
