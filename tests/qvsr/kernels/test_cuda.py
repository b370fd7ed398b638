"""qvsr.kernels.cuda: its calls into the library with the kernels run on a CPU (csrc/emulate.h), its fallbacks, what it refuses; and a GPU, if there is one."""

from __future__ import annotations

import copy
import ctypes
import logging
import math
import os
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qvsr.kernels import build, cuda, fallback, ops, reference
from qvsr.kernels.packing import pack_weight
from qvsr.quant.layer import LayerPlan, QuantLayer, halves
from qvsr.quant.rotation import hadamard, random_signs, small_factors

no_gpu = cuda.missing()
needs_gpu = pytest.mark.skipif(no_gpu is not None, reason=f"no GPU that the kernels can be run on: {no_gpu}")
NEAR = 2e-6  # of the largest output: some roundings of float32, of the scales and of the last sum


@pytest.fixture
def generator() -> torch.Generator:
    seed = int(os.environ.get("QVSR_SEED", random.randrange(2**31)))
    print(f"QVSR_SEED={seed}")
    return torch.Generator().manual_seed(seed)


class Case:
    """A layer with random numbers, of which a few outputs depend on every corner."""

    def __init__(
        self,
        g: torch.Generator,
        channels: Sequence[int],
        outputs: int,
        size: Sequence[int],
        how: Sequence[Sequence[int]] = (),
        bits: int = 4,
        weight_bits: int = 4,
        granularity: str = "tensor",
        rank: int = 3,
        rotated: bool = True,
    ) -> None:
        self.maps, self.how, self.parts, self.bits = bool(how), [list(one) for one in how], list(channels), bits
        total, kernel = sum(channels), self.how[0] if how else []
        self.x = torch.randn((size[0], total, *size[1:]) if self.maps else (*size, total), generator=g) + 0.3
        integers = torch.randint(0, 2**weight_bits, (outputs, total, *kernel), generator=g, dtype=torch.uint8)
        self.weight, self.weight_bits = pack_weight(integers, weight_bits, channels), weight_bits
        self.weight_scale = torch.rand(outputs, len(channels), generator=g) + 0.01
        self.weight_zero = torch.randint(-3, 2**weight_bits, (outputs, len(channels)), generator=g).float()
        self.bias = torch.randn(outputs, generator=g)
        shape = (size[0], *reference.output_shape(size[1:], *self.how)) if self.maps else tuple(size)
        self.thin = torch.randn(*shape, rank, generator=g) if rank else None
        self.up = torch.randn(outputs, rank, generator=g) if rank else None
        self.granularity, self.rotated = granularity, rotated

    def to(self, device: str) -> Case:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def quantized(self, quantize: Any) -> list[list[Tensor]]:
        found, start = [], 0
        for size in self.parts:
            factors = [hadamard(one).to(self.x.device) for one in small_factors(size)] if self.rotated else []
            signs = random_signs(size, 0).float().to(self.x.device) if self.rotated else None
            arguments = (
                self.x,
                start,
                start + size,
                self.maps,
                self.maps,
                factors,
                signs,
                self.bits,
                self.granularity,
                False,
                1e-4,
                None,
                None,
                None,
            )
            found.append(quantize(*arguments))
            start += size
        return [list(one) for one in zip(*found, strict=True)]

    def run(self, module: Any, q: list[list[Tensor]], *dtype: torch.dtype) -> Tensor:
        function = module.conv_packed if self.maps else module.matmul_packed
        ranges = (self.weight_bits, self.weight_scale, self.weight_zero)
        return function(*q, self.weight, *ranges, *self.how, self.bias, self.thin, self.up, *dtype)

    def check(self, quantize: Any, module: Any) -> list[list[Tensor]]:
        q = self.quantized(quantize)
        expected, found = self.run(reference, q), self.run(module, q)
        assert found.shape == expected.shape and found.dtype == torch.float32 and found.is_contiguous()
        error = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
        assert error < NEAR, f"{error:.1e}"
        return q


