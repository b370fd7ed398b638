"""Layers whose rounding is trained together with what it rounds: QALoRA and TALSQ of EfficientDM (arXiv 2310.03270).

QALoRA: the weight is ``Q(W0 + B A)``. B (N, R) and A (R, K, *kernel) are added *before* rounding, so they end up in the integers and cost
nothing at run time. The scales of the output channels are trained too, their zero points are not.

TALSQ: the input of each layer has one (scale, zero point) for each of a few ranges of timesteps. A call at a timestep uses and trains the
one of its range; the others stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qvsr.quant import affine, low_rank
from qvsr.quant.by_timestep import row_of
from qvsr.quant.layer import QuantError, QuantLayer
from qvsr.quant.reconstruct import check_plain


class _RoundTrained(torch.autograd.Function):
    """One node instead of eight: activations are as large as the network's maps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
        position = x / scale
        whole = position.round()
        q = whole + zero_point
        level = q.clamp(0, top)
        inside = q.eq_(level).bool()
        level.sub_(zero_point)
        ctx.save_for_backward(inside, torch.where(inside, whole.sub_(position), level), scale)
        return level.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (gradient,), (inside, slope, scale) = gradients, ctx.saved_tensors
        passed = gradient * inside
        by_scale = by_zero_point = None
        if ctx.needs_input_grad[1]:
            by_scale = (slope * gradient).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            by_zero_point = (passed.sum_to_size(scale.shape) - gradient.sum_to_size(scale.shape)) * scale
        return passed if ctx.needs_input_grad[0] else None, by_scale, by_zero_point, None


