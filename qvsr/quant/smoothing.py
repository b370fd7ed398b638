"""Smoothing: move the spread of the input channels from the activations into the weights, or back (SmoothQuant, arXiv 2211.10438).

    x W^T = (x / smooth) (W smooth)^T,     one positive factor a channel

is exact before rounding; :class:`qvsr.quant.layer.QuantLayer` divides by the factors and holds the weight multiplied by them. All methods here
take ``smooth = amax^alpha / wmax^beta`` from the largest magnitude of each input channel in the activations and in the weight:

- SVDQuant (arXiv 2411.05007) searches alpha and beta per layer: ``(0, 0)``, ``(a, 0)`` and ``(a, 1 - a)`` for a in 0.05 … 0.95.
- ViDiT-Q (arXiv 2406.02540) multiplies the input by ``wmax^a / amax^(1-a)``, which is alpha = 1 - a, beta = a.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qvsr.progress import progress
from qvsr.quant.by_timestep import row_of
from qvsr.quant.layer import QuantError
from qvsr.quant.observe import observe_inputs
from qvsr.quant.refine import Samples, call


def weight_amax(weight: Tensor) -> Tensor:
    """Largest magnitude of each input channel ``(K,)`` over the outputs and taps of a weight ``(N, K, *kernel)``."""
    return weight.detach().abs().transpose(0, 1).flatten(1).amax(1)


def channel_amax(x: Tensor, linear: bool) -> Tensor:
    """Largest magnitude of each channel in each item of axis 0: ``(B, K)`` of tokens ``(B, …, K)`` or maps ``(B, K, …)``."""
    channels_first = x.detach().movedim(-1, 1) if linear else x.detach()
    return channels_first.reshape(*x.shape[:1], channels_first.shape[1], -1).abs().amax(2)


@torch.no_grad()
def input_amax(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    samples: Samples,
    bounds: Sequence[int] = (),
    ema: float | None = None,
) -> dict[str, Tensor]:
    """Largest magnitude of each input channel of layers, from recorded calls of the full-precision network.

    Args:
        layers: of the network, by name.
        bounds: S upper bounds of timestep groups in rising order (:func:`qvsr.quant.by_timestep.row_of`); empty: one group.
        ema: None: the largest of all calls. Else as in ViDiT-Q: the mean over the items of axis 0, which are frames (pixels in temporal
            attention), and over calls the moving average ``ema·old + (1 - ema)·new`` that starts at the first call.
    Returns:
        ``(S, K)`` by layer name; S is 1 without bounds.
    Raises:
        QuantError: no samples, a group without samples, a call at two timesteps, or a layer that the network does not reach.
    """
    if len(samples) == 0:
        raise QuantError("smoothing: the calibration set is empty")
    rows = max(1, len(bounds))
    found: dict[str, list[Tensor | None]] = {name: [None] * rows for name in layers}
    row, seen = 0, set()

    def see(name: str, x: Tensor) -> None:
        amax, old = channel_amax(x, isinstance(layers[name], nn.Linear)), found[name][row]
        new = amax.amax(0) if ema is None else amax.mean(0)
        if old is not None:
            new = torch.maximum(old, new) if ema is None else torch.lerp(new, old, ema)
        found[name][row] = new

    with observe_inputs(layers, see), progress("channel ranges") as report:
        for index in range(len(samples)):
            sample = samples[index]
            if rows > 1:
                row = row_of(sample.t, bounds)
            seen.add(row)
            call(network, sample)
            report(index + 1, len(samples))
    if len(seen) < rows:
        missing = min(set(range(rows)) - seen)
        raise QuantError(
            f"no calibration sample in the timestep group up to {bounds[missing]} of {list(bounds)}; raise calibration.steps or change the bounds"
        )
    result = {}
    for name, kept in found.items():
        complete = [one for one in kept if one is not None]
        if len(complete) < rows:
            raise QuantError(f"{name}: did not run in the calibration samples of every timestep group, so it has no channel range")
        result[name] = torch.stack(complete)
    return result


def factors(amax_K: Tensor, wmax_K: Tensor, alpha: float, beta: float) -> Tensor:
    """Smoothing factors ``amax^alpha / wmax^beta`` with geometric mean 1, in the dtype of `wmax_K`.

    The mean changes nothing (a common factor cancels between input and weight) but keeps both in their own range, where the floor of the
    scales is as harmless as without smoothing. A channel that is 0 throughout in the input or the weight keeps 1.

    Args:
        amax_K, wmax_K: ``(K,)``, at least 0.

    >>> factors(torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 1.0]), 0.5, 0.5).tolist()
    [2.0, 0.5, 1.0]
    """
    a, w = amax_K.double(), wmax_K.double()
    alive = (a > 0) & (w > 0)
    exponent = torch.where(alive, alpha * a.log() - beta * w.log(), 0.0)
    return torch.where(alive, (exponent - exponent[alive].mean()).exp(), 1.0).to(wmax_K.dtype)
