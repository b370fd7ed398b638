"""One iteration of QuantVSR's refinement, thin layers against a dense L1 L2: python benchmarks/refinement.py [threads]

An iteration is what the refinement repeats: forward and backward pass of the default U-Net on one sample, gradients of L1 and L2 of all
layers, one step of AdamW. *thin* is qvsr's layer. *dense* forms the weight L1 L2, convolves with it at full size beside the low-bit weight,
and rotates the difference of weights, with qvsr's rounding. *released* is dense too and rounds as the released code of arXiv 2508.04485
does: every step of the quantizers an operation of autograd's own. All have the same weights, ranks and sample, and their losses are
compared first. *floor* has no branch and trains nothing: forward and backward pass through the same rounded layers, which any way of
training a branch needs. Rounds alternate, so that a busy machine slows all alike; the ratios are the result.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvsr.config import load
from qvsr.models.checkpoints import load_backbone
from qvsr.quant import apply, low_rank
from qvsr.quant.cost import example_inputs
from qvsr.quant.layer import _CONV, LayerPlan, QuantLayer, halves

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 7
RANK = 8


class DenseLayer(QuantLayer):
    """The same layer with the branch as one dense weight."""

    def _residual(self) -> Tensor:
        assert self.weight is not None and self.up is not None and self.down is not None
        return self._rotate_weight(self.weight - low_rank.product(self.up, self.down))

    def _linear(self, x: Tensor) -> Tensor:
        low_bit = F.linear(torch.cat(self.quantized_inputs(x), -1), torch.cat(self.quantized_weights(), 1), self.bias)
        return low_bit + F.linear(x, low_rank.product(self.up, self.down))  # type: ignore[arg-type]

    def _convolution(self, x: Tensor) -> Tensor:
        convolve = _CONV[len(self.geometry.kernel)]
        how = (self.geometry.stride, self.geometry.padding, self.geometry.dilation)
        low_bit = convolve(torch.cat(self.quantized_inputs(x), 1), torch.cat(self.quantized_weights(), 1), self.bias, *how)
        return low_bit + convolve(x, low_rank.product(self.up, self.down), None, *how)  # type: ignore[arg-type]


class ReleasedLayer(DenseLayer):
    """The dense layer with quantizers written out for autograd."""

    def quantized_inputs(self, x: Tensor) -> list[Tensor]:
        rounded = []
        for part, piece in enumerate(x.split(self.parts, -1 if self.is_linear else 1)):
            rotated = self._rotate_input(piece, part)
            low, high = rotated.detach().min(), rotated.detach().max()
            scale = ((high - low) / (2**self.act_bits - 1)).clamp(min=self.scale_floor)
            rounded.append(written_out(rotated, scale, torch.round(-low / scale), self.act_bits))
        return rounded

    def quantized_weights(self) -> list[Tensor]:
        weight, (scale, zero_point) = self._residual(), self._weight_grid()
        return list(written_out(weight, scale, zero_point, self.weight_bits).split(self.parts, 1))


def written_out(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Rounding with straight-through gradients, an operation at a time."""
    q = x / scale
    q = q + (q.round() - q).detach()
    return (torch.clamp(q + zero_point, 0, 2**bits - 1) - zero_point) * scale


def iteration(kind: type[QuantLayer], rank: int = RANK) -> Callable[[], float]:
    """A quantized U-Net of one kind of layer, and a function that does one iteration and returns its loss."""
    config = load(ROOT / "config" / "default.yaml")
    files = {key: ROOT / getattr(config.backbone, key) for key in ("weights", "vae_weights")}
    unet: nn.Module = load_backbone(config.backbone.model_copy(update=files)).unet
    x, t, context, struct = example_inputs(config.backbone.unet, 32, config.backbone.context_tokens)
    generator = torch.Generator().manual_seed(0)
    x, struct = torch.randn(x.shape, generator=generator), {w: torch.randn(m.shape, generator=generator) for w, m in struct.items()}
    with torch.no_grad():
        target = unet(x, t, context, struct)

    def make(name: str, module: nn.Module) -> QuantLayer:
        parts = halves(int(module.weight.shape[1]))  # type: ignore[union-attr,index]
        return kind.from_float(module, LayerPlan(4, 4, parts, rotate=True, rank=rank), name, config.seed)

    layers = apply.quantize_layers(unet, config.method.exclude, make).values()
    parameters = [parameter for layer in layers for parameter in (layer.up, layer.down) if parameter is not None]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6) if parameters else None
    x.requires_grad_(not parameters)

    def once() -> float:
        loss = F.mse_loss(unet(x, t, context, struct), target)
        loss.backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return once


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    kinds = {"thin": iteration(QuantLayer), "dense": iteration(DenseLayer), "released": iteration(ReleasedLayer)}
    first = {name: once() for name, once in kinds.items()}
    print("loss of the first iteration:", ", ".join(f"{name} {loss:.6g}" for name, loss in first.items()))
    kinds["floor"] = iteration(QuantLayer, rank=0)
    kinds["floor"]()
    if max(first.values()) / min(first.values()) > 1.02:  # values at a tie may round either way, no more
        sys.exit("error: they do not compute the same")
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(ROUNDS):
        for name, once in kinds.items():
            begun = time.perf_counter()
            once()
            seconds[name].append(time.perf_counter() - begun)
    print(f"{threads} threads, rank {RANK}, medians of {ROUNDS} rounds (smallest to largest)")
    for name, times in seconds.items():
        ratios = [own / thin for own, thin in zip(times, seconds["thin"], strict=True)]
        beside = f"{statistics.median(ratios):.2f} times thin ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:9s} {statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f}), {beside}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