CASES: dict[str, dict[str, Any]] = {
    "rows": {"channels": [64], "outputs": 40, "size": (7,)},
    "one row of two parts": {"channels": [32, 64], "outputs": 24, "size": (1,)},
    "odd channels": {"channels": [5], "outputs": 7, "size": (3, 11), "rotated": False},
    "one channel": {"channels": [1], "outputs": 1, "size": (5,), "rotated": False, "rank": 0},
    "tokens": {"channels": [48], "outputs": 33, "size": (2, 35), "granularity": "token"},
    "frames": {"channels": [48], "outputs": 33, "size": (3, 20), "granularity": "frame"},
    "8 bits": {"channels": [96], "outputs": 65, "size": (70,), "bits": 8, "weight_bits": 8},
    "6 bits": {"channels": [96], "outputs": 65, "size": (70,), "bits": 6, "weight_bits": 6},
    "3 bits": {"channels": [40, 24], "outputs": 9, "size": (19,), "bits": 8, "weight_bits": 3},
    "3 x 3": {"channels": [16], "outputs": 12, "size": (2, 5, 6), "how": ((3, 3), (1, 1), (1, 1), (1, 1))},
    "3 x 3 of frames": {
        "channels": [16, 12],
        "outputs": 12,
        "size": (3, 5, 6),
        "how": ((3, 3), (1, 1), (1, 1), (1, 1)),
        "granularity": "frame",
    },
    "strided": {"channels": [20], "outputs": 9, "size": (2, 7, 6), "how": ((3, 3), (2, 2), (1, 1), (1, 1)), "weight_bits": 6, "bits": 6},
    "dilated": {"channels": [20], "outputs": 9, "size": (1, 7, 8), "how": ((3, 3), (1, 1), (2, 2), (2, 2)), "weight_bits": 8, "bits": 8},
    "1 x 1 of pixels": {
        "channels": [24],
        "outputs": 17,
        "size": (2, 3, 5),
        "how": ((1, 1), (1, 1), (0, 0), (1, 1)),
        "granularity": "token",
    },
    "temporal": {"channels": [12], "outputs": 10, "size": (2, 5, 3, 2), "how": ((3, 1, 1), (1, 1, 1), (1, 0, 0), (1, 1, 1))},
    "sequence": {"channels": [12], "outputs": 10, "size": (2, 9), "how": ((3,), (1,), (1,), (1,))},
}


@pytest.mark.parametrize("architecture", [75, 80, 90])
@pytest.mark.parametrize("name", CASES)
def test_layers_agree_with_the_reference(
    generator: torch.Generator, on_cpu: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, name: str, architecture: int
) -> None:
    monkeypatch.setattr(cuda, "_chip", lambda x: cuda.Chip(architecture, 4, 65536 if architecture == 75 else 166912))
    case = Case(generator, **CASES[name])
    q = case.check(cuda.quantize_activation, cuda)
    again = [part.clone() for part in q[0]]  # of which nothing is kept: sums are made, and 8 bits assumed
    whole = case.run(cuda, q)
    assert torch.equal(case.run(cuda, [again, *q[1:]]), whole)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(case.run(cuda, q, dtype), whole.to(dtype)), dtype
    case.thin = case.up = None
    case.check(cuda.quantize_activation, cuda)
    case.bias = None
    case.check(cuda.quantize_activation, cuda)


EXTREMES: dict[str, Any] = {
    "normal": lambda x: x,
    "all zero": lambda x: 0 * x,
    "one outlier": lambda x: x.flatten().index_fill(0, torch.tensor(3), 1e4).view(x.shape),
    "below the smallest scale": lambda x: 1e-6 * x,
    "far from zero": lambda x: x + 1000,
}


