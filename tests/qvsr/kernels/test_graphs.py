"""Recorded calls: made as they are without a GPU; replayed with new values on one, or on a stand-in that repeats what was called on tensors."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qvsr.kernels import cuda, graphs, ops
from qvsr.kernels.graphs import Graphed, recorded
from qvsr.quant import apply
from qvsr.quant.layer import LayerPlan, QuantLayer, halves

# ---------------------------------------------------------------- a GPU's part


class Tape(TorchDispatchMode):
    """Notes what is called on tensors; to read a value back is an error, as it is while a graph is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(function) for name in ("_local_scalar_dense", "unique", "equal.default", "nonzero")):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out


class Gpu:
    """What :mod:`torch.cuda` has for graphs, on the CPU. A graph repeats its calls into the tensors of the recording."""

    def __init__(self) -> None:
        self.streams: list[Any] = ["the caller's"]
        self.tapes: list[Tape] = []
        self.pools: list[Any] = []
        gpu = self

        class Stream:
            def __init__(self, device: Any) -> None:
                self.waits: list[Any] = []

            def wait_stream(self, other: Any) -> None:
                self.waits.append(other)

        class Graph:
            tape: Tape

            def pool(self) -> str:
                return "the pool"

            def replay(self) -> None:
                assert gpu.streams == ["the caller's"]
                for function, args, kwargs, out in self.tape.calls:
                    for mine, again in zip(pytree.tree_leaves(out), pytree.tree_leaves(function(*args, **kwargs)), strict=True):
                        if isinstance(mine, Tensor) and mine.data_ptr() != again.data_ptr():
                            mine.copy_(again)

        class Recording:
            """torch.cuda.graph, which leaves its stream only when the recording ends well."""

            def __init__(self, graph: Graph, pool: Any, stream: Any) -> None:
                self.graph, self.stream = graph, stream
                gpu.pools.append(pool)

            def __enter__(self) -> None:
                gpu.streams.append(self.stream)
                self.tape = self.graph.tape = Tape()
                gpu.tapes.append(self.tape)
                self.tape.__enter__()

            def __exit__(self, kind: Any, *rest: Any) -> None:
                self.tape.__exit__(kind, *rest)
                gpu.tapes.pop()
                if kind is not None:
                    raise RuntimeError("the recording is not valid any more")
                gpu.streams.pop()

        @contextmanager
        def stream(which: Any) -> Iterator[None]:
            before = list(gpu.streams)
            gpu.streams.append(which)
            try:
                yield
            finally:
                gpu.streams[:] = before

        caller = Stream(None)
        self.parts = {"Stream": Stream, "CUDAGraph": Graph, "graph": Recording, "stream": stream}
        self.parts |= {"current_stream": lambda device: caller, "is_current_stream_capturing": lambda: bool(gpu.tapes)}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    for name, part in found.parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    return found


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


