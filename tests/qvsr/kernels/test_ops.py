"""The operators of packed execution against 64-bit integers, on every way that a CPU has; and what they refuse."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from qvsr.kernels import cpu, native, ops, reference
from qvsr.kernels.packing import pack_weight
from qvsr.quant import affine

WAYS = (*native.ENGINES[1:], "int_mm", "reference")
integer_kernels = pytest.mark.skipif(cpu.missing() is not None, reason=f"no integer kernels here: {cpu.missing()}")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way in turn."""
    if request.param == "reference":
        monkeypatch.setattr(cpu, "missing", lambda: "a test asks for the reference")
        return request.param
    if cpu.missing() is not None:
        pytest.skip(f"no integer kernels here: {cpu.missing()}")
    engine = native.ENGINES.index({"int_mm": None}.get(request.param, request.param))
    if engine and not native.has_engine(engine):
        pytest.skip(f"this CPU has no {request.param}, or there is no C compiler: {native.missing()}")
    monkeypatch.setattr(native, "engine", lambda: engine)
    return request.param


class Case:
    """Random integers of a layer and what 64-bit arithmetic makes of them."""

    def __init__(
        self,
        channels: Sequence[int],
        outputs: int = 6,
        bits: int = 4,
        size: Sequence[int] = (3, 5),
        kernel: Sequence[int] = (),
        stride: Sequence[int] = (),
        padding: Sequence[int] = (),
        dilation: Sequence[int] = (),
        ranges: str = "tensor",
        zero: float = 7.0,
        weight_zero: float = 7.0,
        rank: int = 2,
        full: bool = False,
    ) -> None:
        g = torch.Generator().manual_seed(0)
        one = [1] * len(kernel)
        self.how = (list(kernel), list(stride or one), list(padding or [0 * k for k in kernel]), list(dilation or one)) if kernel else ()
        self.bits = bits
        draw = (lambda *shape: torch.full(shape, 2**bits - 1)) if full else (lambda *shape: torch.randint(0, 2**bits, shape, generator=g))
        self.q = [draw(*size, k).to(torch.uint8) for k in channels]
        shape = {"tensor": (), "frame": tuple(size[:1]), "token": tuple(size)}[ranges]
        self.scale = [torch.rand(shape, generator=g) + 0.5 for _ in channels]
        self.zero = [torch.round(zero + 3 * torch.rand(shape, generator=g)) for _ in channels]
        self.w = draw(outputs, sum(channels), *kernel).to(torch.uint8)
        self.packed = pack_weight(self.w, bits, channels)
        self.weight_scale = torch.rand(outputs, len(channels), generator=g) + 0.5
        self.weight_zero = torch.round(weight_zero + 3 * torch.rand(outputs, len(channels), generator=g))
        self.bias = torch.randn(outputs, generator=g)
        positions = reference.output_shape(size[1:], *self.how) if kernel else size[1:]
        self.thin = torch.randn(size[0], *positions, rank, generator=g) if rank else None
        self.up = torch.randn(outputs, rank, generator=g) if rank else None

    def arguments(self) -> tuple:
        return (
            self.q,
            self.scale,
            self.zero,
            self.packed,
            self.bits,
            self.weight_scale,
            self.weight_zero,
            *self.how,
            self.bias,
            self.thin,
            self.up,
        )

    def run(self, *dtype: torch.dtype) -> Tensor:
        return (torch.ops.qvsr.conv_packed if self.how else torch.ops.qvsr.matmul_packed)(*self.arguments(), *dtype)

    def expected(self) -> np.ndarray:
        """Sums in int64, position by position of the kernel; then float64."""
        y: np.ndarray | float = 0.0
        for part, w in enumerate(self.w.split([q.shape[-1] for q in self.q], 1)):
            s, z = (reference.spread(values[part], self.q[part].shape[:-1]).numpy() for values in (self.scale, self.zero))
            u = self.q[part].numpy().astype(np.int64) - z[..., None].astype(np.int64)
            v = w.numpy().astype(np.int64) - self.weight_zero[:, part].numpy().astype(np.int64).reshape(-1, *[1] * (w.dim() - 1))
            if not self.how:
                y = y + (u @ v.T) * s[..., None].astype(np.float64) * self.weight_scale[:, part].double().numpy()
                continue
            kernel, stride, padding, dilation = self.how
            positions = reference.output_shape(u.shape[1:-1], *self.how)
            edge = [(0, 0), *((p, p) for p in padding), (0, 0)]
            u, s = np.pad(u, edge), np.pad(s, edge[:-1], mode="edge")
            total, steps = np.zeros((len(u), *positions, len(v)), np.int64), None
            for tap in product(*(range(k) for k in kernel)):
                where = tuple(slice(t * d, t * d + n * st, st) for t, d, n, st in zip(tap, dilation, positions, stride, strict=True))
                total += u[(slice(None), *where)] @ v[(slice(None), slice(None), *tap)].T
                steps = s[(slice(None), *where)] if steps is None else steps
            y = y + total * steps[..., None].astype(np.float64) * self.weight_scale[:, part].double().numpy()
        branch = 0 if self.thin is None else self.thin.double().numpy() @ self.up.double().numpy().T
        return y + branch + self.bias.double().numpy()