@pytest.mark.parametrize("values", EXTREMES)
@pytest.mark.parametrize("granularity", ["tensor", "frame", "token"])
@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv2d 1x1", "conv3d"])
def test_quantized_layers_compute_with_the_kernels(
    on_cpu: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, name: str, granularity: str, values: str
) -> None:
    """A whole QuantLayer, halves, rotation and branch, whose operators are those of a GPU, against simulated execution by the CPU's."""
    module, shape = {
        "linear": (torch.nn.Linear(24, 10), (3, 5, 24)),
        "conv1d": (torch.nn.Conv1d(24, 10, 3, stride=2, padding=2, dilation=2), (2, 24, 15)),
        "conv2d": (torch.nn.Conv2d(24, 10, 3, padding=1), (2, 24, 6, 5)),
        "conv2d 1x1": (torch.nn.Conv2d(24, 10, 1, stride=(1, 2)), (2, 24, 6, 5)),
        "conv3d": (torch.nn.Conv3d(24, 10, (3, 1, 1), padding=(1, 0, 0)), (1, 24, 5, 3, 4)),
    }[name]
    x = EXTREMES[values](torch.randn(shape) + 0.3)
    with torch.no_grad():
        for bits, rotate in ((4, False), (8, True)):
            plan = LayerPlan(bits, bits, halves(24), rotate=rotate, rank=3, act_granularity=granularity)
            layer = QuantLayer.from_float(module, plan, name)
            layer.freeze()
            expected = layer(x)
            layer.set_execution("packed")
            with monkeypatch.context() as patch:
                patch.setattr(ops, "direct", lambda name, x, bits: getattr(cuda, name))
                found = layer(x)
            error = float((found - expected).norm() / expected.norm())
            assert found.shape == expected.shape and error < (5e-3 if rotate else 1e-5)  # one integer more or less of 8 bits


def test_channels_last_maps_of_the_operator(generator: torch.Generator, on_cpu: ctypes.CDLL) -> None:
    case = Case(generator, **CASES["3 x 3"])
    q = case.quantized(cuda.quantize_activation)
    case.x = case.x.to(memory_format=torch.channels_last)
    assert all(torch.equal(one, other) for one, other in zip(q[0], case.quantized(cuda.quantize_activation)[0], strict=True))


def test_empty_rows(generator: torch.Generator, on_cpu: ctypes.CDLL) -> None:
    case = Case(generator, channels=[8], outputs=5, size=(0,), rank=0, rotated=False)
    one = torch.tensor(1.0)
    q = [[torch.zeros(0, 8, dtype=torch.uint8)], [one], [one]]
    assert case.run(cuda, q).shape == (0, 5)