class Net(nn.Module):
    """Two packed layers, one with ranges by timestep; it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.calls = 0
        plan = LayerPlan(4, 4, halves(8), rotate=True, rank=2)
        self.first = QuantLayer.from_float(nn.Linear(8, 8).requires_grad_(False), plan, "first")
        self.second = QuantLayer.from_float(nn.Linear(8, 6).requires_grad_(False), plan, "second")
        bounds = torch.tensor([[1.0], [2.0], [4.0]]).expand(3, 2)
        self.first.set_static_activations(-bounds, bounds, timesteps=[100, 500, 999])
        apply.freeze(self)
        apply.follow_timesteps(self)
        apply.set_execution(self, "packed")

    def forward(self, x: Tensor, t: Tensor, struct: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        return self.second(torch.relu(self.first(x + t.view(-1, 1) / 1000))) + struct["6"]


def inputs(timestep: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return torch.randn(3, 8), torch.tensor([timestep]), {"6": torch.randn(3, 6)}


# ---------------------------------------------------------------- networks


def test_a_packed_network_is_recorded_for_each_row_of_its_tables_and_replayed(gpu: Gpu) -> None:
    net, plain = Net(), Net()
    for round_, timesteps in enumerate(((50, 300, 900), (100, 101, 700), (3, 500, 999), (50, 300, 900))):
        call = recorded(net)  # as each image tile does
        for timestep in timesteps:
            given = inputs(timestep)
            assert torch.equal(call(*given, timestep=timestep), plain(*given)), (round_, timestep)
    assert net.calls == 3 * 3, "for each row one call as it is, one that warms up, one that is recorded"
    assert gpu.pools == [None, "the pool", "the pool"] and gpu.streams == ["the caller's"]
    (_, graphed) = graphs._recorded[net]
    assert len(graphed.recordings) == 3 and len(graphed.inputs) == 1
    y = call(*inputs(50), timestep=50)
    before = y.clone()
    call(*inputs(50), timestep=50)
    assert torch.equal(y, before), "a result is not overwritten by the next call"


def test_what_is_recorded_holds_for_the_tensors_of_the_network(gpu: Gpu) -> None:
    net, plain = Net(), Net()

    def same(times: int) -> int:
        before = net.calls
        for _ in range(times):
            given = inputs(300)
            assert torch.equal(recorded(net)(*given, timestep=300), plain(*given))
        return net.calls - before

    assert same(4) == 3 and same(2) == 0
    for one in (net, plain):
        one.second.weight_scale = one.second.weight_scale * 2  # another tensor
    assert same(4) == 3
    for one in (net, plain):
        apply.set_execution(one, "simulated")
    assert same(3) == 3, "simulated execution is not recorded"
    for one in (net, plain):
        apply.set_execution(one, "packed")
    assert same(4) == 3
    for one in (net, plain):
        one.second.bias.add_(1)  # the same tensor with other values
    assert same(4) == 3


def test_a_network_that_is_looked_into_or_open_is_called_as_it_is(gpu: Gpu) -> None:
    net, seen = Net(), []
    handle = net.first.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(3):
        recorded(net)(*inputs(7), timestep=7)
    assert len(seen) == net.calls == 3 and net not in graphs._recorded
    handle.remove()
    recorded(net)(*inputs(7), timestep=7)
    assert net in graphs._recorded
    module = nn.Linear(2, 2)
    assert torch.equal(recorded(module)(x := torch.ones(1, 2), timestep=7), module(x)) and module not in graphs._recorded
    assert recorded(lambda x: x + 1)(1, timestep=7) == 2


def test_without_a_gpu_networks_are_called_as_they_are() -> None:
    net = Net()
    for _ in range(3):
        recorded(net)(*inputs(7), timestep=7)
    assert net.calls == 3 and net not in graphs._recorded


def test_recordings_end_with_their_network(gpu: Gpu) -> None:
    net = Net()
    for _ in range(3):
        recorded(net)(*inputs(7), timestep=7)
    graphed = weakref.ref(graphs._recorded[net][1])
    del net
    gc.collect()
    assert graphed() is None


def test_a_whole_packed_u_net_can_be_recorded(gpu: Gpu) -> None:
    """Nothing in it reads a value back: not in bfloat16, not with ranges by timestep."""
    pytest.importorskip("pydantic")
    from qvsr.config import UNetSettings
    from qvsr.models.unet import InflatedUNet
    from qvsr.quant.cost import example_inputs

    small = {"model_channels": 32, "channel_mult": (1, 1), "num_res_blocks": 1, "attention_resolutions": (1,), "num_head_channels": 16}
    settings = UNetSettings(**small, context_dim=8, semb_channels=8)
    net = InflatedUNet(settings).eval().requires_grad_(False)
    apply.quantize_layers(net, ("time_embed.0",), lambda name, module: QuantLayer.from_float(module, LayerPlan(4, 4, rank=1), name))
    for layer in apply.quant_layers(net).values():
        layer.set_static_activations(*(torch.full((2, 1), end) for end in (-2.0, 2.0)), timesteps=[400, 999])
    apply.freeze(net)
    apply.follow_timesteps(net)
    apply.set_execution(net, "packed")
    for module in net.modules():
        for parameter in () if isinstance(module, QuantLayer) else module.parameters(recurse=False):
            parameter.data = parameter.data.bfloat16()
    x, t, context, struct = example_inputs(settings, 8, 5)
    for _ in range(4):
        given = (
            torch.randn_like(x, dtype=torch.bfloat16),
            t + 500,
            context.bfloat16(),
            {width: one.bfloat16() for width, one in struct.items()},
        )
        assert torch.equal(recorded(net)(*given, timestep=500), net(*given))
    _, graphed = graphs._recorded[net]
    assert graphed.failed is None and len(graphed.recordings) == 1


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("module", [nn.Linear(24, 10), nn.Conv2d(24, 10, 3)], ids=["linear", "conv2d"])
def test_the_operators_of_a_device_read_nothing_back(on_cpu: Any, monkeypatch: pytest.MonkeyPatch, module: nn.Module, static: bool) -> None:
    """At the second call of a layer: the first one puts its weight in order."""
    layer = QuantLayer.from_float(module.requires_grad_(False), LayerPlan(4, 4, halves(24), rotate=True, rank=2), "layer")
    if static:
        layer.set_static_activations(-torch.ones(1, 2), torch.ones(1, 2))
    layer.freeze()
    layer.set_execution("packed")
    monkeypatch.setattr(ops, "direct", lambda name, x, bits: getattr(cuda, name))
    x = torch.randn(2, 24) if isinstance(module, nn.Linear) else torch.randn(2, 24, 5, 4)
    expected = layer(x)
    with Tape() as tape:
        found = layer(x)
    assert torch.equal(found, expected) and tape.calls


# ---------------------------------------------------------------- calls


def test_a_call_that_reads_back_is_not_recorded_and_that_is_said_once(gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    graphed = Graphed(lambda x: x + float(x.sum()))
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert torch.equal(graphed(x := torch.randn(3)), x + float(x.sum()))
    assert [one.getMessage() for one in caplog.records] == [
        "calls are not recorded as CUDA graphs: operation not permitted when stream is capturing"
    ]
    assert gpu.streams == ["the caller's"], "the stream of the recording is left"
    assert not graphed.recordings and not graphed.inputs


def test_a_layer_that_is_not_ready_is_no_error(gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    def function(x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise cuda.CudaError("matmul_packed: its weight is not in the order of the tensor cores yet")
        return 2 * x

    graphed, x = Graphed(function), torch.randn(3)
    with caplog.at_level(logging.WARNING):
        assert all(torch.equal(graphed(x), 2 * x) for _ in range(3))
    assert "matmul_packed: its weight is not in the order" in caplog.text and len(caplog.records) == 1


def test_an_error_of_the_call_itself_is_raised(gpu: Gpu) -> None:
    def function(x: Tensor) -> Tensor:
        raise ValueError("a wrong size")

    for _ in range(3):
        with pytest.raises(ValueError, match=r"^a wrong size$"):
            Graphed(function)(torch.ones(1))


def test_recordings_are_told_apart_and_limited(gpu: Gpu) -> None:
    calls: list[tuple[int, ...]] = []

    def function(x: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return x + 1

    graphed, x = Graphed(function, most=3), torch.zeros(2, 3)
    for _ in range(3):
        for value, key in ((x, 1), (x, 2), (x.T, 1)):
            assert torch.equal(graphed(value, key=key), value + 1)
    assert len(calls) == 9 and len(graphed.recordings) == 3 and len(graphed.inputs) == 2
    for _ in range(3):
        assert torch.equal(graphed(x, key=3), x + 1)  # no room
    assert len(calls) == 12
    assert torch.equal(graphed(x + 5, key=2), x + 6) and len(calls) == 12
    with torch.enable_grad():
        assert graphed(x.clone().requires_grad_(), key=1).requires_grad


def test_calls_without_a_gpu_are_made_as_they_are() -> None:
    calls: list[Any] = []

    def function(x: Tensor, more: dict[str, Tensor]) -> Tensor:
        calls.append(x)
        return x + more["y"]

    graphed, x = Graphed(function), torch.ones(3)
    for _ in range(3):
        assert torch.equal(graphed(x, {"y": x}, key=7), 2 * x)
    assert len(calls) == 3 and all(one is x for one in calls) and not graphed.recordings


# ---------------------------------------------------------------- a GPU


@pytest.mark.skipif(cuda.missing() is not None, reason=f"no GPU that the kernels can be run on: {cuda.missing()}")
def test_gpu_replays_are_the_calls() -> None:
    torch.manual_seed(0)
    layers = [
        QuantLayer.from_float(
            nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False), LayerPlan(4, 4, halves(32), rotate=True, rank=3), str(index)
        )
        for index in range(3)
    ]
    for layer in layers:
        layer.freeze()
        layer.set_execution("packed")
    network = nn.Sequential(*layers).cuda()
    assert {layer.weight_packed.device.type for layer in layers} == {"cpu"}
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(4):
            x = torch.randn(2, 32, 16, 16, device="cuda", dtype=dtype)
            assert torch.equal(recorded(network)(x, timestep=0), network(x))
    _, graphed = graphs._recorded[network]
    assert len(graphed.recordings) == 2 and graphed.failed is None


@pytest.mark.skipif(cuda.missing() is not None, reason=f"no GPU that the kernels can be run on: {cuda.missing()}")
def test_gpu_tables_by_timestep_and_a_recording_that_fails() -> None:
    net, plain = Net().cuda(), Net().cuda()
    for timestep in (50, 300, 50, 300, 50, 300, 7, 500):
        given = pytree.tree_map(lambda one: one.cuda(), inputs(timestep))
        assert torch.equal(recorded(net)(*given, timestep=timestep), plain(*given))
    assert net.calls == 6
    here, graphed = torch.cuda.current_stream(), Graphed(lambda x: x + float(x.sum()))
    for _ in range(3):
        x = torch.randn(3, device="cuda")
        assert torch.equal(graphed(x), x + float(x.sum()))
    assert graphed.failed and torch.cuda.current_stream() == here
    given = pytree.tree_map(lambda one: one.cuda(), inputs(50))
    assert torch.equal(recorded(net)(*given, timestep=50), plain(*given)), "other recordings still hold"
