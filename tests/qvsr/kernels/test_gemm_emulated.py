"""The CUDA product and convolution without a GPU: their source built for the CPU (csrc/emulate.h), against the reference and 64-bit integers.

Data are random each time; a failing test shows its seed, and QVSR_SEED=… draws the same again.
"""

from __future__ import annotations

import ctypes
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qvsr.kernels import reference
from qvsr.kernels.packing import pack_weight, row_bytes

SOURCE = Path(reference.__file__).parent / "csrc"
FLAGS = ["-x", "c++", "-std=c++17", "-ffp-contract=off", "-fno-gnu-unique", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DQVSR_EMULATE", "-fPIC"]
NIBBLES = 1  # of QvsrForm
CODES = {"null": -1, "size": -2, "alignment": -3, "parts": -4, "bits": -5, "form": -6, "dtype": -7, "sum": -8, "window": -9, "group": -10}
CODES |= {"branch": -11, "arch": -12, "tile": -13}
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator of CUDA needs g++")

Long, Int, Pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p


class Part(ctypes.Structure):
    _fields_ = [(name, Pointer) for name in ("q", "totals", "scale", "zero_point", "tiles", "boxes", "w_scale", "w_zero_point")]
    _fields_ += [(name, Long) for name in ("group", "pitch", "w_stride", "K")]


class Layer(ctypes.Structure):
    _fields_ = [("N", Long)]
    _fields_ += [(name, Int) for name in ("parts", "weight_bits", "form", "arch", "multiprocessors", "dtype", "tile", "splits")]
    _fields_ += [("rank", Long), *((name, Pointer) for name in ("out", "bias", "thin", "up", "workspace")), ("workspace_bytes", Long)]


class Window(ctypes.Structure):
    _fields_ = [("frames", Long), *((name, Long * 3) for name in ("in", "out", "kernel", "stride", "padding", "dilation"))]


def build(folder: Path, flags: Sequence[str]) -> Path:
    """The library for the CPU."""
    files, library = [], folder / "emulated.so"
    for source in ("matmul", "conv", "pack"):
        files.append(str(folder / f"{source}.o"))
        subprocess.run(["g++", *FLAGS, *flags, "-c", str(SOURCE / f"{source}.cu"), "-o", files[-1]], check=True)
    subprocess.run(["g++", *flags, "-shared", *files, "-o", str(library)], check=True)
    return library


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("qvsr_tiles_bytes", "qvsr_boxes_count", "qvsr_pitch", "qvsr_workspace_bytes", "qvsr_bank_conflicts"):
        getattr(library, name).restype = Long
    for name in ("qvsr_message", "qvsr_emulate_error"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if path := os.environ.get("QVSR_EMULATED"):  # the run with an address sanitizer, in a process of its own
        return load(Path(path))
    return load(build(tmp_path_factory.mktemp("emulated"), ["-O2"]))


@pytest.fixture(autouse=True)
def seed() -> int:
    chosen = int(os.environ.get("QVSR_SEED") or random.SystemRandom().randrange(2**31))
    print(f"QVSR_SEED={chosen}")
    torch.manual_seed(chosen)
    return chosen


def guarded(values: Tensor) -> Tensor:
    """A copy of which an address sanitizer knows the bounds: memory of its own, that ends where it ends."""
    return torch.from_numpy(np.array(values.numpy(), copy=True)) if values.numel() else values


@dataclass
class Case:
    """A layer of random integers."""

    channels: Sequence[int]
    outputs: int = 20
    size: Sequence[int] = (30,)
    bits: int = 8
    weight_bits: int = 8
    kernel: Sequence[int] = ()
    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()
    ranges: str = "tensor"
    zero: float = 100.0
    weight_zero: float = 100.0
    rank: int = 0
    bias: bool = False
    plain: bool = False  # scales are one: results are whole numbers
    full: bool = False  # the largest integers
    q: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        one = [1] * len(self.kernel)
        self.how = (list(self.kernel), list(self.stride or one), list(self.padding or [0] * len(one)), list(self.dilation or one)) if one else ()

        def draw(bits: int, *shape: int) -> Tensor:
            return torch.full(shape, 2**bits - 1, dtype=torch.uint8) if self.full else torch.randint(2**bits, shape, dtype=torch.uint8)

        shape = {"tensor": (), "frame": tuple(self.size[:1]), "token": tuple(self.size)}[self.ranges]
        spread = 2.0 ** min(self.bits, self.weight_bits)
        self.q = [draw(self.bits, *self.size, k) for k in self.channels]
        self.scale = [torch.ones(shape) if self.plain else torch.rand(shape) + 0.5 for _ in self.channels]
        self.zeros = [torch.round(self.zero + spread * (torch.rand(shape) - 0.5)) for _ in self.channels]
        self.w = draw(self.weight_bits, self.outputs, sum(self.channels), *self.kernel)
        self.w_scale = torch.ones(self.outputs, len(self.channels)) if self.plain else torch.rand(self.outputs, len(self.channels)) + 0.5
        self.w_zeros = torch.round(self.weight_zero + spread * (torch.rand(self.outputs, len(self.channels)) - 0.5))
        self.positions = (self.size[0], *reference.output_shape(self.size[1:], *self.how)) if self.how else tuple(self.size)
        self.bias_values = torch.randn(self.outputs) if self.bias else None
        self.thin = torch.randn(*self.positions, self.rank) if self.rank else None
        self.up = torch.randn(self.outputs, self.rank) if self.rank else None

    def expected(self) -> Tensor:
        function = reference.conv_packed if self.how else reference.matmul_packed
        packed = pack_weight(self.w, self.weight_bits, self.channels)
        extra = (self.bias_values, self.thin, self.up)
        return function(self.q, self.scale, self.zeros, packed, self.weight_bits, self.w_scale, self.w_zeros, *self.how, *extra)


def three(values: Sequence[int], first: int) -> ctypes.Array:
    return (Long * 3)(*[first] * (3 - len(values)), *values)


def window_of(case: Case) -> Window:
    kernel, stride, padding, dilation = (three(values, first) for values, first in zip(case.how, (1, 1, 0, 1), strict=True))
    return Window(case.size[0], three(case.size[1:], 1), three(case.positions[1:], 1), kernel, stride, padding, dilation)


@dataclass
class Call:
    """The arguments of one call, and the memory they point to."""

    parts: ctypes.Array
    layer: Layer
    out: Tensor
    workspace: Tensor
    kept: list[Tensor]


def prepared(library: ctypes.CDLL, case: Case, arch: int = 80, dtype: torch.dtype = torch.float32, **choices: int) -> Call:
    """Weights repacked and inputs prepared by the library, the output full of NaN."""
    kept: list[Tensor] = []

    def at(values: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
        if values is None:
            return None
        kept.append(guarded(values.to(dtype).contiguous()))
        return kept[-1].data_ptr()

    form = library.qvsr_form(arch, case.weight_bits, case.bits)
    packed, kernel = pack_weight(case.w, case.weight_bits, case.channels), three(case.kernel, 1)
    taps, whole = math.prod(case.kernel), sum(case.channels) * math.prod(case.kernel)
    weight, offset, parts = at(packed, torch.uint8), 0, (Part * len(case.channels))()
    w_scale, w_zeros = at(case.w_scale), at(case.w_zeros)
    rows = math.prod(case.size)
    for index, k in enumerate(case.channels):
        size, boxes = library.qvsr_tiles_bytes(Long(case.outputs), Long(k), kernel, form), library.qvsr_boxes_count(Long(case.outputs), kernel)
        tiles_at, boxes_at = at(torch.full((size,), 255), torch.uint8), at(torch.full((boxes,), -(2**30)), torch.int32)
        lengths = [Long(value) for value in (row_bytes(whole, case.weight_bits), whole, offset)]
        shape = (case.weight_bits, Long(case.outputs), Long(k), kernel, form)
        code = library.qvsr_repack(Pointer(weight), *lengths, *shape, Pointer(tiles_at), Pointer(boxes_at), None)
        assert code == 0, library.qvsr_message(code)
        offset += taps * k
        q, totals, pitch = at(case.q[index], torch.uint8), at(torch.full((rows,), -(2**30)), torch.int32), library.qvsr_pitch(Long(k), form)
        copy = at(torch.full((rows * pitch,), 255), torch.uint8) if form == NIBBLES or k % 16 else None
        code = library.qvsr_prepare(Pointer(q), Long(rows), Long(k), form, Pointer(copy), Pointer(totals), None)
        assert code == 0, library.qvsr_message(code)
        group = {"tensor": rows, "frame": rows // case.size[0], "token": 1}[case.ranges]
        ranges = (at(case.scale[index]), at(case.zeros[index]))
        w = (w_scale + 4 * index, w_zeros + 4 * index)
        parts[index] = Part(copy or q, totals, *ranges, tiles_at, boxes_at, *w, group, pitch, len(case.channels), k)
    workspace = torch.zeros(library.qvsr_workspace_bytes(choices.get("multiprocessors", 8), len(case.channels)), dtype=torch.uint8)
    out = guarded(torch.full((*case.positions, case.outputs), math.nan)).to(dtype)
    which = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[dtype]
    extra = (at(case.bias_values), at(case.thin), at(case.up))
    chosen = (choices.get("multiprocessors", 8), which, choices.get("tile", 0), choices.get("splits", 0))
    layer = Layer(case.outputs, len(parts), case.weight_bits, form, arch, *chosen, case.rank, out.data_ptr(), *extra, workspace.data_ptr(), len(workspace))
    return Call(parts, layer, out, workspace, kept)


def code_of(library: ctypes.CDLL, case: Case, call: Call) -> int:
    if case.how:
        return library.qvsr_conv(call.parts, ctypes.byref(call.layer), ctypes.byref(window_of(case)), None)
    return library.qvsr_matmul(call.parts, ctypes.byref(call.layer), Long(math.prod(case.size)), None)


def run(library: ctypes.CDLL, case: Case, arch: int = 80, dtype: torch.dtype = torch.float32, **choices: int) -> Tensor:
    call = prepared(library, case, arch, dtype, **choices)
    code = code_of(library, case, call)
    assert code == 0, f"{library.qvsr_message(code).decode()}: {library.qvsr_emulate_error().decode()}"
    assert not call.workspace.any(), "the workspace is left as it was found"
    return call.out


def check(library: ctypes.CDLL, case: Case, arch: int = 80, **choices: int) -> None:
    got, expected = run(library, case, arch, **choices), case.expected()
    if case.plain:
        assert torch.equal(got, expected)
    else:
        assert float((got - expected).norm() / expected.norm()) < 1e-6  # float32 rounds a few times, in another order than float64


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("bits", [4, 8])
def test_smoke(library: ctypes.CDLL, arch: int, bits: int) -> None:
    check(library, Case([32], bits=bits, weight_bits=bits, plain=True), arch)
    check(library, Case([70, 3], bits=bits, weight_bits=bits, rank=3, bias=True, size=(2, 65)), arch)
    check(library, Case([70, 3], bits=bits, weight_bits=bits, rank=3, bias=True, size=(2, 65)), arch, splits=3)
    check(library, Case([70, 3], bits=bits, weight_bits=bits, rank=3, bias=True, size=(2, 6, 7), kernel=(3, 3), padding=(1,1), stride=(2, 1)), arch, tile=128)
