"""How much the rounding of each layer moves the network's output, for every number of bits, from a few backward passes.

Rounding a layer's inputs by dx and its weight by dw moves the network's output by ``J_x dx + J_w dw`` to first order. For a random vector r of
signs over the output, ``E (r · J d)^2 = |J d|^2``, and ``r · J d = (J^T r) · d`` needs one backward pass for all layers and all numbers of bits at
once. What different positions of an input, and different output channels of a weight, contribute is taken to be independent: their squares
are summed, which makes a few such vectors enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qvsr.progress import progress
from qvsr.quant import affine, apply
from qvsr.quant.layer import QuantError, QuantLayer
from qvsr.quant.refine import Samples, call
from qvsr.quant.search import weight_range


@dataclass(frozen=True)
class Sensitivity:
    """Mean squared change of the network's output, float64 ``(L, B)`` for L layers and B numbers of bits: by rounding a layer's weight,
    by rounding its inputs; and the output positions of a layer in one call, all samples' mean."""

    names: tuple[str, ...]
    weights_LB: Tensor
    inputs_LB: Tensor
    positions_L: Tensor


class Unrounded(nn.Module):
    """An open quantized layer that computes without rounding, in its rotated form: what it rounds is at hand to take derivatives of."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.layer = layer
        self.residual = layer.rounding()[0].view(layer.geometry.weight_shape).requires_grad_(True)
        self.inputs: list[Tensor] = []
        self.positions = 0

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        self.inputs = [piece if piece.requires_grad else piece.requires_grad_(True) for piece in layer.input_parts(layer.as_ranged(x))]
        y = layer.unrounded(x, self.inputs, self.residual)
        self.positions = y.numel() // layer.geometry.out_channels
        return y


def measure(
    network: nn.Module,
    layers: Mapping[str, QuantLayer],
    samples: Samples,
    bits: Sequence[int],
    clips: Mapping[str, Mapping[int, Tensor]] | None = None,
    weights: Sequence[float] | None = None,
    searched_weights: bool = False,
    probes: int = 2,
    seed: int = 0,
) -> Sensitivity:
    """Sensitivity of every layer on calibration samples.

    Args:
        network: full precision; the layers' modules are exchanged for the time of the measurement.
        layers: open layers by name, which say how weights and inputs are transformed.
        bits: numbers of bits to measure, for weights and inputs alike.
        clips: factors of the activation ranges by layer and bits (:func:`qvsr.quant.clip.search_clips`).
        weights: of each sample's error, by sample; None: all 1.
        searched_weights: weight ranges by :func:`qvsr.quant.search.weight_range`; else minimum to maximum.
        probes: random vectors a sample.
    """
    if len(samples) == 0:
        raise QuantError("sensitivity needs calibration samples, the set is empty")
    names = tuple(layers)
    wrapped = {name: Unrounded(layer) for name, layer in layers.items()}
    rounding = {name: _weight_errors(layer, bits, searched_weights) for name, layer in layers.items()}
    of_weights, of_inputs = (torch.zeros(len(names), len(bits), dtype=torch.float64) for _ in range(2))
    positions = torch.zeros(len(names), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with apply.exchanged(network, wrapped), progress("sensitivity") as report, torch.enable_grad():
        for index in range(len(samples)):
            share = (1.0 if weights is None else weights[index]) / len(samples) / probes
            out = call(network, samples[index])
            share /= out.numel()
            places = [(name, part) for name, unit in wrapped.items() for part in range(len(unit.inputs))]
            wanted = [unit.residual for unit in wrapped.values()] + [wrapped[name].inputs[part] for name, part in places]
            gradients = []
            for probe in range(probes):
                signs = torch.randint(2, out.shape, generator=generator).to(out) * 2 - 1
                gradients.append(torch.autograd.grad(out, wanted, signs, retain_graph=probe + 1 < probes, allow_unused=True))
            with torch.no_grad():
                for row, name in enumerate(names):
                    found = [one[row] for one in gradients if one[row] is not None]
                    of_weights[row] += share * _moved([g.flatten(1) for g in found], [e.flatten(1) for e in rounding[name]], 1)
                for column, (name, part) in enumerate(places, len(names)):
                    found = [one[column] for one in gradients if one[column] is not None]
                    axis = -1 if layers[name].is_linear else 1
                    errors = _input_errors(wrapped[name], part, bits, (clips or {}).get(name)) if found else []
                    of_inputs[names.index(name)] += share * _moved(found, errors, axis)
            positions += torch.tensor([unit.positions for unit in wrapped.values()], dtype=torch.float64) / len(samples)
            report(index + 1, len(samples))
    return Sensitivity(names, of_weights, of_inputs, positions)


def _moved(gradients: Sequence[Tensor], errors: Sequence[Tensor], axis: int) -> Tensor | float:
    """Summed squares of the products of gradient and error along an axis: one value for each error, over all gradients."""
    if not gradients:  # the network's output does not depend on it
        return 0.0
    return (
        torch.stack([torch.stack([(gradient * error).sum(axis).square().sum() for gradient in gradients]).sum() for error in errors])
        .double()
        .cpu()
    )


@torch.no_grad()
def _weight_errors(layer: QuantLayer, bits: Sequence[int], searched: bool) -> list[Tensor]:
    """What rounding changes in a layer's rotated weight, for each number of bits."""
    residual, errors = layer.rounding()[0].view(layer.geometry.weight_shape), []
    for width in bits:
        parts = []
        for piece in residual.split(layer.parts, 1):
            low, high = weight_range(piece, width, layer.scale_floor) if searched else affine.channel_range(piece)
            if layer.weight_symmetric:
                low, high = affine.symmetric_range(low, high, width)
            parts.append(affine.round_to_grid(piece, *affine.qparams(low, high, width, layer.scale_floor), width) - piece)
        errors.append(torch.cat(parts, 1))
    return errors


def _input_errors(unit: Unrounded, part: int, bits: Sequence[int], clips: Mapping[int, Tensor] | None) -> list[Tensor]:
    """What rounding changes in a part of the layer's input, for each number of bits."""
    piece, errors = unit.inputs[part].detach(), []
    low, high = unit.layer.act_range(piece)
    for width in bits:
        factor = 1.0 if clips is None else float(clips[width][part])
        errors.append(affine.round_to_grid(piece, *unit.layer.act_grid(low * factor, high * factor, width), width) - piece)
    return errors
