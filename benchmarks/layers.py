"""Seconds of the published U-Net's layers, packed beside full precision: python benchmarks/layers.py [--help]

Every different layer of the full-size network (kind, shape, size of the input), with random weights and inputs, as `quantvsr` quantizes it:
channel halves with dynamic ranges, rotated, and with a low-rank branch where --rank is given. What stands beside it: float32 as PyTorch
runs it, the same with channels last, bfloat16 with channels last. Packed time includes rotation and rounding of the input and the branch;
its input lies as in the float32 rows, first channels first, then (convolutions) channels last, which is what packed convolutions return.

The result is checked first: packed against simulated. Then rounds alternate between the variants, so that a busy machine slows all alike.
Ratios are medians of the float32 variant that is faster over medians of the packed one, in the same run; their mean is geometric, weighted
by multiplications (MACs times how often the network has the layer).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvsr.config import UNetSettings
from qvsr.kernels import cpu
from qvsr.models.unet import InflatedUNet
from qvsr.quant.cost import example_inputs
from qvsr.quant.layer import KINDS, LayerPlan, QuantLayer, halves

TILE, TOKENS = 64, 77


@dataclass(frozen=True)
class Shape:
    """One kind of layer of the network."""

    kind: str
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    bias: bool
    input: tuple[int, ...]
    macs: int

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        if self.kind == "Linear":
            return nn.Linear(self.weight[1], self.weight[0], bias=self.bias).requires_grad_(False)
        how: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "bias": self.bias}
        return getattr(nn, self.kind)(self.weight[1], self.weight[0], self.weight[2:], **how).requires_grad_(False)  # type: ignore[no-any-return]


def shapes() -> Counter[Shape]:
    """The different layers of the published U-Net and how often it has them; nothing is computed."""
    found: Counter[Shape] = Counter()
    with torch.device("meta"):
        unet = InflatedUNet(UNetSettings())

    def note(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        stride, padding = getattr(layer, "stride", ()), getattr(layer, "padding", ())
        weight = tuple(layer.weight.shape)
        macs = output.numel() // weight[0] * math.prod(weight)
        found[Shape(KINDS[type(layer)], weight, stride, padding, layer.bias is not None, tuple(args[0].shape), macs)] += 1

    with ExitStack() as stack, torch.no_grad():
        for layer in unet.modules():
            if type(layer) in KINDS:
                stack.callback(layer.register_forward_hook(note).remove)
        unet(*example_inputs(UNetSettings(), TILE, TOKENS, "meta"))
    return found


def packed_layer(shape: Shape, bits: int, rank: int) -> QuantLayer:
    """A frozen layer of these bits; the branch is random, its time does not depend on its values."""
    module = shape.module()
    plan = LayerPlan(bits, bits, halves(shape.weight[1]), rotate=True, rank=rank)
    branch = (0.01 * torch.randn(shape.weight[0], rank), 0.01 * torch.randn(rank, *shape.weight[1:])) if rank else None
    layer = QuantLayer.from_float(module, plan, "layer", branch=branch)
    layer.freeze()
    return layer


def variants(shape: Shape, bits: list[int], rank: int) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float]]:
    """Calls by name, and the relative difference of each packed one from simulated."""
    x = torch.randn(shape.input, generator=torch.Generator().manual_seed(1))
    maps = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    float32 = shape.module()
    calls: dict[str, Callable[[], Tensor]] = {"fp32": lambda: float32(x)}
    last = x
    if shape.kind != "Linear" and maps is not None:
        last = x.to(memory_format=maps)
        channels_last = shape.module().to(memory_format=maps)  # type: ignore[call-overload]
        calls["fp32 last"] = lambda: channels_last(last)
    bfloat16, x16 = shape.module().to(torch.bfloat16), last.to(torch.bfloat16)
    calls["bf16"] = lambda: bfloat16(x16)
    errors = {}
    for width in bits:
        layer = packed_layer(shape, width, rank)
        expected = layer(x)
        layer.set_execution("packed")
        name = f"W{width}A{width}"
        errors[name] = float((layer(x) - expected).norm() / expected.norm())
        calls[name] = lambda layer=layer: layer(x)  # type: ignore[misc]
        if last is not x:
            calls[f"{name} last"] = lambda layer=layer: layer(last)  # type: ignore[misc]
    return calls, errors


def measure(calls: dict[str, Callable[[], Tensor]], seconds: float, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Times of each call, in rounds of all, for about so many seconds; at least 5 rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    begun = time.perf_counter()
    while len(times["fp32"]) < 5 or time.perf_counter() - begun < seconds:
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
        if len(times["fp32"]) >= 200:
            break
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="8,6,4", help="bits of weights and activations, by comma")
    parser.add_argument("--rank", type=int, default=0, help="of the low-rank branch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--share", type=float, default=1.0, help="only the layers with most multiplications, up to this share of all")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each layer")
    parser.add_argument("--worked", action="store_true", help="processor time instead of time: for one thread on a busy machine")
    parser.add_argument("--out", type=Path, help="write all times as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    bits = [int(one) for one in given.bits.split(",")]
    clock = time.process_time if given.worked else time.perf_counter
    print(
        f"torch {torch.__version__}, {given.threads} thread(s), {torch.cpu.get_capabilities().get('cpu_name')}; rank {given.rank}; ", end=""
    )
    print(f"packed by {'integer kernels' if cpu.missing() is None else 'the reference: ' + str(cpu.missing())}")
    found = shapes()
    total = sum(shape.macs * count for shape, count in found.items())
    ordered = sorted(found.items(), key=lambda item: -item[0].macs * item[1])
    chosen, so_far = [], 0
    for shape, count in ordered:
        if so_far <= given.share * total:
            chosen.append((shape, count))
            so_far += shape.macs * count
    print(f"{len(chosen)} of {len(found)} different layers, {so_far / total:.1%} of {total / 1e12:.3f} T multiplications")
    rows, logs, weights = [], {}, {}
    with torch.no_grad():
        for shape, count in chosen:
            calls, errors = variants(shape, bits, given.rank)
            raw = measure(calls, given.seconds, clock)
            times = {name: statistics.median(values) for name, values in raw.items()}
            best = min(times["fp32"], times.get("fp32 last", math.inf))
            cells = []
            for name, value in times.items():
                gops = 2 * shape.macs / value / 1e9
                cells.append(
                    f"{name} {1e3 * value:.1f} ms ({gops:.0f} GOP/s)" if name.startswith("fp32") else f"{name} {best / value:.2f}x"
                )
            for width in bits:
                name = f"W{width}A{width}"
                for key, value in ((name, times[name]), (f"{name} best", min(times[name], times.get(f"{name} last", math.inf)))):
                    logs[key] = logs.get(key, 0.0) + shape.macs * count * math.log(best / value)
                    weights[key] = weights.get(key, 0) + shape.macs * count
            for key in ("bf16",):
                logs[key] = logs.get(key, 0.0) + shape.macs * count * math.log(best / times[key])
                weights[key] = weights.get(key, 0) + shape.macs * count
            print(
                f"{shape.macs * count / total:6.2%} {count:3d}x {shape.kind} {'x'.join(map(str, shape.weight))} on "
                f"{'x'.join(map(str, shape.input))}: {', '.join(cells)}; off by {max(errors.values()):.1e}",
                flush=True,
            )
            rows.append({**asdict(shape), "count": count, "times": raw, "errors": errors})
    for key in logs:
        print(
            f"{key}: {math.exp(logs[key] / weights[key]):.2f} times as fast as the faster float32, geometric mean weighted by multiplications"
        )
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
