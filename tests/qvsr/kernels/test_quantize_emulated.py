"""The CUDA kernel of activations, run on a CPU by csrc/emulate.h, against the reference. Data are random each time; QVSR_SEED=... draws them again.

What is not rotated must agree to the last bit. A rotation adds up in another order, so ranges differ by some roundings of float32, and an integer
may differ by one, only where the value lies next to a boundary of rounding.
"""

from __future__ import annotations

import ctypes
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qvsr.kernels import build, cuda, ops, reference
from qvsr.quant.rotation import hadamard, random_signs, small_factors

FLOOR = 1e-4
NEAR = 1e-6  # of the largest value: float32 sums of up to 5120 values differ by less


@pytest.fixture(autouse=True)
def generator(on_cpu: ctypes.CDLL) -> torch.Generator:
    seed = int(os.environ.get("QVSR_SEED", random.randrange(2**31)))
    print(f"QVSR_SEED={seed}")
    on_cpu.qvsr_emulate_seed(seed % 4)  # every fourth time the natural order of threads
    return torch.Generator().manual_seed(seed)


def rotation(n: int) -> tuple[list[Tensor], Tensor]:
    return [hadamard(size) for size in small_factors(n)], random_signs(n, 0).float()


def both(x: Tensor, start: int = 0, stop: int | None = None, **more: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Kernel, reference, and the values that they round, channels last."""
    options: dict[str, Any] = {
        "first": False,
        "left": False,
        "rotation": [],
        "signs": None,
        "bits": 4,
        "granularity": "tensor",
        "symmetric": False,
    }
    options |= {"floor": FLOOR, "clip": None, "scale": None, "zero_point": None} | more
    stop = stop or x.shape[1 if options["first"] else -1]
    arguments = (x, start, stop, *options.values())
    kernel, expected = cuda.quantize_activation(*arguments), reference.quantize_activation(*arguments)
    assert [(one.dtype, one.shape) for one in kernel] == [(one.dtype, one.shape) for one in expected]
    assert all(one.is_contiguous() for one in kernel)
    totals = cuda._rows[kernel[0]].totals
    assert torch.equal(totals, kernel[0].flatten(0, -2).sum(-1, dtype=torch.int32)), "sums of the rows"
    piece = x.narrow(1 if options["first"] else -1, start, stop - start)
    if options["rotation"]:
        piece = reference.rotate(piece, options["rotation"], options["signs"], options["left"], options["first"])
    return kernel, expected, piece.movedim(1, -1) if options["first"] else piece


def same(x: Tensor, *rest: Any, **more: Any) -> None:
    kernel, expected, _ = both(x, *rest, **more)
    for name, one, other in zip(("q", "scale", "zero_point"), kernel, expected, strict=True):
        assert torch.equal(one, other), f"{name}: {int((one != other).sum())} of {one.numel()} values differ"


def nearly(x: Tensor, *rest: Any, **more: Any) -> None:
    kernel, expected, values = both(x, *rest, **more)
    near = NEAR * float(values.abs().max())
    torch.testing.assert_close(kernel[1], expected[1], rtol=2e-7, atol=near)
    scale, zero = (one.double().view(*one.shape, *(1,) * (values.dim() - one.dim())) for one in kernel[1:])
    top = 2 ** more.get("bits", 4) - 1
    if more.get("scale") is None and not more.get("symmetric"):  # the lowest value becomes 0, the highest the top
        low, high = (-zero - 0.5) * scale, (top - zero + 0.5) * scale
        assert bool((values >= low - near).all()) and bool((values <= high + near).all())
    steps = values.double() / scale  # on the kernel's own grid, whose zero point may differ by one from the reference's
    q = (steps.round() + zero).clamp(0, top)
    distance = ((steps - 0.5) - (steps - 0.5).round()).abs() * scale
    apart = (kernel[0].double() - q).abs()
    wrong = (apart > 1) | ((apart > 0) & (distance > near))
    assert not bool(wrong.any()), f"{int(wrong.sum())} integers differ, the farthest {float(distance[wrong].max()):.1e} from a boundary"
    alike = (kernel[2] == expected[2]).view(scale.shape) & ((kernel[1].double() / expected[1].double() - 1).abs() < 1e-6).view(scale.shape)
    different = (kernel[0] != expected[0]) & alike.expand(values.shape)
    assert int(different.sum()) <= 2 + 2e-3 * different.numel()  # next to boundaries


LAYOUTS = {  # name: shape, whether channels are first
    "map": ((2, 40, 5, 7), True),
    "map of 4 n pixels": ((3, 24, 4, 8), True),
    "sequence": ((3, 20, 9), True),
    "volume": ((2, 12, 3, 2, 5), True),
    "tokens": ((2, 9, 40), False),
    "rows": ((67, 48), False),
}


@pytest.mark.parametrize("granularity", ops.GRANULARITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_unrotated_values_are_those_of_the_reference(generator: torch.Generator, layout: str, granularity: str, bits: int) -> None:
    shape, first = LAYOUTS[layout]
    x = torch.randn(shape, generator=generator) * 3 + 1
    channels = shape[1 if first else -1]
    for symmetric, clip in ((False, None), (True, None), (False, torch.tensor(0.83)), (True, torch.tensor(0.4))):
        same(x, first=first, bits=bits, granularity=granularity, symmetric=symmetric, clip=clip)
    for start, stop in ((0, channels // 2), (channels // 2, channels), (3, 8), (channels - 1, channels)):
        same(x, start, stop, first=first, bits=bits, granularity=granularity)


@pytest.mark.parametrize("granularity", ops.GRANULARITIES)
@pytest.mark.parametrize(("channels", "count"), [(1, 70), (5, 33), (127, 40), (129, 35), (1023, 6)])
def test_odd_sizes_and_channels_beyond_a_tile(generator: torch.Generator, channels: int, count: int, granularity: str) -> None:
    same(torch.randn(count, channels, generator=generator), granularity=granularity)
    same(torch.randn(2, channels, count, generator=generator), first=True, granularity=granularity)


@pytest.mark.parametrize("granularity", ops.GRANULARITIES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n", [2, 4, 12, 16, 48, 64, 80, 160, 320, 512])
def test_rotated_values(generator: torch.Generator, n: int, bits: int, granularity: str) -> None:
    factors, signs = rotation(n)
    for left, first, shape in ((True, True, (2, n + 8, 3, 5)), (False, False, (2, 9, n + 8)), (True, False, (5, n + 8))):
        x = torch.randn(shape, generator=generator)
        nearly(x, 4, n + 4, first=first, left=left, rotation=factors, signs=signs, bits=bits, granularity=granularity)
        nearly(x, 8, n + 8, first=first, left=left, rotation=factors, signs=signs, bits=bits, granularity=granularity, symmetric=True)


@pytest.mark.parametrize("n", [960, 1280, 2560, 5120])
def test_rotations_of_many_channels(generator: torch.Generator, n: int) -> None:
    """The sizes of the full network; 5120 channels take the largest tile and six blocks of results a thread."""
    factors, signs = rotation(n)
    nearly(torch.randn(9, n, generator=generator), rotation=factors, signs=signs)
    nearly(torch.randn(1, n, 3, 3, generator=generator), first=True, left=True, rotation=factors, signs=signs, granularity="token")


def test_given_matrices(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dense matrix, of any size, signs contained; beyond DENSE channels a library multiplies."""
    for n in (5, 12, 30):
        matrix = torch.linalg.qr(torch.randn(n, n, generator=generator))[0].contiguous()
        for left, first, shape in ((True, True, (2, n, 3, 5)), (False, False, (7, n))):
            nearly(torch.randn(shape, generator=generator), first=first, left=left, rotation=[matrix])
    monkeypatch.setattr(cuda, "DENSE", 11)
    matrix = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0].contiguous()
    nearly(torch.randn(2, 24, 3, 5, generator=generator), 6, 18, first=True, left=True, rotation=[matrix])


