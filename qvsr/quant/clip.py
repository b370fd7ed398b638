"""Factors that narrow dynamic activation ranges, chosen on calibration samples.

The smallest and the largest of some 100,000 values lie far out: with 16 levels between them most levels are hardly used. A range cut to a
share of itself costs a few values their tails and gives all others a finer step. The share that is best hardly changes from call to call, so
it is found once for each layer and part, and narrows the range of every later call (the range itself stays that of the call).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qvsr.quant import affine
from qvsr.quant.layer import QuantError, QuantLayer
from qvsr.quant.observe import observe_inputs
from qvsr.quant.refine import Samples, call

FACTORS = tuple(1 - k / 20 for k in range(16))
VALUES = 4096
POWER = 2.0


@torch.no_grad()
def search_clips(
    network: nn.Module,
    layers: Mapping[str, QuantLayer],
    samples: Samples,
    bits: Sequence[int],
    weights: Sequence[float] | None = None,
    power: float = POWER,
    values: int = VALUES,
    seed: int = 0,
) -> dict[str, dict[int, Tensor]]:
    """The factor of least squared rounding error of each layer's input, for every part and number of bits.

    Args:
        network: runs as it is; the inputs of its modules of the layers' names are taken, whatever these modules are.
        layers: say how an input is transformed, cut into parts, and what shares a range.
        bits: activation bits to find factors for.
        weights: of each sample's error, by sample; None: all 1.
        values: score at most this many values of a part and call, drawn by `seed`; the ranges are over all.
    Returns:
        factors ``(P,)`` by layer and bits; 1 where narrowing does not help.
    Raises:
        QuantError: a layer that never ran.
    """
    errors = {name: torch.zeros(len(bits), len(layer.parts), len(FACTORS), dtype=torch.float64) for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(seed)
    ran: set[str] = set()
    weight, factors = 1.0, torch.tensor(FACTORS)[:, None]

    def score(name: str, x: Tensor) -> None:
        layer = layers[name]
        ran.add(name)
        for part, piece in enumerate(layer.input_parts(layer.as_ranged(x))):
            low, high = (end.expand_as(piece).flatten() for end in layer.act_range(piece))
            flat = piece.flatten()
            if flat.numel() > values:
                drawn = torch.randint(flat.numel(), (values,), generator=generator).to(flat.device)
                flat, low, high = flat[drawn], low[drawn], high[drawn]
            for row, width in enumerate(bits):
                grid = layer.act_grid(low * factors, high * factors, width)  # (factors, values)
                error = (flat - affine.round_to_grid(flat, *grid, width)).abs_().pow_(power).mean(1)
                errors[name][row, part] += weight * error.double().cpu()

    with observe_inputs({name: network.get_submodule(name) for name in layers}, score):
        for index in range(len(samples)):
            weight = 1.0 if weights is None else weights[index]
            call(network, samples[index])
    for name in layers:
        if name not in ran:
            raise QuantError(f"{name}: never ran on the {len(samples)} calibration samples, so no factor can be chosen for its range")
    choices = torch.tensor(FACTORS)
    return {name: {width: choices[found[row].argmin(1)] for row, width in enumerate(bits)} for name, found in errors.items()}
