"""Layers one by one: which there are, what they compute, and what their times mean, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qvsr import config as settings
from qvsr.quant.layer import QuantError, QuantLayer
from qvsr.speed import layers
from qvsr.speed.layers import Shape
from qvsr.speed.machine import Peaks
from qvsr.speed.timing import BF16, FP32, FP32_LAST, Times, Variant
from tests.workflow import tiny

FACTS: dict[str, Any] = {"path": "packed", "device": "a processor", "threads": 2, "torch": "2.0"}
LINEAR = Shape("Linear", (6, 8), (), (), True, (5, 7, 8), (5, 7, 6), name="a")
CONV = Shape("Conv2d", (12, 8, 3, 3), (2, 2), (1, 1), True, (5, 8, 6, 6), (5, 12, 3, 3), name="b")
TEMPORAL = Shape("Conv3d", (4, 4, 3, 1, 1), (1, 1, 1), (1, 0, 0), False, (1, 4, 5, 2, 2), (1, 4, 5, 2, 2), name="c")
W4 = Variant("packed W4A4 r2", "packed", 4, 2, channels_last=True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_the_shapes_are_all_layers_of_the_network() -> None:
    config = settings.validate(tiny.CONFIG, "test")
    found = layers.shapes(config)
    from qvsr.models.unet import InflatedUNet

    modules = {name: module for name, module in InflatedUNet(config.backbone.unet).named_modules() if isinstance(module, layers.nn.Linear)}
    assert sum(count for shape, count in found.items() if shape.kind == "Linear") == len(modules)
    assert {shape.name for shape in found if not shape.quantized} == {"time_embed.0", "input_blocks.0.0", "out.2"}
    for shape in found:
        module, x = shape.module(), torch.zeros(shape.input)
        assert tuple(module(x).shape) == shape.output and tuple(module.weight.shape) == shape.weight, shape  # type: ignore[arg-type]
    with pytest.raises(QuantError, match=r"no layer 'time_embd.0'; did you mean time_embed.0\?"):
        layers.shapes(settings.validate({**tiny.CONFIG, "method": {"exclude": ["time_embd.0"]}}, "test"))


def test_a_handful_has_each_kind() -> None:
    found = {LINEAR: 50, CONV: 1, TEMPORAL: 1, **{Shape("Linear", (n, n), (), (), True, (n,), (n,)): 1 for n in range(1, 9)}}
    chosen = layers.handful(found, 4)
    assert len(chosen) == 4 and {shape.kind for shape in chosen} == {"Linear", "Conv2d", "Conv3d"}
    assert chosen[LINEAR] == 50 and max(shape.weight[0] for shape in chosen if shape not in (LINEAR, CONV, TEMPORAL)) == 8
    assert list(chosen) == sorted(chosen, key=lambda shape: -shape.macs * chosen[shape])


def test_bytes_and_operations_by_hand() -> None:
    """A convolution of 8 to 12 channels, 3x3, of 5 maps of 6x6 to 3x3: 45 positions."""
    assert (CONV.positions, CONV.macs) == (45, 45 * 12 * 8 * 9)
    maps, weight = 5 * 8 * 36 + 5 * 12 * 9, 12 * 8 * 9
    assert CONV.moved(FP32) == CONV.moved(FP32_LAST) == CONV.moved(layers.SIMULATED) == 4 * (maps + weight)
    assert CONV.moved(BF16) == 2 * (maps + weight)
    assert CONV.moved(W4) == 4 * maps + weight / 2 + 4 * 2 * (12 + 72)
    peaks = Peaks(fp32_gops=1, bf16_gops=2, int8_gops=4, copy_gb_s=1e9)  # bytes cost nothing
    assert CONV.least(FP32, peaks) == CONV.least(layers.SIMULATED, peaks) == pytest.approx(2e-9 * CONV.macs)
    assert CONV.least(W4, peaks) == pytest.approx(2e-9 * CONV.macs / 4 + 2e-9 * 45 * 2 * (12 + 72))
    assert TEMPORAL.branch_rank(24) == 4  # a branch has no more than the layer's channels


@pytest.mark.parametrize("shape", [LINEAR, CONV, TEMPORAL], ids=lambda shape: shape.kind)
@torch.no_grad()
def test_what_is_timed_is_the_layer(shape: Shape) -> None:
    calls, errors = layers.calls_of(shape, (*layers.VARIANTS[:4], *layers.PACKED, W4))
    exact = calls["fp32"]()
    assert tuple(exact.shape) == shape.output
    assert ("fp32 channels last" in calls) == (shape.kind != "Linear")
    off = {name: float((call().float() - exact).norm() / exact.norm()) for name, call in calls.items()}
    assert off["fp32"] == 0 and off.get("fp32 channels last", 0) < 1e-6 and 1e-4 < off["bf16"] < 2e-2  # 8 bits of mantissa
    assert off["packed W8A8"] < off["packed W6A6"] < off["packed W4A4"] < 0.5 and off["packed W8A8"] < 0.02  # a step of 1/255 of the range
    assert set(errors) == {"packed W8A8", "packed W6A6", "packed W4A4", "packed W4A4 r2"}
    assert max(errors.values()) < 1e-5  # the same integers: float32 sums


def test_a_quantized_layer_has_the_variant_s_bits_and_branch() -> None:
    layer = layers.quantized(CONV.module(), W4, "name")
    assert isinstance(layer, QuantLayer) and not layer.is_open
    assert (layer.weight_bits, layer.act_bits, layer.rank, layer.parts, layer.name) == (4, 4, 2, (4, 4), "name")
    assert layer.rotated == (True, True) and layers.quantized(LINEAR.module(), layers.SIMULATED, "name").up is None


def test_rows_by_hand() -> None:
    """float32 takes 4 s, channels last 3 s: what the others are compared with."""
    times = {"fp32": 4.0, "fp32 channels last": 3.0, "bf16": 1.5, "packed W4A4 r2": 0.75}
    spread = {name: Times(value, 0.9 * value, 1.2 * value, 7) for name, value in times.items()}
    peaks = Peaks(fp32_gops=1e-6, bf16_gops=2e-6, int8_gops=4e-6, copy_gb_s=1e9)
    rows = layers.rows_of(CONV, 3, (FP32, FP32_LAST, BF16, W4), spread, {"packed W4A4 r2": 1e-3}, peaks, FACTS, "cpu")
    assert [row.variant for row in rows] == list(times)
    assert [row.ratio_fp32 for row in rows] == [0.75, 1, 2, 4] and {row.seconds_fp32 for row in rows} == {3}
    assert [row.ratio_bf16 for row in rows] == [0.375, 0.5, 1, 2]
    first, *_, last = rows
    assert (first.name, first.kind, first.shape, first.input, first.count, first.macs) == ("b", "Conv2d", CONV.weight, CONV.input, 3, 38880)
    assert (first.bits, first.execution, first.backend, first.error, first.sqnr_db) == ("W32A32", "float", "torch", None, None)
    assert (last.bits, last.execution, last.backend, last.rank) == ("W4A4", "packed", "cpu", 2)
    assert last.error == 1e-3 and last.sqnr_db == pytest.approx(60)
    assert (last.seconds, last.seconds_q1, last.seconds_q3, last.rounds, last.together) == (0.75, 0.675, pytest.approx(0.9), 7, True)
    assert last.gops == pytest.approx(2 * 38880 / 0.75 / 1e9)
    assert last.gb_s == pytest.approx(CONV.moved(W4) / 0.75 / 1e9)
    assert first.roofline == pytest.approx(2 * 38880 / 1e3 / 4)  # 1e3 operations a second
    assert last.roofline == pytest.approx((2 * 38880 / 4e3 + 2 * 45 * 2 * 84 / 1e3) / 0.75)
    assert (last.path, last.device, last.threads, last.torch) == ("packed", "a processor", 2, "2.0")


def test_every_shape_gets_its_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    peaks = Peaks(1, 1, 1, 1)
    rows = layers.run({LINEAR: 2, CONV: 1}, peaks, FACTS, "reference", seconds=0, least=2, variants=(FP32, FP32_LAST, BF16, W4))
    assert [(row.name, row.variant) for row in rows] == [
        *(("a", name) for name in ("fp32", "bf16", "packed W4A4 r2")),
        *(("b", name) for name in ("fp32", "fp32 channels last", "bf16", "packed W4A4 r2")),
    ]
    assert {row.rounds for row in rows} == {2} and all(math.isfinite(row.ratio_fp32) and row.ratio_fp32 > 0 for row in rows)
    assert {row.backend for row in rows if row.execution == "packed"} == {"reference"}
    assert "layers: 2/2" in capsys.readouterr().err