def test_more_channels_than_a_block_can_rotate(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then they are rotated before: on a chip with 64 KB of shared memory, and beyond 6144 channels on all."""
    monkeypatch.setattr(cuda, "_chip", lambda x: cuda.Chip(75, 4, 65536))
    for n in (2560, 5120, 10240):
        factors, signs = rotation(n)
        nearly(torch.randn(5, n, generator=generator), rotation=factors, signs=signs)


def test_maps_whose_channels_are_last_in_memory(generator: torch.Generator) -> None:
    x = torch.randn(2, 40, 5, 7, generator=generator)
    y = x.to(memory_format=torch.channels_last)
    factors, signs = rotation(20)
    for granularity in ops.GRANULARITIES:
        arguments = (True, True, factors, signs, 4, granularity, False, FLOOR, None, None, None)
        found, expected = cuda.quantize_activation(y, 4, 24, *arguments), cuda.quantize_activation(x, 4, 24, *arguments)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_extreme_ranges(generator: torch.Generator) -> None:
    normal = torch.randn(3, 16, 5, 5, generator=generator)
    outlier = normal.clone()
    outlier[1, 3, 2, 2] = 1e6
    cases = [torch.zeros(3, 16, 5, 5), torch.full((3, 16, 5, 5), -2.5), outlier, normal * 1e-7, normal * 1e30, normal + 1e4, normal.abs()]
    factors, signs = rotation(16)
    for x in cases:
        for granularity in ops.GRANULARITIES:
            for symmetric in (False, True):
                same(x, first=True, granularity=granularity, bits=8, symmetric=symmetric)
    for x in (*cases[:1], cases[3]):
        nearly(x, first=True, left=True, rotation=factors, signs=signs)


def test_fixed_ranges(generator: torch.Generator) -> None:
    x = torch.randn(3, 24, 5, 5, generator=generator) * 2
    factors, signs = rotation(12)
    for zero in (7.0, -3.0, 400.0):
        fixed = {"scale": torch.tensor(0.21), "zero_point": torch.tensor(zero)}
        for granularity in ops.GRANULARITIES:
            same(x, first=True, granularity=granularity, **fixed)
        nearly(x, 12, 24, first=True, left=True, rotation=factors, signs=signs, **fixed)


def test_nan_and_infinity_make_the_scale_nan_or_infinite(generator: torch.Generator) -> None:
    for value in (math.nan, math.inf, -math.inf):
        x = torch.randn(3, 24, 5, 5, generator=generator)
        x[1, 7, 2, 3] = value
        arguments = (x, 0, 24, True, True, [], None, 4)
        rest = (False, FLOOR, None, None, None)
        for granularity in ops.GRANULARITIES:
            found = cuda.quantize_activation(*arguments, granularity, *rest)
            expected = reference.quantize_activation(*arguments, granularity, *rest)
            for one, other in zip(found[1:], expected[1:], strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
            assert not bool(found[1].isfinite().all())
        factors, signs = rotation(24)
        found = cuda.quantize_activation(x, 0, 24, True, True, factors, signs, 4, "frame", *rest)
        assert found[1].isfinite().tolist() == [True, False, True]
    x[1, 7, 2, 3] = math.nan
    one = torch.tensor(1.0)
    found = cuda.quantize_activation(*arguments, "tensor", False, FLOOR, None, one, one * 7)
    assert (
        bool(found[1].isnan()) and float(found[2]) == 7 and float(one) == 1
    )  # the reference raises; a GPU cannot without being waited for


def test_empty_inputs() -> None:
    with pytest.raises(ops.OperatorError, match=r"^quantize_activation: x \(0, 8\) is empty and so has no range"):
        cuda.quantize_activation(torch.zeros(0, 8), 0, 8, False, False, [], None, 4, "tensor", False, FLOOR, None, None, None)
    one = torch.tensor(1.0)
    q, _, _ = cuda.quantize_activation(torch.zeros(0, 8), 0, 8, False, False, [], None, 4, "tensor", False, FLOOR, None, one, one)
    assert q.shape == (0, 8) and q.dtype == torch.uint8


def test_sixteen_bits_are_the_reference_s(generator: torch.Generator) -> None:
    x = torch.randn(9, 8, generator=generator)
    arguments = (x, 0, 8, False, False, [], None, 16, "tensor", False, FLOOR, None, None, None)
    assert torch.equal(cuda.quantize_activation(*arguments)[0], reference.quantize_activation(*arguments)[0])


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"x": None}, -101, "a pointer that is needed is null"),
        ({"keys": None}, -101, "a pointer that is needed is null"),
        ({"K": 9}, -102, "a size is not positive, or the channels are not among those of x"),
        ({"start": -1}, -102, "a size is not positive, or the channels are not among those of x"),
        ({"tokens": 0}, -102, "a size is not positive, or the channels are not among those of x"),
        ({"x": 4097}, -103, "an array does not begin at a multiple of 4 bytes, or a factor of a rotation at one of 16"),
        ({"bits": 9}, -104, "bits are not 2 to 8"),
        ({"granularity": 3}, -105, "no such granularity"),
        ({"factors": 13}, -106, "the factors of the rotation do not multiply to the channels, or one cannot be"),
        ({"factors": 1}, -106, "the factors of the rotation do not multiply to the channels, or one cannot be"),
    ],
)
def test_arguments_that_the_launcher_refuses(on_cpu: ctypes.CDLL, change: dict[str, Any], code: int, message: str) -> None:
    """Found before the device is touched: the pointers here are numbers that nothing may follow."""
    values = {
        "x": 4096,
        "q": 4096,
        "scale": 4096,
        "zero_point": 4096,
        "keys": 4096,
        "frames": 1,
        "tokens": 4,
        "channels": 8,
        "K": 8,
        "bits": 4,
    }
    call = cuda.interface().structures["QvsrActivation"](**values | change)
    assert on_cpu.qvsr_quantize(ctypes.byref(call), None) == code
    assert on_cpu.qvsr_quantize_message(code).decode() == message


def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path, sanitizer: dict[str, str]) -> None:
    """A kernel of many shapes under the address and the alignment sanitizer, arrays at the very ends of their memory."""
    library = build.build_emulated(tmp_path, ["quantize.cu"], ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-g"])
    (tmp_path / "shapes.py").write_text(OUT_OF_BOUNDS)
    command = [sys.executable, str(tmp_path / "shapes.py"), str(library)]
    here = str(Path(build.__file__).parents[2])
    done = subprocess.run(command, env=os.environ | sanitizer | {"PYTHONPATH": here}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "54 calls"


OUT_OF_BOUNDS = """
import ctypes, itertools, sys
from pathlib import Path
from qvsr.kernels import header, build
declared = header.read([(build.SOURCES / "quantize.h").read_text()])
library = ctypes.CDLL(sys.argv[1])
memory = ctypes.CDLL(None)
memory.malloc.restype, memory.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
memory.free.argtypes = [ctypes.c_void_p]
memory.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
calls = 0
for frames, tokens, (channels, start, K), first, granularity in itertools.product((1, 3), (1, 7, 36), ((20, 4, 12), (5, 1, 3), (300, 1, 299)), (0, 1), (0, 2)):
    if frames == 3 and granularity == 2:
        continue
    held = []
    def take(bytes):
        held.append(memory.malloc(bytes))
        memory.memset(held[-1], 0, bytes)
        return held[-1]
    call = declared.structures["QvsrActivation"](frames=frames, tokens=tokens, channels=channels, start=start, K=K, channels_first=first, bits=4)
    call.granularity, call.floor, call.norm = granularity, 1e-4, 1.0
    call.x, call.q = take(4 * frames * tokens * channels), take(frames * tokens * K)
    call.scale, call.zero_point = (take(4 * (frames * tokens if granularity == 2 else 1)) for _ in range(2))
    call.totals, call.keys, call.signs = take(4 * frames * tokens), take(8), take(4 * K)
    if K == 12:
        call.factors = 1
        call.factor[0].matrix, call.factor[0].size, call.factor[0].pitch = take(4 * 12 * 12), 12, 12
    assert library.qvsr_quantize(ctypes.byref(call), None) == 0
    for one in held:
        memory.free(one)
    calls += 1
print(calls, "calls")
"""
