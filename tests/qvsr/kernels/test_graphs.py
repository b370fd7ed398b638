"""Recorded calls: made as they are without a GPU; on one, replayed with new values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qvsr.kernels import cuda, graphs
from qvsr.kernels.graphs import Graphed
from qvsr.quant.layer import LayerPlan, QuantLayer, halves


def test_calls_without_a_gpu_are_made_as_they_are() -> None:
    calls: list[Any] = []

    def function(x: Tensor, more: dict[str, Tensor]) -> Tensor:
        calls.append(x)
        return x + more["y"]

    graphed, x = Graphed(function), torch.ones(3)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(graphed(x, {"y": x}, key=7), 2 * x)
    assert len(calls) == 3 and all(one is x for one in calls) and not graphed.recorded


def test_a_call_that_cannot_be_recorded_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Fails:
        def __init__(self, *arguments: Any) -> None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "_Recording", Fails)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    graphed, x = Graphed(lambda x: x + 1), torch.zeros(2)
    with torch.no_grad():
        assert all(torch.equal(graphed(x), x + 1) for _ in range(3))
    assert [one.getMessage() for one in caplog.records] == [
        "calls are not recorded as CUDA graphs: CUDA error: operation not permitted when stream is capturing"
    ]


def test_recordings_are_told_apart_and_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    class Recorded:
        graph = type("Graph", (), {"pool": staticmethod(lambda: "the pool")})

        def __init__(self, function: Any, tensors: list[Tensor], structure: Any, pool: Any) -> None:
            self.function = function
            made.append((tuple(one.shape for one in tensors), pool))

        def replay(self, tensors: list[Tensor]) -> Tensor:
            return -self.function(*tensors)

    monkeypatch.setattr(graphs, "_Recording", Recorded)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    graphed, x = Graphed(lambda x: x + 1, most=3), torch.zeros(2, 3)
    with torch.no_grad():
        for value, key in ((x, 1), (x, 2), (x, 1), (x.T, 1)):
            assert torch.equal(graphed(value, key=key), -(value + 1))
        assert torch.equal(graphed(x, key=3), x + 1)  # no room
        assert torch.equal(graphed(x + 1, key=2), -(x + 2))
    assert made == [(((2, 3),), None), (((2, 3),), "the pool"), (((3, 2),), "the pool")]
    x.requires_grad_()
    assert graphed(x, key=1).requires_grad


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
    graphed = Graphed(network)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(2, 32, 16, 16, device="cuda")
            assert torch.equal(graphed(x), network(x))
    assert len(graphed.recorded) == 1 and graphed.failed is None