def round_trained(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """:func:`qvsr.quant.affine.fake_quantize` with gradients for `x`, `scale` and `zero_point` (LSQ, arXiv 1902.08153, with an offset).

    The rounding passes gradients straight through. Inside the range `x` gets the whole gradient and `scale` the rounding error; beyond
    it `scale` gets the outermost level and `zero_point`, which is rounded to a whole number first and shaped as `scale`, the range's shift.
    """
    whole = zero_point + (zero_point.round() - zero_point).detach()
    result: Tensor = _RoundTrained.apply(x, scale, whole, affine.levels(bits))  # type: ignore[no-untyped-call]
    return result


class StepGrids:
    """Scales and zero points of all layers' inputs, one row for each range of timesteps.

    A row is a parameter of its own, so that an optimizer leaves alone the rows that a call did not use.

    Args:
        layers: by name, each with one static range and one part; every row starts from it.
        bounds: upper bounds of the ranges of timesteps, in rising order, as :meth:`QuantLayer.set_static_activations` takes them.
    Attributes:
        scales, zero_points: ``(L,)`` a row, for L layers; zero points are not whole while they are trained.
        row: in use.
    """

    def __init__(self, layers: Mapping[str, QuantLayer], bounds: Sequence[int]) -> None:
        for layer in layers.values():
            if len(layer.parts) != 1 or layer.act_scale is None or len(layer.act_scale) != 1:
                raise QuantError(f"{layer.name}: grids by timestep start from one static range of one part; set it first")
        if not bounds or list(bounds) != sorted(set(bounds)):
            raise QuantError(f"grids by timestep: bounds {list(bounds)} do not rise")
        self.layers, self.bounds, self.row = dict(layers), tuple(bounds), 0
        self._index = {name: index for index, name in enumerate(layers)}
        self._floor = torch.tensor([layer.scale_floor for layer in layers.values()])
        scale = torch.cat([layer.act_scale[0] for layer in layers.values()])  # type: ignore[index]
        zero_point = torch.cat([layer.act_zero_point[0] for layer in layers.values()])  # type: ignore[index]
        self._floor = self._floor.to(scale)
        self.scales = [nn.Parameter(scale.clone(), requires_grad=False) for _ in bounds]
        self.zero_points = [nn.Parameter(zero_point.clone(), requires_grad=False) for _ in bounds]

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """Scale, never below the layer's smallest, and zero point of a layer in the row in use, both ``()``."""
        index = self._index[name]
        return self.scales[self.row][index].clamp_min(self.layers[name].scale_floor), self.zero_points[self.row][index]

    @contextmanager
    def follow(self, network: nn.Module) -> Iterator[None]:
        """Within the block every call of the network takes the row of its timestep, which is its second argument."""

        def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self.row = row_of(args[1], self.bounds)

        handle = network.register_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def give(self) -> None:
        """Hand the grids to the layers as static tables, zero points as whole numbers."""
        scales = torch.stack([row.detach().maximum(self._floor) for row in self.scales])
        zero_points = torch.stack([row.detach().round() for row in self.zero_points])
        for name, layer in self.layers.items():
            scale, zero_point = (table[:, self._index[name], None] for table in (scales, zero_points))
            top = affine.levels(layer.act_bits)
            layer.set_static_activations(-zero_point * scale, (top - zero_point) * scale, self.bounds)
            # the range gives the grid back to float rounding only
            layer.act_scale, layer.act_zero_point = scale.clone(), zero_point.clone()


class AdaptedLayer(nn.Module):
    """Stands in a network for a layer whose weight is ``Q(W0 + B A)`` while B, A and the weight's scales are trained.

    Args:
        module: the floating-point layer; its bias is used, its weight is not changed.
        layer: the open quantized layer of the same weight, with one part, without smoothing, rotation and branch; says how to round.
        grids: round the input.
        name: of the layer in `grids`.
        rank: R; no more than the weight can have is used. B starts as 0, A as PyTorch starts the weight of a Linear layer. 0: no B and A.
        rounded: W0 is the rounded weight instead of the floating-point one.
        seed: of A, drawn per layer name.
    """

    def __init__(
        self, module: nn.Module, layer: QuantLayer, grids: StepGrids, name: str, rank: int, rounded: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        check_plain(layer)
        if layer.weight is None or len(layer.parts) != 1:
            raise QuantError(f"{name}: B and A are trained beside the floating-point weight of one part; this layer is frozen or has more")
        self.module, self.grids, self.name = module, grids, name
        self.layer = [layer]  # in a list, so that it is no submodule
        weight, self.zero_point = layer.weight, layer.weight_zero_point.view(-1, *(1,) * (layer.weight.dim() - 1))
        self.scale = nn.Parameter(layer.weight_scale.view_as(self.zero_point).clone(), requires_grad=False)
        with torch.no_grad():
            self.base = affine.fake_quantize(weight, self.scale, self.zero_point, layer.weight_bits) if rounded else weight
        rank = min(rank, low_rank.rank_limit(weight))
        key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        down = torch.empty(rank, *weight.shape[1:]).uniform_(-1, 1, generator=generator) / weight[0].numel() ** 0.5
        self.down = nn.Parameter(down.to(weight), requires_grad=False)
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`QuantLayer.forward`; gradients reach `x`, B, A, the weight's scales and the row of the grids in use."""
        rounded = round_trained(x, *self.grids.of(self.name), self.layer[0].act_bits)
        out: Tensor = functional_call(self.module, {"weight": self.weight()}, (rounded,))
        return out

    def weight(self) -> Tensor:
        """``Q(W0 + B A)``."""
        return round_trained(self._sum(), self._scale(), self.zero_point, self.layer[0].weight_bits)

    @torch.no_grad()
    def give(self) -> None:
        """Freeze the layer with what was learned: scales and the integers of ``W0 + B A``. The input's grid comes from :meth:`StepGrids.give`."""
        layer = self.layer[0]
        layer.weight_scale = self._scale().detach().view(-1, 1).clone()
        layer.set_integers(affine.quantize(self._sum(), self._scale(), self.zero_point, layer.weight_bits))

    def _sum(self) -> Tensor:
        return self.base + low_rank.product(self.up, self.down)

    def _scale(self) -> Tensor:
        return self.scale.clamp_min(self.layer[0].scale_floor)
