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
FLAGS = [
    "-x",
    "c++",
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-gnu-unique",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-DQVSR_EMULATE",
    "-fPIC",
]
NIBBLES = 1  # of QvsrForm
WGMMA = (1128, 1256)  # of QvsrTile
USED, DIFFERS = 1, -15  # of QvsrWgmma
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
    for source in ("matmul", "hopper", "conv", "pack"):
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


@pytest.fixture(scope="module")
def turing(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compute capability 7.5: quarters of the MMA, copies through registers."""
    return load(build(tmp_path_factory.mktemp("turing"), ["-O2", "-DQVSR_TARGET=750"]))


@pytest.fixture(autouse=True)
def seed() -> int:
    chosen = int(os.environ.get("QVSR_SEED") or random.SystemRandom().randrange(2**31))
    print(f"QVSR_SEED={chosen}")
    torch.manual_seed(chosen)
    return chosen


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
        self.how = (
            (list(self.kernel), list(self.stride or one), list(self.padding or [0] * len(one)), list(self.dilation or one)) if one else ()
        )

        def draw(bits: int, *shape: int) -> Tensor:
            return torch.full(shape, 2**bits - 1, dtype=torch.uint8) if self.full else torch.randint(2**bits, shape, dtype=torch.uint8)

        shape = {"tensor": (), "frame": tuple(self.size[:1]), "token": tuple(self.size)}[self.ranges]
        spread = 2.0 ** min(self.bits, self.weight_bits) / 4  # sums of two parts stay whole numbers of float32
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
        kept.append(values.to(dtype).clone())  # memory of its own, whose end an address sanitizer knows
        return kept[-1].data_ptr()

    form = library.qvsr_form(arch, case.weight_bits, case.bits)
    packed, kernel = pack_weight(case.w, case.weight_bits, case.channels), three(case.kernel, 1)
    taps, whole = math.prod(case.kernel), sum(case.channels) * math.prod(case.kernel)
    weight, offset, parts = at(packed, torch.uint8), 0, (Part * len(case.channels))()
    w_scale, w_zeros = at(case.w_scale), at(case.w_zeros)
    rows = math.prod(case.size)
    for index, k in enumerate(case.channels):
        size, boxes = (
            library.qvsr_tiles_bytes(Long(case.outputs), Long(k), kernel, form),
            library.qvsr_boxes_count(Long(case.outputs), kernel),
        )
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
        group = {"tensor": max(rows, 1), "frame": rows // max(case.size[0], 1), "token": 1}[case.ranges]
        ranges = (at(case.scale[index]), at(case.zeros[index]))
        w = (w_scale + 4 * index, w_zeros + 4 * index)
        parts[index] = Part(copy or q, totals, *ranges, tiles_at, boxes_at, *w, group, pitch, len(case.channels), k)
    workspace = torch.zeros(library.qvsr_workspace_bytes(choices.get("multiprocessors", 8), len(case.channels)), dtype=torch.uint8)
    out = torch.full((*case.positions, case.outputs), math.nan, dtype=dtype)
    which = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[dtype]
    extra = (at(case.bias_values), at(case.thin), at(case.up))
    chosen = (choices.get("multiprocessors", 8), which, choices.get("tile", 0), choices.get("splits", 0))
    layer = Layer(
        case.outputs,
        len(parts),
        case.weight_bits,
        form,
        arch,
        *chosen,
        case.rank,
        out.data_ptr(),
        *extra,
        workspace.data_ptr(),
        len(workspace),
    )
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


# ---------------------------------------------------------------- integers

CONV = {"kernel": (3, 3), "padding": (1, 1), "size": (2, 5, 6)}
EXACT = {
    "one of everything": {"channels": (1,), "size": (1,), "outputs": 1},
    "one row": {"channels": (96,), "size": (1,), "outputs": 70},
    "five inputs": {"channels": (5,), "size": (67,), "outputs": 9},
    "a step of 32 inputs": {"channels": (32,), "size": (64,), "outputs": 64},
    "odd inputs": {"channels": (77,), "size": (65,), "outputs": 65},
    "several steps, none whole": {"channels": (353,), "size": (3, 23), "outputs": 72},
    "two parts": {"channels": (160, 160), "size": (2, 33), "outputs": 40},
    "three parts": {"channels": (8, 9, 70), "size": (31,)},
    "four parts by frame": {"channels": (16, 3, 1, 40), "size": (3, 11), "ranges": "frame"},
    "by token": {"channels": (24, 13), "size": (5, 7), "ranges": "token"},
    "zero points outside": {"channels": (48,), "zero": 900.0, "weight_zero": -70.0},
    "zero points far away": {"channels": (24,), "zero": -3e5, "weight_zero": -2000.0},
    "sums beyond 32 bits": {"channels": (24,), "zero": -1e7, "weight_zero": 500.0},
    "sums beyond 32 bits of a border": {"channels": (4,), **CONV, "zero": 3e7, "weight_zero": -500.0},
    "conv1d": {"channels": (6, 6), "kernel": (3,), "stride": (2,), "padding": (2,), "dilation": (2,), "size": (2, 15)},
    "conv2d": {"channels": (80, 17), **CONV},
    "conv2d by frame": {"channels": (8, 4), **CONV, "ranges": "frame"},
    "conv2d, zero point outside": {"channels": (8, 4), **CONV, "zero": -20.0, "weight_zero": 340.0},
    "conv2d, strided": {"channels": (8,), "kernel": (3, 5), "stride": (2, 1), "padding": (1, 2), "size": (2, 7, 6)},
    "conv2d, dilated": {"channels": (8,), "kernel": (3, 3), "padding": (2, 2), "dilation": (2, 2), "size": (1, 7, 9)},
    "conv2d, more border than map": {"channels": (3,), "kernel": (3, 2), "padding": (3, 3), "size": (1, 2, 1), "outputs": 11},
    "conv2d of pixels": {"channels": (8, 4), "kernel": (1, 1), "ranges": "token", "size": (2, 4, 5)},
    "conv2d of some pixels": {"channels": (8, 4), "kernel": (1, 1), "ranges": "token", "size": (2, 4, 5), "stride": (2, 3)},
    "conv2d of pixels and border": {"channels": (8,), "kernel": (1, 1), "ranges": "token", "size": (2, 4, 5), "padding": (1, 0)},
    "conv3d of frames": {"channels": (6, 70), "kernel": (3, 1, 1), "padding": (1, 0, 0), "size": (1, 5, 3, 4)},
    "conv3d": {
        "channels": (5,),
        "kernel": (3, 2, 3),
        "padding": (1, 0, 2),
        "stride": (1, 2, 1),
        "dilation": (1, 1, 2),
        "size": (2, 5, 5, 6),
    },
}


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("name", EXACT)
def test_integers_are_exact(library: ctypes.CDLL, name: str, bits: int) -> None:
    case = Case(**{"bits": bits, "weight_bits": bits, "zero": 2.0**bits / 3, "weight_zero": 2.0**bits / 3} | EXACT[name], plain=True)
    check(library, case, arch=80)
    if bits == 4:
        check(library, case, arch=90)


@pytest.mark.parametrize("tile", WGMMA)
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("name", EXACT)
def test_integers_are_exact_by_wgmma(library: ctypes.CDLL, name: str, bits: int, tile: int) -> None:
    case = Case(**{"bits": bits, "weight_bits": bits, "zero": 2.0**bits / 3, "weight_zero": 2.0**bits / 3} | EXACT[name], plain=True)
    check(library, case, arch=90, tile=tile)
    assert library.qvsr_wgmma() == USED


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("bits", [4, 8])
def test_every_width_of_weights(library: ctypes.CDLL, weight_bits: int, bits: int) -> None:
    check(library, Case((37, 9), size=(33,), bits=bits, weight_bits=weight_bits, plain=True))
    check(library, Case((13,), **CONV, bits=bits, weight_bits=weight_bits, plain=True))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tile", [64, 128, 256, *WGMMA])
def test_random_sizes(library: ctypes.CDLL, tile: int, bits: int) -> None:
    for _ in range(3):
        sizes = [int(torch.randint(1, high, ())) for high in (150, 200, 90, 30)]
        two = Case(sizes[2:], size=sizes[:1], outputs=sizes[1], bits=bits, weight_bits=bits, plain=True)
        check(library, two, arch=90, tile=tile)  # the widest tile takes two parts only where there is much shared memory
        one = Case(sizes[2:3], size=sizes[:1], outputs=sizes[1], bits=bits, weight_bits=bits, plain=True)
        check(library, one, arch=90 if tile in WGMMA else 80, tile=tile)


@pytest.mark.parametrize("k", [33025, 33026, 66051])
def test_the_largest_sums_fill_32_bits(library: ctypes.CDLL, k: int) -> None:
    """33025 products of 255 and 255 are the most that a signed sum holds, 66051 the most of an unsigned one."""
    case = Case((k,), size=(2,), outputs=3, full=True, plain=True)
    case.zeros, case.w_zeros = [torch.zeros(())], torch.zeros(3, 1)
    assert run(library, case).unique().tolist() == [float(np.float32(k * 255 * 255))]


@pytest.mark.parametrize("weight_zero", [5e9, -7e12])
def test_zero_points_beyond_32_bits(library: ctypes.CDLL, weight_zero: float) -> None:
    check(library, Case((40,), zero=-4e11, weight_zero=80.0))
    check(library, Case((40,), zero=100.0, weight_zero=weight_zero))


@pytest.mark.parametrize("size", [(0,), (3, 0)])
def test_no_rows(library: ctypes.CDLL, size: tuple[int, ...]) -> None:
    assert run(library, Case((16,), size=size)).shape == (*size, 20)


def test_no_output_channels(library: ctypes.CDLL) -> None:
    assert run(library, Case((16,), outputs=0)).shape == (30, 0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["several steps, none whole", "three parts", "conv2d", "conv2d, strided", "conv3d of frames"])
def test_compute_capability_7_5(turing: ctypes.CDLL, name: str, bits: int) -> None:
    defaults = {"bits": bits, "weight_bits": bits, "zero": 2.0**bits / 3, "weight_zero": 2.0**bits / 3}
    check(turing, Case(**defaults | EXACT[name], plain=True), arch=75, tile=128)


# ---------------------------------------------------------------- what follows the integers


@pytest.mark.parametrize("rank", [0, 1, 8, 19])
@pytest.mark.parametrize("ranges", ["tensor", "frame", "token"])
def test_scales_branch_and_bias(library: ctypes.CDLL, ranges: str, rank: int) -> None:
    case = Case((20, 33), size=(5, 14), outputs=131, ranges=ranges, rank=rank, bias=True)
    for tile in (64, 128, 256, *WGMMA):
        check(library, case, arch=90, tile=tile)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("rank", [0, 5])
def test_convolution_with_scales_branch_and_bias(library: ctypes.CDLL, arch: int, rank: int) -> None:
    check(library, Case((20, 33), **CONV, ranges="frame", bits=4, weight_bits=4, zero=7.0, weight_zero=7.0, rank=rank, bias=True), arch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outputs", [7, 8])
def test_half_precision_is_the_rounded_result(library: ctypes.CDLL, dtype: torch.dtype, outputs: int) -> None:
    case = Case((20,), outputs=outputs, rank=2, bias=True)
    case.scale = [torch.tensor(1e-4)]  # within float16
    assert torch.equal(run(library, case, dtype=dtype), run(library, case).to(dtype))


def test_a_nan_scale_is_seen(library: ctypes.CDLL) -> None:
    case = Case((20,), ranges="token")
    case.scale[0][3] = math.nan
    assert run(library, case).isnan().all(1).nonzero().tolist() == [[3]]


# ---------------------------------------------------------------- how it is computed


@pytest.mark.parametrize("name", ["one row", "three parts", "conv2d", "conv3d of frames"])
def test_blocks_that_share_a_sum_give_the_same_bytes(library: ctypes.CDLL, name: str) -> None:
    case = Case(**EXACT[name], rank=3, bias=True)
    alone = run(library, case, tile=64, splits=1)
    for splits in (2, 3, 100):
        assert torch.equal(run(library, case, tile=64, splits=splits), alone)
    assert torch.equal(run(library, case, multiprocessors=100), alone)  # splits chosen by size


@pytest.mark.parametrize("name", ["one row", "three parts", "conv2d", "conv3d of frames"])
def test_blocks_that_share_a_sum_by_wgmma_give_the_same_bytes(library: ctypes.CDLL, name: str) -> None:
    case = Case(**EXACT[name], rank=3, bias=True)
    alone = run(library, case, tile=64, splits=1)
    for splits in (1, 2, 3, 100):
        assert torch.equal(run(library, case, arch=90, tile=1128, splits=splits), alone)


@pytest.mark.parametrize("rank", [0, 9])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_wgmma_gives_the_bytes_of_mma(library: ctypes.CDLL, bits: int, kernel: tuple[int, ...], rank: int) -> None:
    """Scales, branch and bias come behind the same integers in the same order; sums of several steps in each stage of the ring."""
    how = {"kernel": kernel, "padding": (1, 1), "size": (2, 8, 9)} if kernel else {"size": (150,)}
    case = Case((336 if not kernel else 70, 19), **how, outputs=270, bits=bits, weight_bits=bits, rank=rank, bias=True, ranges="frame")
    expected = run(library, case, arch=90, tile=128)
    for tile in WGMMA:
        assert torch.equal(run(library, case, arch=90, tile=tile), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outputs", [67, 68])
def test_wgmma_stores_every_type(library: ctypes.CDLL, outputs: int, dtype: torch.dtype) -> None:
    case = Case((20,), outputs=outputs)
    assert torch.equal(run(library, case, arch=90, dtype=dtype, tile=1128), run(library, case, arch=90, dtype=dtype, tile=64))


def test_a_large_product_is_by_wgmma_where_the_chip_has_it(library: ctypes.CDLL) -> None:
    """Seen from outside: the check of the device runs where the choice falls on wgmma, and not elsewhere."""
    for arch, size, outputs, state in (
        (80, 300, 130, 0),
        (100, 300, 130, 0),
        (90, 60, 130, 0),
        (90, 300, 60, 0),
        (90, 70, 70, 0),
        (90, 300, 130, USED),
    ):
        library.qvsr_emulate_misread(0)  # forget
        check(library, Case((64,), size=(size,), outputs=outputs), arch=arch)
        assert library.qvsr_wgmma() == state, (arch, size, outputs)


@pytest.mark.parametrize("tile", [0, *WGMMA])
def test_a_chip_on_which_wgmma_gives_other_sums_uses_mma(library: ctypes.CDLL, tile: int) -> None:
    case = Case((64,), size=(130,), outputs=130, plain=True)
    try:
        library.qvsr_emulate_misread(1)
        assert library.qvsr_wgmma() == 0
        check(library, case, arch=90, tile=tile, multiprocessors=1)
        assert library.qvsr_wgmma() == DIFFERS
        message = "wgmma gave other sums than mma.sync on this device, so mma.sync is used, which is slower"
        assert library.qvsr_message(DIFFERS).decode() == message
    finally:
        library.qvsr_emulate_misread(0)


def test_any_order_of_threads_gives_the_same_bytes(library: ctypes.CDLL) -> None:
    case = Case((70, 9), **CONV, outputs=70, rank=3)
    expected = run(library, case)
    try:
        for order in (1, 2, 3):
            library.qvsr_emulate_seed(order)
            tiles = [{"tile": tile} for tile in (64, 128, 256, *WGMMA)]
            for choices in (*tiles, {"tile": 64, "splits": 3}, {"tile": 1128, "splits": 3}):
                assert torch.equal(run(library, case, arch=90, **choices), expected)
    finally:
        library.qvsr_emulate_seed(0)


def test_shared_memory_is_read_without_conflicts(library: ctypes.CDLL) -> None:
    before = library.qvsr_bank_conflicts()
    for tile in (64, 128, 256):
        run(library, Case((130,), size=(130,), outputs=130), tile=tile)
    assert library.qvsr_bank_conflicts() == before


def test_a_small_workspace_means_no_splits(library: ctypes.CDLL) -> None:
    case = Case((300,), size=(3,))
    call = prepared(library, case, splits=4)
    call.layer.workspace_bytes = 64
    call.workspace.fill_(255)  # untouched
    assert code_of(library, case, call) == 0 and bool((call.workspace == 255).all())
    assert torch.equal(call.out, run(library, case, splits=4))


# ---------------------------------------------------------------- memory


def tile_values(tiles: np.ndarray, form: int) -> np.ndarray:
    """Bytes ``(tile, channel, 64)`` of the layout that csrc/pack.cuh describes, by its words."""
    size = 64 * (8 if form == NIBBLES else form)
    values = np.zeros((len(tiles) // size, 8, 64), np.uint8)
    for tile, lane in product(range(len(values)), range(32)):
        block = tiles[tile * size : (tile + 1) * size]
        if form in (NIBBLES, 8):
            registers = block[16 * lane : 16 * lane + 16].reshape(4, 4)
        else:
            low = block[8 * lane : 8 * lane + 8].reshape(2, 4)
            registers = np.stack([low[0] & 15, low[0] >> 4, low[1] & 15, low[1] >> 4])
            if form == 6:
                high = block[256 + 4 * lane : 260 + 4 * lane]
                registers = registers + np.stack([(high >> 2 * r & 3) << 4 for r in range(4)])
        for register, byte in product(range(4), range(4)):
            values[tile, lane // 4, register // 2 * 32 + register % 2 * 16 + lane % 4 * 4 + byte] = registers[register, byte]
    return values


@pytest.mark.parametrize(("arch", "bits"), [(80, 3), (90, 4), (90, 6), (90, 8)])
def test_tiles_and_boxes_hold_the_weights(library: ctypes.CDLL, arch: int, bits: int) -> None:
    channels, outputs, kernel = (70, 5), 11, (2, 3)
    case = Case(channels, outputs=outputs, size=(1, 3, 3), kernel=kernel, bits=min(bits, 4), weight_bits=bits)
    form = library.qvsr_form(arch, bits, case.bits)
    assert form == (NIBBLES if arch == 80 else bits)
    call = prepared(library, case, arch)
    for index, w in enumerate(case.w.split(list(channels), 1)):
        k, taps = w.shape[1], math.prod(kernel)
        tiles = np.ctypeslib.as_array(
            ctypes.cast(call.parts[index].tiles, ctypes.POINTER(ctypes.c_uint8)),
            (library.qvsr_tiles_bytes(Long(outputs), Long(k), three(kernel, 1), form),),
        )
        bytes_ = tile_values(tiles, form).reshape(taps, -1, 2, 8, 64).transpose(2, 3, 0, 1, 4).reshape(16, taps, -1)
        if form == NIBBLES:
            bytes_ = np.stack([bytes_ & 15, bytes_ >> 4], -1).reshape(16, taps, -1)
        assert np.array_equal(bytes_[:outputs, :, :k], w.flatten(2).transpose(1, 2).numpy())
        assert not bytes_[outputs:].any() and not bytes_[:, :, k:].any()
        boxes = np.ctypeslib.as_array(ctypes.cast(call.parts[index].boxes, ctypes.POINTER(ctypes.c_int32)), (3 * 6 + 1, outputs))
        intervals = [[(lo, hi) for hi in range(size) for lo in range(hi + 1)] for size in kernel]
        for number, ((a, b), (c, d)) in enumerate(product(*intervals)):
            assert np.array_equal(boxes[number], w[:, :, a : b + 1, c : d + 1].long().sum((1, 2, 3)).numpy())
        assert not boxes[-1].any()


@pytest.mark.parametrize(("k", "form"), [(16, 8), (48, 8), (5, 8), (333, 8), (64, NIBBLES), (1, NIBBLES), (95, NIBBLES)])
def test_prepared_rows(library: ctypes.CDLL, k: int, form: int) -> None:
    q = torch.randint(16 if form == NIBBLES else 256, (9, k), dtype=torch.uint8)
    pitch = library.qvsr_pitch(Long(k), form)
    assert pitch == (-(-k // 32) if form == NIBBLES else -(-k // 16)) * 16
    copy, totals = torch.full((9, pitch), 255, dtype=torch.uint8), torch.zeros(9, dtype=torch.int32)
    arguments = (Pointer(q.data_ptr()), Long(9), Long(k), form)
    assert library.qvsr_prepare(*arguments, Pointer(copy.data_ptr()), Pointer(totals.data_ptr()), None) == 0
    assert torch.equal(totals.long(), q.long().sum(1))
    values = torch.stack([copy & 15, copy >> 4], -1).flatten(1) if form == NIBBLES else copy
    assert torch.equal(values[:, :k], q) and not values[:, k:].any()
    totals.zero_()
    assert library.qvsr_prepare(*arguments, None, Pointer(totals.data_ptr()), None) == 0
    assert torch.equal(totals.long(), q.long().sum(1))


def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path) -> None:
    """The tests above once more in a process with an address sanitizer, which knows where each tensor ends."""
    if "QVSR_EMULATED" in os.environ:
        pytest.skip("this is that process")
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("g++ has no address sanitizer here")
    sanitize = ["-O1", "-fsanitize=address,alignment,shift", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    environment = os.environ | {
        "QVSR_EMULATED": str(build(tmp_path, sanitize)),
        "LD_PRELOAD": str(Path(found).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "OMP_NUM_THREADS": "1",
    }
    chosen = "by_wgmma or integers_are_exact or every_width or scales_branch or convolution_with or half_precision or share_a_sum or prepared_rows or tiles_and"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "-k", chosen, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


# ---------------------------------------------------------------- arguments


def changed(**values: object):
    def change(call: Call) -> None:
        for name, value in values.items():
            setattr(call.parts[0] if name in {field[0] for field in Part._fields_} else call.layer, name, value)

    return change


REFUSED = {
    "q is null": (changed(q=None), "a pointer that is needed is null"),
    "totals are null": (changed(totals=None), "a pointer that is needed is null"),
    "out is null": (changed(out=None), "a pointer that is needed is null"),
    "pitch below the values": (changed(pitch=16), "a size is negative or beyond 2^31"),
    "no inputs": (changed(K=0), "a size is negative or beyond 2^31"),
    "negative outputs": (changed(N=-1), "a size is negative or beyond 2^31"),
    "too many outputs": (changed(N=2**31), "a size is negative or beyond 2^31"),
    "pitch of 40": (changed(pitch=40), "not aligned"),
    "no part": (changed(parts=0), "there must be 1 to 4 parts"),
    "five parts": (changed(parts=5), "there must be 1 to 4 parts"),
    "9 bits": (changed(weight_bits=9), "weights must have 2 to 8 bits"),
    "6 bits in 4": (changed(form=4, weight_bits=6), "this form of weights does not exist, does not hold these bits"),
    "form 5": (changed(form=5), "this form of weights does not exist"),
    "4-bit MMA on 9.0": (changed(form=NIBBLES, weight_bits=4, arch=90), "needs 4-bit tensor cores (7.5 to 8.9)"),
    "dtype 3": (changed(dtype=3), "the result can be float32 (0), float16 (1) or bfloat16 (2)"),
    "sums": (changed(K=66052, pitch=2**20), "integer sums could exceed 32 bits"),
    "no group": (changed(group=0), "rows that share a scale must be at least 1"),
    "rank alone": (changed(rank=3), "a low-rank branch needs thin and up"),
    "7.0": (changed(arch=70), "compute capability 7.5 or later is needed"),
    "tile of 96": (changed(tile=96), "tile must be 0, 64, 128 or 256"),
    "wgmma on 8.0": (changed(tile=1128), "on 9.0 also 1128 or 1256"),
    "wgmma on 10.0": (changed(tile=1256, arch=100), "on 9.0 also 1128 or 1256"),
    "negative splits": (changed(splits=-1), "splits not negative"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(library: ctypes.CDLL, name: str) -> None:
    change, message = REFUSED[name]
    case = Case((20,))
    call = prepared(library, case)
    change(call)
    code = code_of(library, case, call)
    assert code < 0 and message in library.qvsr_message(code).decode()
    assert call.out.isnan().all()


@pytest.mark.parametrize("name", ["q", "tiles", "out", "workspace"])
def test_refused_alignment(library: ctypes.CDLL, name: str) -> None:
    case = Case((32,))
    call = prepared(library, case)
    owner = call.parts[0] if name in ("q", "tiles") else call.layer
    setattr(owner, name, getattr(owner, name) + 2)
    code = code_of(library, case, call)
    assert "are not aligned to 16 bytes, out not to its values" in library.qvsr_message(code).decode()


WINDOWS = {
    "kernel of zero": ("kernel", 0, "kernel, stride, padding, dilation and sizes do not fit each other"),
    "stride of zero": ("stride", 0, "kernel, stride, padding, dilation and sizes do not fit each other"),
    "negative padding": ("padding", -1, "kernel, stride, padding, dilation and sizes do not fit each other"),
    "another size of the result": ("out", 7, "kernel, stride, padding, dilation and sizes do not fit each other"),
    "344 taps": ("kernel", 344, "kernel, stride, padding, dilation and sizes do not fit each other"),
    "negative size": ("in", -3, "a size is negative or beyond 2^31"),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_refused_windows(library: ctypes.CDLL, name: str) -> None:
    what, value, message = WINDOWS[name]
    case = Case((20,), **CONV)
    call, window = prepared(library, case), window_of(case)
    getattr(window, what)[2] = value
    code = library.qvsr_conv(call.parts, ctypes.byref(call.layer), ctypes.byref(window), None)
    assert code < 0 and message in library.qvsr_message(code).decode()


def test_scales_a_pixel_are_refused_for_several_taps(library: ctypes.CDLL) -> None:
    case = Case((20,), **CONV)
    call = prepared(library, case)
    call.parts[0].group = 1
    assert "of a kernel with several taps whole frames" in library.qvsr_message(code_of(library, case, call)).decode()


@pytest.mark.parametrize(
    ("arguments", "form"),
    [((75, 4, 4), 1), ((89, 3, 4), 1), ((90, 4, 4), 4), ((121, 4, 4), 4), ((80, 4, 8), 4), ((86, 6, 6), 6), ((80, 8, 4), 8)],
)
def test_the_form_follows_the_chip(library: ctypes.CDLL, arguments: tuple[int, int, int], form: int) -> None:
    assert library.qvsr_form(*arguments) == form


def test_repack_refuses_what_does_not_hold_the_part(library: ctypes.CDLL) -> None:
    weight, tiles, boxes = (torch.zeros(4096, dtype=torch.uint8) for _ in range(3))
    pointers = [Pointer(values.data_ptr()) for values in (weight, tiles, boxes)]

    def code(row_bytes: int = 32, row_values: int = 64, offset: int = 0, bits: int = 4, k: int = 64, form: int = 4) -> str:
        rows = (Long(row_bytes), Long(row_values), Long(offset), bits, Long(2), Long(k))
        return library.qvsr_message(library.qvsr_repack(pointers[0], *rows, three((), 1), form, *pointers[1:], None)).decode()

    assert code() == "no error"
    assert code(row_bytes=31) == code(offset=1) == code(k=65) == "a size is negative or beyond 2^31"
    assert code(bits=1) == "weights must have 2 to 8 bits"
    assert code(bits=6, row_bytes=48).startswith("this form of weights does not exist, does not hold these bits")