CONV = {"kernel": (3, 3), "padding": (1, 1), "size": (2, 5, 6)}
CASES = {
    "linear": {"channels": (24,)},
    "linear, three parts": {"channels": (8, 9, 7), "bits": 6},
    "linear by frame": {"channels": (12, 12), "ranges": "frame", "bits": 8},
    "linear by token": {"channels": (12, 12), "ranges": "token", "bits": 8, "size": (2, 3, 4)},
    "one input": {"channels": (1,), "bits": 8},
    "odd inputs": {"channels": (13, 1)},
    "one output": {"channels": (7,), "outputs": 1},
    "one row, no branch": {"channels": (16, 16), "size": (1,), "rank": 0},
    "many rows": {"channels": (3,), "size": (5000,), "outputs": 130, "bits": 8},
    "largest integers": {"channels": (512, 512), "bits": 8, "full": True, "zero": 0, "weight_zero": 0},
    "zero points far away": {"channels": (24,), "bits": 8, "zero": -3e5, "weight_zero": -2000},
    "sums beyond 32 bits": {"channels": (24,), "bits": 8, "zero": -1e7, "weight_zero": 500},
    "conv1d": {"channels": (6, 6), "kernel": (3,), "stride": (2,), "padding": (2,), "dilation": (2,), "size": (2, 15)},
    "conv2d": {"channels": (8, 4), **CONV},
    "conv2d, 8 bits": {"channels": (8, 4), **CONV, "bits": 8},
    "conv2d by frame": {"channels": (8, 4), **CONV, "ranges": "frame", "bits": 8},
    "conv2d, many frames": {"channels": (4,), **CONV, "ranges": "frame", "size": (20, 4, 3)},
    "conv2d, zero point outside": {"channels": (8, 4), **CONV, "zero": -20, "weight_zero": 40},
    "conv2d, zero points outside": {"channels": (4,), **CONV, "ranges": "frame", "size": (20, 4, 3), "zero": 900, "bits": 8},
    "conv2d, strided": {"channels": (8,), "kernel": (3, 5), "stride": (2, 1), "padding": (1, 2), "size": (2, 7, 6), "rank": 0},
    "conv2d of pixels": {"channels": (8, 4), "kernel": (1, 1), "ranges": "token", "size": (2, 4, 5), "bits": 6},
    "conv2d of some pixels": {"channels": (8, 4), "kernel": (1, 1), "ranges": "token", "size": (2, 4, 5), "stride": (2, 3)},
    "conv2d of pixels and border": {"channels": (8,), "kernel": (1, 1), "ranges": "token", "size": (2, 4, 5), "padding": (1, 0)},
    "conv3d of frames": {"channels": (6, 6), "kernel": (3, 1, 1), "padding": (1, 0, 0), "size": (1, 5, 3, 4), "bits": 8},
    "conv3d": {
        "channels": (5,),
        "kernel": (3, 2, 3),
        "padding": (1, 0, 2),
        "stride": (1, 2, 1),
        "dilation": (1, 1, 2),
        "size": (2, 5, 5, 6),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_sums_are_those_of_64_bit_integers(name: str, way: str) -> None:
    case = Case(**CASES[name])
    found, expected = case.run(), case.expected()
    assert found.dtype == torch.float32 and found.is_contiguous() and tuple(found.shape) == expected.shape
    # one rounding of each part's sum, of the branch and of their sum in float32; sums of zero points far away cancel
    terms = max(float(abs(z).max()) + 2**case.bits for z in case.zero) * case.weight_scale.max() * sum(q.shape[-1] for q in case.q)
    assert np.abs(found.numpy() - expected).max() <= 1e-6 * np.abs(expected).max() + 1e-8 * float(terms)
    assert torch.equal(case.run(), found)  # what was kept of the weight changes nothing


@integer_kernels
def test_no_frames_and_no_tokens_give_nothing() -> None:
    for case in (Case((4, 4), size=(0, 5)), Case((4,), size=(0, 5, 6), kernel=(3, 3), padding=(1, 1))):
        assert case.run().shape == case.expected().shape and case.run().numel() == 0


@pytest.mark.parametrize("name", ["linear, three parts", "conv2d, 8 bits"])
def test_results_of_16_bits_are_those_of_32_rounded_once(name: str, way: str) -> None:
    case = Case(**CASES[name])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = case.run(dtype)
        assert found.dtype == dtype and found.is_contiguous() and torch.equal(found, case.run().to(dtype))


@pytest.mark.parametrize("name", ["linear, three parts", "conv2d, 8 bits", "conv2d by frame", "many rows"])
def test_one_and_two_threads_give_the_same_bytes(name: str, way: str) -> None:
    """The branch is left out: its float32 products are the one place where a library may add in another order."""
    case = Case(**{**CASES[name], "rank": 0})
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(case.run())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@integer_kernels
def test_what_is_known_of_a_weight_follows_it() -> None:
    case = Case((8, 4), **CONV)
    first = case.run()
    case.packed.zero_()  # in place: what was known is out of date
    case.w.zero_()
    assert not torch.equal(case.run(), first) and np.abs(case.run().numpy() - case.expected()).max() < 1e-3  # of 700


@pytest.mark.skipif(native.engine() == 0, reason=f"there is no product of our own here: {native.missing()}")
@pytest.mark.parametrize("bits", [4, 8])
def test_all_engines_give_the_same_bytes_in_several_panels(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of 2.5 MB is unpacked in panels, for 165 positions in six blocks, the last of both incomplete."""
    case = Case((700, 90), 370, bits, (3, 5, 11), (3, 3), padding=(1, 1), ranges="frame", rank=5)
    results = {}
    for engine in [0, *filter(native.has_engine, range(1, len(native.ENGINES)))]:
        monkeypatch.setattr(native, "engine", lambda engine=engine: engine)
        results[native.ENGINES[engine]] = case.run()
    assert np.allclose(results[None].numpy(), case.expected(), rtol=1e-5, atol=1e-5 * np.abs(case.expected()).max())
    assert len(results) > 1 and all(torch.equal(found, results[None]) for found in results.values())


def quantize(x: Tensor, granularity: str = "tensor", bits: int = 4, channels_first: bool = False, **given) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1 if channels_first else -1]
    settings = {"rotation": [], "signs": None, "symmetric": False, "floor": 1e-4, "clip": None, "scale": None, "zero_point": None, **given}
    start, stop = given.get("part", (0, channels))
    names = ("symmetric", "floor", "clip", "scale", "zero_point")
    return torch.ops.qvsr.quantize_activation(
        x,
        start,
        stop,
        channels_first,
        channels_first,
        settings["rotation"],
        settings["signs"],
        bits,
        granularity,
        *(settings[n] for n in names),
    )


INPUTS = {
    "random": lambda x: x,
    "all zero": lambda x: 0 * x,
    "constant": lambda x: 0 * x + 5,
    "one outlier": lambda x: torch.cat([x.flatten()[:-1], torch.tensor([1e4])]).view(x.shape),
    "below the smallest scale": lambda x: 1e-6 * x,
    "far from zero": lambda x: x + 100,
}


@pytest.mark.parametrize("values", INPUTS)
@pytest.mark.parametrize("granularity", ops.GRANULARITIES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_is_that_of_the_simulated_quantizer(values: str, granularity: str, symmetric: bool) -> None:
    x = INPUTS[values](torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)))
    ranges = {
        "tensor": affine.tensor_range,
        "frame": affine.channel_range,
        "token": lambda one: affine.vector_range(one, -1),
    }
    for bits, part in ((4, (0, 6)), (8, (2, 5)), (16, (2, 5))):
        piece = x[..., slice(*part)]
        low, high = (0.8 * end for end in ranges[granularity](piece))
        if symmetric:
            low, high = affine.symmetric_range(low, high, bits)
        scale, zero_point = affine.qparams(low, high, bits)
        q, s, z = quantize(x, granularity, bits, part=part, symmetric=symmetric, clip=torch.tensor(0.8))
        assert torch.equal(s.flatten(), scale.flatten()) and torch.equal(z.flatten(), zero_point.flatten())
        assert q.dtype == affine.storage(bits)
        assert torch.equal(q, affine.quantize(piece, scale, zero_point, bits))
        expected = affine.round_to_grid(piece, scale, zero_point, bits)
        assert torch.equal((q - reference.spread(z, q.shape[:-1])[..., None]) * reference.spread(s, q.shape[:-1])[..., None], expected)


def test_maps_come_out_channels_last() -> None:
    x = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    for granularity in ops.GRANULARITIES:
        first = quantize(x, granularity, channels_first=True)
        last = quantize(x.movedim(1, -1).contiguous(), granularity)
        assert first[0].is_contiguous() and all(torch.equal(one, other) for one, other in zip(first, last, strict=True))


def opcheck_cases() -> list[tuple[str, tuple]]:
    x, maps = torch.randn(3, 4, 6), torch.randn(2, 6, 3, 4)
    head = ([], None, 4)
    tail = (False, 1e-4, None, None, None)
    rotated = ([torch.eye(6)], None, 8)
    fixed = (True, 1e-4, None, torch.tensor(0.1), torch.tensor(8.0))
    return [
        *(("quantize_activation", (x, 0, 6, False, False, *head, kind, *tail)) for kind in ops.GRANULARITIES),
        *(("quantize_activation", (maps, 2, 5, True, True, *head, kind, *tail)) for kind in ops.GRANULARITIES),
        ("quantize_activation", (maps, 0, 6, True, True, *rotated, "tensor", *fixed)),
        ("matmul_packed", Case((8, 9, 7), bits=6).arguments()),
        ("matmul_packed", Case((4,), ranges="token", rank=0).arguments()),
        *(("conv_packed", Case(**CASES[name]).arguments()) for name in ("conv1d", "conv2d, 8 bits", "conv2d, strided", "conv3d")),
        ("matmul_packed", (*Case((8, 9, 7), bits=6).arguments(), torch.bfloat16)),
        ("conv_packed", (*Case(**CASES["conv1d"]).arguments(), torch.float16)),
    ]


@pytest.mark.parametrize(("name", "arguments"), opcheck_cases())
def test_opcheck(name: str, arguments: tuple) -> None:
    torch.library.opcheck(getattr(torch.ops.qvsr, name).default, arguments)


def test_a_weight_may_lie_on_the_cpu_wherever_the_rest_lies() -> None:
    """As a layer's does on a GPU: the device of the other tensors computes. Any machine has "meta", whose results have shapes alone."""
    for case, shape in ((Case((4, 4)), (3, 5, 6)), (Case((4, 4), **CONV), (2, 5, 6, 6))):
        moved = [
            one
            if one is case.packed
            else [each.to("meta") for each in one]
            if isinstance(one, list) and isinstance(one[0], Tensor)
            else one
            for one in case.arguments()
        ]
        moved = [one.to("meta") if isinstance(one, Tensor) and one is not case.packed else one for one in moved]
        y = (torch.ops.qvsr.conv_packed if case.how else torch.ops.qvsr.matmul_packed)(*moved, torch.bfloat16)
        assert y.device.type == "meta" and y.shape == shape and y.dtype == torch.bfloat16


def changed(**given) -> Case:
    case = Case((4, 4))
    for key, value in given.items():
        setattr(case, key, value)
    return case


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(torch.randn(4, 3).T), r"quantize_activation: x \(3, 4\) with strides \(1, 3\) is not contiguous"),
        (lambda: quantize(torch.randn(4, 3).double()), "quantize_activation: x is float64, float32 or bfloat16 is needed"),
        (lambda: quantize(torch.randn(4, 3), part=(2, 4)), r"channels 2 to 4 are not among the 3 of x \(4, 3\)"),
        (lambda: quantize(torch.randn(4, 3), "row"), "granularity 'row' is none of tensor, frame, token"),
        (lambda: quantize(torch.randn(4, 3), bits=9), "9 bits are not possible; 2 to 8 are, and 16"),
        (lambda: quantize(torch.randn(0, 3)), r"x \(0, 3\) is empty and so has no range"),
        (lambda: quantize(torch.tensor([[math.nan]]), scale=torch.tensor(1.0), zero_point=torch.tensor(0.0)), "x has NaN"),
        (lambda: changed(q=[torch.zeros(4, 3, dtype=torch.uint8).T] * 2).run(), r"matmul_packed: q\[0\] \(3, 4\) with strides"),
        (lambda: changed(q=[torch.zeros(3, 5, 4)] * 2).run(), r"matmul_packed: q\[0\] is float32, uint8 or int32 is needed"),
        (lambda: changed(weight_scale=torch.rand(2, 6).T).run(), r"matmul_packed: weight_scale \(6, 2\) with strides"),
        (lambda: changed(bias=torch.zeros(6).double()).run(), "matmul_packed: bias is float64, float32 is needed"),
        (lambda: changed(up=None).run(), "a branch needs both thin and up"),
        (lambda: changed(up=torch.zeros(6, 3)).run(), r"matmul_packed: thin is \(3, 5, 2\), \(3, 5, 3\) is needed"),
        (lambda: changed(bias=torch.zeros(5)).run(), r"matmul_packed: bias is \(5,\), \(6,\) is needed"),
        (lambda: changed(packed=torch.zeros(6, 5, dtype=torch.uint8)).run(), r"matmul_packed: weight is \(6, 5\), \(6, 4\) is needed"),
        (lambda: changed().run(torch.int32), "matmul_packed: a result of int32 is not possible; float32, float16, bfloat16 are"),
        (lambda: changed(scale=[torch.ones(2)] * 2).run(), r"scale\[0\] \(2,\) does not fit q\[0\] \(3, 5, 4\)"),
        (lambda: changed(zero=[torch.ones(())]).run(), "2 parts have 2 scales and 1 zero points, the weight has 2"),
        (lambda: changed(how=([3], [1, 1], [1], [1])).run(), r"conv_packed: kernel \[3\], stride \[1, 1\].* do not fit maps \(3, 5, 4\)"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_reference_says_once_why_it_computes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    case = Case((8, 4), **CONV)
    fast = case.run()
    monkeypatch.setattr(cpu, "missing", lambda: "this CPU is a test")
    monkeypatch.setattr(ops, "_said", set())
    with caplog.at_level(logging.WARNING):
        slow = [case.run(), case.run()]
    assert [record.getMessage() for record in caplog.records] == ["packed layers are computed by the slow reference: this CPU is a test"]
    assert torch.equal(*slow) and torch.allclose(fast, slow[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda patch: patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}), "no 8-bit dot products without saturation"),
        (lambda patch: patch.delattr(torch, "_int_mm"), "this PyTorch has no torch._int_mm"),
        (lambda patch: patch.setattr(torch, "_int_mm", lambda q, w: torch.zeros(16, 16)), "_int_mm of this CPU loses large products"),
    ],
)
@integer_kernels
def test_what_can_be_missing_is_named(change, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "engine", lambda: 0)
    change(monkeypatch)
    cpu.missing.cache_clear()
    try:
        assert reason in (cpu.missing() or "")
    finally:
        monkeypatch.undo()
        cpu.missing.cache_clear()
    assert cpu.missing() is None