def test_weights_in_the_order_of_the_tensor_cores_are_kept(
    generator: torch.Generator, on_cpu: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(generator, channels=[32], outputs=16, size=(9,))
    assert cuda.kept_bytes(case.weight) == 0
    q = case.check(cuda.quantize_activation, cuda)
    kept = cuda.kept_bytes(case.weight)
    assert kept >= 32 * 16 // 2
    calls = []
    monkeypatch.setattr(on_cpu, "qvsr_repack", lambda *arguments: calls.append(arguments) or 0)
    case.run(cuda, q)
    assert not calls and cuda.kept_bytes(case.weight) == kept
    monkeypatch.undo()
    case.weight.bitwise_xor_(1)  # another weight in the same memory
    monkeypatch.setattr(cuda, "_library", lambda x: on_cpu)
    monkeypatch.setattr(cuda, "_chip", lambda x: cuda.Chip(80, 4, 166912))
    case.check(cuda.quantize_activation, cuda)
    cuda.forget(case.weight)
    assert cuda.kept_bytes(case.weight) == 0


def test_a_layer_s_weight_is_on_a_device_once(on_cpu: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed weight stays on the CPU and what the GPU has of it goes when the layer is moved; "meta" is the device that any machine has."""
    layer = QuantLayer.from_float(torch.nn.Linear(24, 10).requires_grad_(False), LayerPlan(4, 4, halves(24), rotate=True), "one")
    layer.freeze()
    layer.set_execution("packed")
    x, weight, integers = torch.randn(5, 24), layer.weight_packed, layer.integers()
    with torch.no_grad():
        expected = layer(x)
        monkeypatch.setattr(ops, "direct", lambda name, x, bits: getattr(cuda, name))
        for _ in range(2):
            torch.testing.assert_close(layer(x), expected)
            tiles = cuda.kept_bytes(weight)
            assert tiles >= weight.numel()
            layer.to("cpu", torch.float32)  # where it is already: a recorded graph may read the tiles
            assert layer.weight_packed is weight and cuda.kept_bytes(weight) == tiles
            copied = copy.deepcopy(layer)
            torch.testing.assert_close(copied(x), layer(x))
            assert copied.weight_packed is not weight and cuda.kept_bytes(copied.weight_packed) == tiles
            layer.to("meta")
            assert layer.weight_packed is weight and cuda.kept_bytes(weight) == 0 and layer.integers().device.type == "meta"
            layer = layer.to_empty(device="cpu")
            layer.load_state_dict(copied.state_dict())
            for name, factors in copied.named_buffers():
                if name not in layer.state_dict():
                    layer.register_buffer(name, factors, persistent=False)
            weight = layer.weight_packed
    assert torch.equal(layer.integers(), integers)


def test_a_packed_weight_is_copied_once_where_it_must_be_unpacked(generator: torch.Generator) -> None:
    weight = torch.zeros(3, 4, dtype=torch.uint8)
    assert cuda._copied(weight, weight.device) is weight and cuda.kept_bytes(weight) == 0
    there = cuda._copied(weight, torch.device("meta"))
    assert there.device.type == "meta" and cuda._copied(weight, torch.device("meta")) is there and cuda.kept_bytes(weight) == 12
    weight.add_(1)
    assert cuda._copied(weight, torch.device("meta")) is not there


def test_sums_beyond_32_bits_are_the_reference_s(generator: torch.Generator, on_cpu: ctypes.CDLL) -> None:
    rows, channels = 2, 67_000  # times 255 times 255 exceeds 2^32
    q, weight = torch.full((rows, channels), 255, dtype=torch.uint8), torch.full((3, channels), 255, dtype=torch.uint8)
    one, zeros = torch.tensor(1.0), torch.zeros(3, 1)
    y = cuda.matmul_packed([q], [one], [one * 0], pack_weight(weight, 8, [channels]), 8, zeros + 1, zeros, None, None, None)
    assert (y == 255 * 255 * channels).all()


# ---------------------------------------------------------------- without a library


@pytest.mark.parametrize("name", CASES)
def test_fallbacks_agree_with_the_reference(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(cuda, "_library", lambda x: None)
    monkeypatch.setattr(fallback, "BLOCK", 500)  # several blocks of rows
    case = Case(generator, **CASES[name])
    q = case.check(cuda.quantize_activation, cuda)
    assert torch.equal(case.run(cuda, q, torch.bfloat16), case.run(cuda, q).bfloat16())


def test_the_fallback_is_said_once_with_its_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("_libraries", "_said"):
        monkeypatch.setattr(cuda, name, type(getattr(cuda, name))())
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setattr(cuda, "_chip", lambda x: cuda.Chip(80, 4, 166912))
    x = torch.zeros(3)
    with caplog.at_level(logging.WARNING):
        assert cuda._library(x) is None and cuda._library(x) is None
    assert [record.getMessage() for record in caplog.records] == [
        "packed layers on the GPU are computed by PyTorch's own operators, more slowly: "
        "there is no nvcc; install NVIDIA's CUDA toolkit, or name the compiler in CUDACXX"
    ]
    assert isinstance(cuda._library_of(70), str) and cuda._libraries[70] == "compute capability 7.0 is below 7.5"


def test_a_library_that_cannot_be_loaded(tmp_path: Any, emulated: ctypes.CDLL) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    with pytest.raises(cuda.CudaError, match=rf"^the kernels' library {broken} cannot be used: .*; remove it, and it is built again$"):
        cuda.load(broken)
    older = build.build_emulated(tmp_path, ["quantize.cu"])
    with pytest.raises(cuda.CudaError, match=r"undefined symbol: qvsr_\w+; remove it, and it is built again$"):
        cuda.load(older)


# ---------------------------------------------------------------- what is refused


def quantize(x: Tensor, *, first: bool = False, stop: int = 8, bits: int = 4, granularity: str = "tensor", **more: Any) -> Any:
    rest = {"clip": None, "scale": None, "zero_point": None} | more
    return cuda.quantize_activation(x, 0, stop, first, False, [], None, bits, granularity, False, 1e-4, *rest.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(torch.zeros(3, 8), stop=9), r"channels 0 to 9 are not among the 8 of x \(3, 8\)"),
        (lambda: quantize(torch.zeros(3, 8), granularity="row"), r"granularity 'row' is none of tensor, frame, token"),
        (lambda: quantize(torch.zeros(3, 8), bits=9), r"9 bits are not possible; 2 to 8 are, and 16"),
        (lambda: quantize(torch.zeros(3, 8).half()), r"x is float16, float32 or bfloat16 is needed"),
        (lambda: quantize(torch.zeros(8, 3).T), r"x \(3, 8\) with strides \(1, 3\) is not contiguous; call contiguous\(\)"),
        (
            lambda: quantize(torch.zeros(2, 8, 4)[:, :, ::2], first=True),
            r"x \(2, 8, 2\) with strides \(32, 4, 2\) is not contiguous; call contiguous\(\)",
        ),
        (lambda: quantize(torch.zeros(3, 8), clip=torch.ones((), dtype=torch.float64)), r"clip is float64, float32 is needed"),
        (
            lambda: quantize(torch.zeros(3, 8), scale=torch.ones((), device="meta"), zero_point=torch.ones(())),
            r"scale is on meta, other arguments are on cpu; move it there",
        ),
    ],
)
def test_inputs_that_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ops.OperatorError, match=f"^quantize_activation: {message}$"):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(6, 5, dtype=torch.uint8)}, r"weight is \(6, 5\), \(6, 4\) is needed"),
        ({"weight": torch.zeros(6, 4, dtype=torch.int8)}, r"weight is int8, uint8 is needed"),
        ({"weight": torch.zeros(6, 4, dtype=torch.uint8, device="meta")}, r"weight is on meta, other arguments are on cpu; move it there"),
        (
            {"weight": torch.zeros(4, 6, dtype=torch.uint8).T},
            r"weight \(6, 4\) with strides \(1, 6\) is not contiguous; call contiguous\(\)",
        ),
        ({"bias": torch.zeros(6).double()}, r"bias is float64, float32 is needed"),
        ({"thin": torch.zeros(3, 2)}, r"a branch needs both thin and up"),
        ({"thin": torch.zeros(2, 2), "up": torch.zeros(6, 2)}, r"thin is \(2, 2\), \(3, 2\) is needed"),
        ({"thin": torch.zeros(3, 2), "up": torch.zeros(6, 3)}, r"thin is \(3, 2\), \(3, 3\) is needed"),
        ({"bias": torch.zeros(5)}, r"bias is \(5,\), \(6,\) is needed"),
        ({"weight_zero_point": torch.zeros(1, 1)}, r"weight_zero_point is \(1, 1\), \(6, 1\) is needed"),
        ({"scale": [torch.ones(4)]}, r"scale\[0\] \(4,\) does not fit q\[0\] \(3, 8\)"),
        ({"scale": []}, r"1 parts have 0 scales and 1 zero points, the weight has 1"),
        ({"q": [torch.zeros(3, 8)]}, r"q\[0\] is float32, uint8 or int32 is needed"),
        ({"weight_scale": torch.ones(1, 6).T[:, :1].double()}, r"weight_scale is float64, float32 is needed"),
    ],
)
def test_layers_that_are_refused(change: dict[str, Any], message: str) -> None:
    values = {
        "q": [torch.zeros(3, 8, dtype=torch.uint8)],
        "scale": [torch.ones(())],
        "zero_point": [torch.ones(())],
        "weight": torch.zeros(6, 4, dtype=torch.uint8),
        "bits": 4,
        "weight_scale": torch.ones(6, 1),
        "weight_zero_point": torch.ones(6, 1),
        "bias": None,
        "thin": None,
        "up": None,
    }
    with pytest.raises(ops.OperatorError, match=f"^matmul_packed: {message}$"):
        cuda.matmul_packed(*(values | change).values())


def test_a_window_that_does_not_fit() -> None:
    q = [torch.zeros(1, 4, 4, 8, dtype=torch.uint8)]
    with pytest.raises(
        ops.OperatorError,
        match=r"^conv_packed: kernel \[3\], stride \[1\], padding \[1\] and dilation \[1\] do not fit maps \(1, 4, 4, 8\)$",
    ):
        cuda.conv_packed(
            q, [torch.ones(())], [torch.ones(())], q[0][0, 0], 8, torch.ones(4, 1), torch.ones(4, 1), [3], [1], [1], [1], None, None, None
        )


def test_a_code_of_the_library_is_an_error(on_cpu: ctypes.CDLL, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(generator, channels=[32], outputs=16, size=(9,))
    q = case.quantized(cuda.quantize_activation)
    monkeypatch.setattr(cuda, "_chip", lambda x: cuda.Chip(70, 4, 166912))
    with pytest.raises(cuda.CudaError, match=r"^matmul_packed: the kernel was not started: .+ \(code -12\)$"):
        case.run(cuda, q)


# ---------------------------------------------------------------- a GPU


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_layers_agree_with_the_reference(generator: torch.Generator, name: str) -> None:
    """Through the registered operators, whose outputs lie where NaN lay."""
    case = Case(generator, **CASES[name]).to("cuda")
    torch.full((2**22,), math.nan, device="cuda")  # memory that the next outputs are likely to get
    q = case.check(torch.ops.qvsr.quantize_activation, torch.ops.qvsr)
    plain = case.quantized(reference.quantize_activation)
    apart = [(one.int() - other.int()).abs() for one, other in zip(q[0], plain[0], strict=True)]
    assert all(int(one.max()) <= (1 if case.rotated else 0) and float((one > 0).double().mean()) < 1e-2 for one in apart)


@needs_gpu
def test_gpu_stream_and_device() -> None:
    """Work goes to the current stream, and to the tensors' device, which need not be the current one."""
    g = torch.Generator().manual_seed(0)
    for index in range(torch.cuda.device_count()):
        device = f"cuda:{index}"
        case = Case(g, channels=[320], outputs=320, size=(4096,)).to(device)
        expected = case.run(torch.ops.qvsr, case.quantized(torch.ops.qvsr.quantize_activation))
        stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            case.x.neg_().neg_()  # on the other stream, behind the sleep
            found = case.run(torch.ops.qvsr, case.quantized(torch.ops.qvsr.quantize_activation))
        stream.synchronize()
        assert torch.equal(found, expected)


@needs_gpu
def test_gpu_runs_give_the_same_bytes() -> None:
    case = Case(torch.Generator().manual_seed(0), channels=[1280], outputs=640, size=(77,)).to("cuda")
    first = case.run(torch.ops.qvsr, case.quantized(torch.ops.qvsr.quantize_activation))
    for _ in range(5):
        assert torch.equal(first, case.run(torch.ops.qvsr, case.quantized(torch.ops.qvsr.quantize_activation)))


@needs_gpu
def test_gpu_graph_of_a_layer() -> None:
    case = Case(torch.Generator().manual_seed(0), channels=[320], outputs=320, size=(2, 16, 16), how=((3, 3), (1, 1), (1, 1), (1, 1))).to(
        "cuda"
    )
    run = lambda: case.run(torch.ops.qvsr, case.quantized(torch.ops.qvsr.quantize_activation))  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    case.x.mul_(-0.7)
    graph.replay()
    assert torch.equal(y, run())


def test_a_device_without_its_wgmma_says_so_once(
    generator: torch.Generator, on_cpu: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(generator, **CASES["3 x 3"])
    q = case.quantized(cuda.quantize_activation)
    monkeypatch.setattr(on_cpu, "qvsr_wgmma", lambda: -15)
    cuda._slower.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            case.run(cuda, q)
    (said,) = caplog.messages
    assert said.startswith("cpu: products that would take wgmma take mma.sync, more slowly: ") and "wgmma" in said.partition("slowly: ")[2]
