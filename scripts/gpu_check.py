"""Build, test and measure the CUDA kernels on this machine's GPU: see scripts/gpu_check.sh.

Times are of the device, by its events: each variant of a shape in turn, 5 rounds of 20 calls behind 5 that warm up, the median of the 100 and what lies
between their tenths. Inputs and weights stay in the second-level cache where they fit, for all variants alike. Each result is
compared with the reference before anything is timed.

The products are timed alone, inputs being integers already and results bfloat16, beside torch._int_mm (which returns 32-bit sums without scales, zero
points or bias) and beside bfloat16 (linear layers by cuBLAS, convolutions by cuDNN with channels last, its fastest algorithm). The column "inputs" is
the quantization that a layer does before: rotation, range, rounding.

A step is one call of the whole U-Net with random weights on five frames of a 64 x 64 latent: in bfloat16 with channels last, and packed with a branch
of rank 24, what is not quantized being bfloat16 too; packed also as a replayed CUDA graph, whose result must be that of the call. It needs pydantic.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvsr.kernels import build, cuda, graphs, reference
from qvsr.kernels.packing import pack_weight
from qvsr.kernels.reference import output_shape

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 460  # of the whole check; what does not fit is left out and named
SANITIZED = 60  # seconds at most of each run of compute-sanitizer
ROUNDS, CALLS, WARM = 5, 20, 5
CONFIGURATIONS = ((8, 8), (4, 4))
CLOSE = 1e-5  # of the largest output: float32 rounding of scales and of the last sum


@dataclass(frozen=True)
class Shape:
    """A layer of the U-Net: five frames of a 64 x 64 latent. `how`: kernel, stride, padding of a convolution."""

    name: str
    size: tuple[int, ...]
    channels: int
    outputs: int
    how: tuple[tuple[int, ...], ...] = ()

    @property
    def macs(self) -> int:
        taps = math.prod(self.how[0]) if self.how else 1
        return math.prod(self.positions) * self.channels * taps * self.outputs

    @property
    def positions(self) -> tuple[int, ...]:
        if not self.how:
            return self.size
        return (self.size[0], *output_shape(self.size[1:], *self.how, (1,) * len(self.how[0])))


def _conv(name: str, size: int, channels: int, outputs: int, kernel: int = 3, stride: int = 1) -> Shape:
    return Shape(name, (5, size, size), channels, outputs, ((kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2))


SHAPES = (
    Shape("linear", (5, 4096), 320, 320),
    Shape("linear", (5, 4096), 320, 2560),
    Shape("linear", (5, 4096), 1280, 320),
    Shape("linear", (5, 1024), 640, 640),
    Shape("linear", (5, 1024), 640, 5120),
    Shape("linear", (5, 256), 1280, 1280),
    Shape("linear", (5, 256), 1280, 10240),
    Shape("linear", (5, 256), 5120, 1280),
    Shape("linear of the text", (5, 77), 1024, 1280),
    _conv("3 x 3", 64, 320, 320),
    _conv("3 x 3", 64, 640, 320),
    _conv("3 x 3", 32, 640, 640),
    _conv("3 x 3", 16, 1280, 1280),
    _conv("3 x 3", 16, 2560, 1280),
    _conv("3 x 3", 8, 1280, 1280),
    _conv("3 x 3, stride 2", 64, 320, 320, stride=2),
    _conv("1 x 1", 64, 640, 320, kernel=1),
    Shape("3 x 1 x 1 temporal", (1, 5, 8, 8), 1280, 1280, ((3, 1, 1), (1, 1, 1), (1, 0, 0))),
)
EXCLUDE = ("time_embed.0", "input_blocks.0.0", "out.2")  # layers of the U-Net that are not quantized
RANK = 24
SMALL = (Shape("linear", (3, 37), 48, 40), Shape("3 x 3", (2, 6, 7), 24, 20, ((3, 3), (1, 1), (1, 1))))


@dataclass
class Row:
    """Times in microseconds: medians, and the tenths below and above."""

    name: str
    size: tuple[int, ...]
    channels: int
    outputs: int
    macs: int
    error: dict[str, float] = field(default_factory=dict)
    microseconds: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)


class Layer:
    """One shape with random numbers, quantized to `bits`, and the call of each variant."""

    def __init__(self, shape: Shape, bits: tuple[int, int], device: str = "cuda") -> None:
        g = torch.Generator().manual_seed(0)
        kernel = shape.how[0] if shape.how else ()
        self.shape, self.weight_bits, self.bits = shape, *bits
        self.how = (*shape.how, (1,) * len(kernel)) if shape.how else ()
        integers = torch.randint(0, 2 ** bits[0], (shape.outputs, shape.channels, *kernel), generator=g, dtype=torch.uint8)
        self.packed = pack_weight(integers, bits[0], [shape.channels]).to(device)
        self.scale = (torch.rand(shape.outputs, 1, generator=g) + 0.5).to(device)
        self.zero = torch.full((shape.outputs, 1), float(2 ** (bits[0] - 1)), device=device)
        self.bias = torch.randn(shape.outputs, generator=g).to(device)
        self.x = torch.randn((shape.size[0], shape.channels, *shape.size[1:]) if kernel else (*shape.size, shape.channels), generator=g).to(
            device
        )
        self.dense = (integers.to(device).float() - self.zero.view(-1, *(1,) * (1 + len(kernel)))).to(torch.bfloat16)

    def quantize(self, module: Any = torch.ops.qvsr) -> list[list[Tensor]]:
        factors, signs = rotation(self.shape.channels, self.x.device)
        last = bool(self.how)
        arguments = (self.x, 0, self.shape.channels, last, last, factors, signs, self.bits, "tensor", False, 1e-4, None, None, None)
        return [[one] for one in module.quantize_activation(*arguments)]

    def product(self, q: list[list[Tensor]], module: Any = torch.ops.qvsr, *dtype: torch.dtype) -> Tensor:
        function = module.conv_packed if self.how else module.matmul_packed
        how = [list(one) for one in self.how]
        return function(*q, self.packed, self.weight_bits, self.scale, self.zero, *how, self.bias, None, None, *dtype)

    def int_mm(self) -> Callable[[], Tensor] | None:
        """The same multiplications by torch._int_mm, whose shapes must be multiples of eight; none for convolutions."""
        m, k, n = math.prod(self.shape.size), self.shape.channels, self.shape.outputs
        if self.how or m <= 16 or k % 8 or n % 8:
            return None
        u = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=self.x.device)
        w = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=self.x.device).t()
        return lambda: torch._int_mm(u, w)

    def bfloat16(self) -> Callable[[], Tensor]:
        x, bias = self.x.to(torch.bfloat16), self.bias.to(torch.bfloat16)
        if not self.how:
            return lambda: F.linear(x, self.dense, bias)
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]
        x, w = x.to(memory_format=layout), self.dense.to(memory_format=layout)
        convolve = {4: F.conv2d, 5: F.conv3d}[x.dim()]
        _, stride, padding, dilation = self.how
        return lambda: convolve(x, w, bias, stride, padding, dilation)


def rotation(channels: int, device: Any) -> tuple[list[Tensor], Tensor | None]:
    from qvsr.quant.rotation import can_rotate, hadamard, random_signs, small_factors

    if not can_rotate(channels):
        return [], None
    return [hadamard(size).to(device) for size in small_factors(channels)], random_signs(channels, 0).float().to(device)


def compared(layer: Layer, module: Any = torch.ops.qvsr) -> float:
    """Largest difference from the reference over the largest output.

    Raises:
        ValueError: it is too large.
    """
    q = layer.quantize(module)
    found, expected = layer.product(q, module), layer.product(q, reference)
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < CLOSE:
        raise ValueError(f"{layer.shape}, W{layer.weight_bits}A{layer.bits}: the result differs by {error:.1e} of the largest output")
    if not torch.equal(layer.product(q, module, torch.bfloat16), found.bfloat16()):
        raise ValueError(f"{layer.shape}, W{layer.weight_bits}A{layer.bits}: the bfloat16 result is not the float32 one rounded")
    return error


def timed(calls: dict[str, Callable[[], Any]], count: int = CALLS) -> dict[str, tuple[float, float, float]]:
    """Microseconds of each call by the device's events: tenth, median, ninetieth."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            for _ in range(WARM):
                call()
            events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
            for start, end in events:
                start.record()
                call()
                end.record()
            torch.cuda.synchronize()
            found[name] += [1000 * start.elapsed_time(end) for start, end in events]
    tenths = {name: statistics.quantiles(values, n=10) for name, values in found.items()}
    return {name: (tenths[name][0], statistics.median(values), tenths[name][8]) for name, values in found.items()}