@pytest.mark.parametrize("conv", [False, True])
def test_sums_are_exact_where_products_alone_exceed_float32(conv: bool, way: str) -> None:
    """All weights of a channel on one side of the middle: sums before the zero point's share is off are beyond 2^24, the true ones are not."""
    generator = torch.Generator().manual_seed(0)
    channels = 1200 if conv else 4000
    integers = torch.randint(0, 40, (6, channels, *(3, 3) * conv), dtype=torch.uint8, generator=generator)
    integers[:, 0] = 255
    weight, scale, zero = pack_weight(integers, 8, [channels]), torch.ones(6, 1), torch.full((6, 1), 20.0)
    q = torch.randint(118, 139, (2, 5, 4, channels), dtype=torch.uint8, generator=generator)
    part = [q], [torch.tensor(1.0)], [torch.tensor(128.0)]
    how = ([3, 3], [1, 1], [1, 1], [1, 1]) if conv else ()
    found = (torch.ops.qvsr.conv_packed if conv else torch.ops.qvsr.matmul_packed)(*part, weight, 8, scale, zero, *how, None, None, None)
    u, w = (q.to(torch.int64) - 128).double(), integers.double() - 20
    expected = torch.nn.functional.conv2d(u.movedim(-1, 1), w, padding=1).movedim(1, -1) if conv else u @ w.T
    assert expected.abs().max() < 2**24 < 128 * (integers.double() - 128).flatten(1).sum(1).abs().max()
    assert torch.equal(found.double(), expected)
