"""One step of a U-Net: the networks that are timed are the same network, and what the measurements mean."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from qvsr import config as settings
from qvsr.config import Config
from qvsr.quant import apply
from qvsr.quant.cost import full_facts
from qvsr.speed import unet
from qvsr.speed.layers import shapes
from qvsr.speed.machine import Measured, Peaks
from qvsr.speed.timing import BF16, FP32, FP32_LAST, Times, Variant
from tests.workflow import tiny

FACTS: dict[str, Any] = {"path": "packed", "device": "a processor", "threads": 1, "torch": "2.0"}
W8, W6, W4, W8_HALF, W4_HALF = unet.PACKED
NAMES = [variant.name for variant in unet.PACKED]
HIGH = Variant("simulated W16A16", "simulated", 16)  # nearly full precision


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def config() -> Config:
    return settings.validate({**tiny.CONFIG, "sampling": {"steps": 1, "flow": "dis", "tile": 16, "tile_overlap": 8}}, "test")


@pytest.fixture(scope="module")
def given(config: Config) -> unet.Inputs:
    return unet.inputs_of(config.backbone.unet, config.sampling.tile, config.backbone.context_tokens)


@torch.no_grad()
def test_all_variants_are_one_network(config: Config, given: unet.Inputs) -> None:
    """Drawn alone or made of float32, in any layout; no layer returns zero, or quantization behind it would not be seen."""
    size, exclude = config.backbone.unet, config.method.exclude
    full = unet.network(size, FP32, exclude)
    exact = unet.step(full, FP32, given)()
    assert all(parameter.any() for name, parameter in full.named_parameters() if not name.endswith(".bias"))

    def off(variant: Variant, net: torch.nn.Module) -> float:
        found = unet.step(net, variant, given)().float()
        return float((found - exact).norm() / exact.norm())

    assert off(FP32_LAST, unet.network(size, FP32_LAST, exclude)) < 1e-4
    assert 1e-4 < off(BF16, unet.network(size, BF16, exclude)) < 0.1
    assert off(HIGH, unet.network(size, HIGH, exclude)) < 0.02
    alone, made = unet.network(size, W4, exclude), unet.network(size, W4, exclude, full)
    assert torch.equal(unet.step(alone, W4, given)(), unet.step(made, W4, given)())
    quantized = apply.quant_layers(made)
    assert {layer.execution for layer in quantized.values()} == {"packed"} and {layer.weight_bits for layer in quantized.values()} == {4}
    assert len(quantized) == sum(count for shape, count in shapes(config).items() if shape.quantized)
    own = dict(made.named_parameters())
    shared = [name for name, parameter in full.named_parameters() if name in own and own[name] is parameter]
    assert "input_blocks.0.0.weight" in shared and "out.0.weight" in shared and "middle_block.1.temporal_alpha" in shared


def job_of(config: Config, **more: Any) -> dict[str, Any]:
    return {
        "settings": config.backbone.unet.model_dump(mode="json"),
        "tile": config.sampling.tile,
        "tokens": config.backbone.context_tokens,
        "exclude": list(config.method.exclude),
        "threads": 1,
        "seconds": 0,
        "rounds": 1,
        **more,
    }


@torch.no_grad()
def test_both_measurements(config: Config) -> None:
    found = unet.alone(job_of(config, variant=W4.name))
    assert len(found.seconds) == 1 and found.seconds[0] > 0
    assert found.peak_mb is None or found.peak_mb > 0
    both = unet.together(job_of(config, channels_last=True))
    assert list(both["times"]) == ["fp32 channels last", "bf16", *NAMES]
    assert set(both["errors"]) == set(both["floors"]) == set(NAMES) and both["simulated"] > 0
    assert both["errors"][W8_HALF.name] == 0 and both["errors"][W4_HALF.name] == 0
    assert both["errors"][W8.name] < 0.1  # the same network: only roundings that flip differ


def measured(peak: float | None, seconds: tuple[float, ...] = (9.0, 11.0)) -> Measured:
    return Measured(seconds, peak, None if peak is None else peak / 2)


def test_rows_by_hand(config: Config) -> None:
    """float32 4 s in the chosen layout; the other layout alone, simulated once."""
    times = {"fp32 channels last": 4.0, "bf16": 2.0, W8.name: 1.0, W6.name: 0.8, W4.name: 0.5, W8_HALF.name: 0.5, W4_HALF.name: 0.25}
    both = {
        "times": {name: asdict(Times(value, value, value, 5)) for name, value in times.items()},
        "errors": {W8.name: 0.001, W6.name: 0.01, W4.name: 0.1},
        "floors": {W8.name: 0.002, W6.name: 0.02, W4.name: 0.2},
        "simulated": 16.0,
    }
    single = {variant: measured(100.0) for variant in unet.VARIANTS} | {W4: measured(25.0), FP32: measured(None)}
    peaks = Peaks(fp32_gops=1, bf16_gops=2, int8_gops=4, copy_gb_s=1e9)
    rows = {row.variant: row for row in unet.rows_of(config, shapes(config), single, both, peaks, FACTS, "cpu")}
    assert {name: row.ratio_fp32 for name, row in rows.items()} == {
        "fp32": 0.4,
        "fp32 channels last": 1,
        "bf16": 2,
        unet.SIMULATED.name: 0.25,
        W8.name: 4,
        W6.name: 5,
        W4.name: 8,
        W8_HALF.name: 8,
        W4_HALF.name: 16,
    }
    assert {name for name, row in rows.items() if not row.together} == {"fp32", unet.SIMULATED.name}
    assert (rows["fp32"].seconds, rows["fp32"].rounds, rows["fp32"].peak_mb) == (10, 2, None)
    assert (rows[W4.name].peak_mb, rows[W4.name].resident_mb, rows[W4.name].backend) == (25, 12.5, "cpu")
    assert (rows[W4.name].error, rows[W4.name].error_floor, rows[W4.name].sqnr_db) == (0.1, 0.2, pytest.approx(20))
    assert rows["bf16"].error is None and rows["bf16"].ratio_bf16 == 1 and rows[W8.name].ratio_bf16 == 2
    assert rows["bf16"].shape == (5, 8, 16, 16) and {row.kind for row in rows.values()} == {"unet"}

    facts = full_facts(config.backbone.unet, config.sampling.tile, config.backbone.context_tokens)
    macs = facts.attention_macs + sum(layer.macs for layer in facts.layers)
    assert rows["bf16"].macs == macs and rows["bf16"].gops == pytest.approx(2 * macs / 2 / 1e9)
    assert rows["bf16"].roofline == pytest.approx(2 * macs / 2e9 / 2)  # all of it at 2e9 operations a second
    quantized = [layer for layer in facts.layers if layer.name not in config.method.exclude]
    of_integers = math.fsum(2 * layer.macs / 4e9 for layer in quantized)
    ranks = {layer.name: min(24, layer.weight_shape[0], math.prod(layer.weight_shape[1:])) for layer in quantized}
    branch = math.fsum(
        2 * layer.positions * ranks[layer.name] * (layer.weight_shape[0] + math.prod(layer.weight_shape[1:])) / 1e9 for layer in quantized
    )
    rest = 2 * (macs - sum(layer.macs for layer in quantized)) / 1e9
    assert rows[W8.name].roofline == pytest.approx(of_integers + branch + rest)  # over 1 s
    assert rows[W8_HALF.name].roofline == pytest.approx(2 * (of_integers + branch + rest / 2))  # over half a second


def test_the_faster_layout_goes_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def process(work: str, job: dict[str, Any], threads: int) -> Any:
        asked.append({"work": work, "threads_of": threads, **job})
        if work.endswith(":alone"):
            return asdict(measured(100.0, (1.0, 3.0) if job["variant"] == "fp32" else (2.5, 2.5)))
        names = ["fp32", "bf16", *NAMES]
        none = dict.fromkeys(NAMES, 0.5)
        return {"times": {name: asdict(Times(1, 1, 1, 5)) for name in names}, "errors": none, "floors": none, "simulated": 1.0}

    monkeypatch.setattr(unet, "in_a_process", process)
    rows = unet.run(config, Peaks(1, 1, 1, 1), FACTS, "cpu", seconds=7, rounds=5)
    assert [one.get("variant") for one in asked] == [variant.name for variant in unet.VARIANTS] + [None]
    assert (asked[-1]["channels_last"], asked[-1]["seconds"], asked[-1]["rounds"], asked[-1]["threads_of"]) == (False, 7, 5, 1)
    assert [row.variant for row in rows] == [variant.name for variant in unet.VARIANTS]