def peak(call: Callable[[], Any]) -> float:
    """Megabytes that one call takes at most beside what lies there already."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def measure(shape: Shape) -> Row:
    """All variants of a shape; results are compared first."""
    row = Row(shape.name, shape.size, shape.channels, shape.outputs, shape.macs)
    calls: dict[str, Callable[[], Any]] = {}
    for bits in CONFIGURATIONS:
        layer, name = Layer(shape, bits), f"W{bits[0]}A{bits[1]}"
        row.error[name] = compared(layer)
        q = layer.quantize()
        calls[name] = lambda layer=layer, q=q: layer.product(q, torch.ops.qvsr, torch.bfloat16)
        if bits == CONFIGURATIONS[0]:
            calls["inputs"] = layer.quantize
            calls["bfloat16"] = layer.bfloat16()
            if (other := layer.int_mm()) is not None:
                calls["int_mm"] = other
    row.peak_mb = {name: peak(call) for name, call in calls.items()}
    row.microseconds = timed(calls)
    return row


# ---------------------------------------------------------------- a step of the U-Net


def network(settings: Any, bits: int | None, device: str = "cuda") -> torch.nn.Module:
    """The U-Net with random weights in bfloat16 and channels last; with `bits`, its quantized layers packed."""
    from qvsr.models.unet import InflatedUNet
    from qvsr.quant import apply
    from qvsr.quant.layer import LayerPlan, QuantLayer, halves

    torch.manual_seed(0)
    with torch.device(device):
        net = InflatedUNet(settings).eval().requires_grad_(False)
        for parameter in net.parameters():
            if not parameter.any():  # a trained network has no layers that return zero
                torch.nn.init.normal_(parameter, std=0.02)
        for name, module in apply.quantizable(net, EXCLUDE).items() if bits else ():
            count, inputs, *kernel = module.weight.shape
            rank = min(RANK, count, inputs * math.prod(kernel))
            branch = 0.01 * torch.randn(count, rank), 0.01 * torch.randn(rank, inputs, *kernel)
            layer = QuantLayer.from_float(module, LayerPlan(bits, bits, halves(inputs), True, rank), name, branch=branch)
            layer.freeze()
            layer.set_execution("packed")
            apply.replace(net, name, layer)
    for module in net.modules():
        for parameter in () if isinstance(module, QuantLayer) else module.parameters(recurse=False):
            last = torch.channels_last if parameter.dim() == 4 else torch.preserve_format
            parameter.data = parameter.data.to(torch.bfloat16, memory_format=last)
    return net


def given(settings: Any, tile: int = 64, device: str = "cuda") -> tuple[Any, ...]:
    """Random inputs of a step."""
    from qvsr.quant.cost import example_inputs

    x, t, context, struct = example_inputs(settings, tile, 77, device)
    draw = lambda like: torch.randn_like(like, dtype=torch.bfloat16)  # noqa: E731
    maps = {width: draw(one).contiguous(memory_format=torch.channels_last) for width, one in struct.items()}
    return draw(x).contiguous(memory_format=torch.channels_last), t + 500, draw(context), maps


@torch.no_grad()
def measured_steps(settings: Any, tile: int = 64, device: str = "cuda") -> dict[str, dict[str, Any]]:
    """Times and memory of a step by variant.

    Raises:
        ValueError: a replay gives something else than the call, or calls are not recorded.
    """
    from qvsr.quant import apply

    found: dict[str, dict[str, Any]] = {}
    inputs = given(settings, tile, device)
    for name, bits in {"bfloat16": None, "W8A8": 8, "W4A4": 4}.items():
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        net = network(settings, bits, device)
        result = net(*inputs)
        resident = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        repeats = torch.equal(net(*inputs), result)  # not where a library adds up in any order
        packed = sum(cuda.kept_bytes(layer.weight_packed) for layer in apply.quant_layers(net).values())
        memory = {"resident_mb": resident / 1e6, "peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6, "packed_mb": packed / 1e6}
        calls: dict[str, Callable[[], Any]] = {name: lambda net=net: net(*inputs)}
        if bits:
            call = graphs.recorded(net)
            calls[f"{name}, graph"] = lambda call=call: call(*inputs, timestep=500)
            for _ in range(3):
                if not torch.equal(calls[f"{name}, graph"](), result) and repeats:
                    raise ValueError(f"a step, {name}: a replay gives something else than the call")
            if reason := graphs._recorded[net][1].failed:
                raise ValueError(f"a step, {name}: it is not recorded: {reason}")
        found |= {variant: memory | {"microseconds": times} for variant, times in timed(calls, 4).items()}
        net = call = calls = result = None
    return found


# ---------------------------------------------------------------- the report


def table(found: dict[str, Any]) -> str:
    """The result for people: where, what passed, and a line a shape."""
    lines = [f"# CUDA kernels on one {found['device']}", ""]
    lines += [f"{found['date']}, driver {found['driver']}, torch {found['torch']}, nvcc {found['nvcc']}, {found['system']}.", ""]
    lines += [f"- {name}: {result}" for name, result in found["checks"].items()]
    lines += ["", "Microseconds, median (tenth to ninetieth of a hundred); how it was measured: `scripts/gpu_check.py`.", ""]
    lines += [
        "| layer | input | channels | W8A8 | W4A4 | inputs | `_int_mm` | bfloat16 | `_int_mm` / W8A8 | bfloat16 / W8A8 | bfloat16 / W4A4 |"
    ]
    lines += ["|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in found["rows"]:
        us = row["microseconds"]
        times = [
            f"{us[name][1]:.1f} ({us[name][0]:.1f} to {us[name][2]:.1f})" if name in us else ""
            for name in ("W8A8", "W4A4", "inputs", "int_mm", "bfloat16")
        ]
        ratios = [
            f"{us[a][1] / us[b][1]:.2f}" if a in us else "" for a, b in (("int_mm", "W8A8"), ("bfloat16", "W8A8"), ("bfloat16", "W4A4"))
        ]
        size = " x ".join(map(str, row["size"]))
        lines.append(f"| {row['name']} | {size} | {row['channels']} to {row['outputs']} | {' | '.join((*times, *ratios))} |")
    lines += [
        "",
        "| layer | input | channels | peak MB of a call: " + " | ".join(("W8A8", "W4A4", "bfloat16")) + " | largest error |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        size = " x ".join(map(str, row["size"]))
        peaks = " | ".join(f"{row['peak_mb'][name]:.1f}" for name in ("W8A8", "W4A4", "bfloat16"))
        lines.append(f"| {row['name']} | {size} | {row['channels']} to {row['outputs']} | {peaks} | {max(row['error'].values()):.1e} |")
    if found["step"]:
        lines += [
            "",
            "| a step of the U-Net | ms | bfloat16 / it | MB at rest | of them packed weights | MB at most |",
            "|---|---:|---:|---:|---:|---:|",
        ]
    for name, one in found["step"].items():
        low, median, high = (value / 1000 for value in one["microseconds"])
        ratio = found["step"]["bfloat16"]["microseconds"][1] / 1000 / median
        memory = " | ".join(f"{one[what]:.0f}" for what in ("resident_mb", "packed_mb", "peak_mb"))
        lines.append(f"| {name} | {median:.1f} ({low:.1f} to {high:.1f}) | {ratio:.2f} | {memory} |")
    if found["left_out"]:
        lines += ["", f"Left out: {', '.join(found['left_out'])}."]
    return "\n".join(lines) + "\n"


def driver() -> str:
    if (tool := shutil.which("nvidia-smi")) is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return (subprocess.run(command, capture_output=True, text=True, check=False).stdout.split() or ["unknown"])[0]


def ran(command: Sequence[str], seconds: float) -> tuple[bool, str]:
    """Whether a program ended with 0 within its time, and the last line that it printed."""
    # each tensor in memory of its own, so that compute-sanitizer sees where it ends
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "--small" in command else {})
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return False, f"did not end within {seconds:.0f} s"
    lines = [line.strip(" =") for line in (done.stdout + done.stderr).splitlines() if line.strip(" =")]
    return done.returncode == 0, lines[-1] if lines else "no output"


def sanitizer() -> str | None:
    nvcc = build.find_nvcc()
    beside = str(Path(nvcc).resolve().with_name("compute-sanitizer")) if nvcc else None
    return shutil.which("compute-sanitizer") or (beside and shutil.which(beside))


def small() -> int:
    """A few small layers, for compute-sanitizer."""
    for shape in SMALL:
        for bits in CONFIGURATIONS:
            compared(Layer(shape, bits))
    print("small layers are right")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build, test and measure the CUDA kernels.")
    parser.add_argument("folder", type=Path, nargs="?", help="where gpu_check.json and gpu_check.md are written")
    parser.add_argument("--small", action="store_true", help="only compute a few small layers")
    chosen = parser.parse_args(arguments)
    if chosen.small:
        return small()
    if chosen.folder is None:
        parser.error("a folder for the results is needed")
    started = time.monotonic()
    gpu = torch.cuda.is_available()
    try:
        built = build.find_or_build([cuda._chip_of(0).architecture] if gpu else build.ARCHITECTURES)
    except build.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"built in {built.seconds:.0f} s: {built.path}", flush=True)
    if not gpu:
        print(
            f"error: {cuda.missing() or 'there is no GPU'}: the kernels are built for {len(built.architectures)} architectures, nothing was run",
            file=sys.stderr,
        )
        return 1

    checks: dict[str, str] = {}
    good = True

    def left() -> float:
        return SECONDS - (time.monotonic() - started)

    tests = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(ROOT), "--import-mode", "importlib", "-k", "gpu"]
    steps = {"tests": [*tests, *(str(ROOT / "tests/qvsr/kernels" / name) for name in ("test_cuda.py", "test_graphs.py"))]}
    for name in ("memcheck", "racecheck"):
        if (tool := sanitizer()) is None:
            checks[name] = "not run: there is no compute-sanitizer here"
        else:
            steps[name] = [tool, "--tool", name, "--error-exitcode", "1", sys.executable, str(Path(__file__)), "--small"]
    for name, command in steps.items():
        fine, line = ran(command, min(left(), 120 if name == "tests" else SANITIZED))
        checks[name] = f"{'passed' if fine else 'FAILED'}: {line}"
        good &= fine
        print(f"{name}: {checks[name]}", flush=True)

    torch.backends.cudnn.benchmark = True
    rows, left_out = [], []
    for shape in SHAPES:
        what = f"{shape.name} {shape.size} {shape.channels} to {shape.outputs}"
        if left() < 20:
            left_out.append(what)
            continue
        try:
            rows.append(asdict(measure(shape)))
        except (ValueError, RuntimeError) as error:
            checks[what], good = f"FAILED: {error}", False
        print(f"{what}: {rows[-1]['microseconds'] if rows else ''}", flush=True)
        torch.cuda.empty_cache()
    step: dict[str, Any] = {}
    if importlib.util.find_spec("pydantic") is None or left() < 100:
        left_out.append("a step of the U-Net")
    else:
        from qvsr.config import UNetSettings

        try:
            step = measured_steps(UNetSettings())
        except (ValueError, RuntimeError) as error:
            checks["a step of the U-Net"], good = f"FAILED: {error}", False
    found = {
        "device": torch.cuda.get_device_name(0),
        "capability": cuda._chip_of(0).architecture,
        "driver": driver(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "nvcc": built.compiler,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "seconds": round(time.monotonic() - started, 1),
        "checks": checks,
        "rows": rows,
        "step": step,
        "left_out": left_out,
    }
    chosen.folder.mkdir(parents=True, exist_ok=True)
    (chosen.folder / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n")
    (chosen.folder / "gpu_check.md").write_text(table(found))
    print(f"{'all checks passed' if good else 'a check FAILED'} in {found['seconds']} s; see {chosen.folder / 'gpu_check.md'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
