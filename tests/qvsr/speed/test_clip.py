"""A whole clip: frames as upscale makes them, refusals, and what the measurements mean."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qvsr.config import Config
from qvsr.data import clips
from qvsr.models.pipeline import network_calls, to_uint8
from qvsr.quant import exported
from qvsr.quant.cost import full_facts
from qvsr.quant.exported import ModelError
from qvsr.speed import clip
from qvsr.speed.machine import Measured
from qvsr.speed.timing import BenchError, Times
from qvsr.stages import upscale
from tests.exporting import configured, quantized
from tests.workflow import tiny

FACTS: dict[str, Any] = {"path": "packed", "device": "a processor", "threads": 1, "torch": "2.0"}
SAMPLING = {"steps": 2, "flow": "dis", "tile": 16, "tile_overlap": 8}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "set_deterministic_debug_mode", lambda mode: None)  # of the other tests' process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clip")


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    config = configured(folder, sampling=SAMPLING)
    quantized(config, folder / "q.safetensors")
    exported.write(folder / "m.safetensors", config, folder / "q.safetensors")
    tiny.write_frames(folder / "videos" / "walk", seed=1)
    dataset = config.datasets["clips"].model_copy(update={"path": folder / "videos"})
    return config.model_copy(update={"datasets": {**config.datasets, "clips": dataset}, "picture": ("clips", "walk")})


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs run here instead of in processes of their own; returns what was called."""
    called: list[str] = []

    def process(work: str, job: dict[str, Any], threads: int) -> Any:
        called.append(f"{work.partition(':')[2]} {job.get('variant', '')}".strip())
        with torch.no_grad():
            result = getattr(clip, work.partition(":")[2])(job)
        return asdict(result) if isinstance(result, Measured) else result

    monkeypatch.setattr(clip, "in_a_process", process)
    return called


def test_a_clip_is_measured_and_frames_are_those_of_upscale(config: Config, folder: Path, in_this_process: list[str]) -> None:
    rows = clip.run(config, folder / "m.safetensors", FACTS, "cpu", seconds=0, rounds=1)
    assert in_this_process == ["alone fp32", "alone simulated W4A4", "alone packed W4A4", "together"]
    assert [(row.variant, row.bits, row.execution, row.backend, row.rank) for row in rows] == [
        ("fp32", "W32A32", "float", "torch", 0),
        ("simulated W4A4", "W4A4", "simulated", "torch", 2),
        ("packed W4A4", "W4A4", "packed", "cpu", 2),
    ]
    assert {(row.name, row.kind, row.shape, row.input, row.together) for row in rows} == {
        ("walk", "clip", (3, 3, 64, 64), (3, 3, 16, 16), True)
    }
    facts = full_facts(config.backbone.unet, 16, config.backbone.context_tokens)
    one = facts.attention_macs + sum(layer.macs for layer in facts.layers)
    calls = network_calls(16, 16, 3, config.sampling, config.backbone.first_stage.factor)
    assert {row.macs for row in rows} == {calls * one} and calls == 2  # one segment, one tile, two steps

    # the same clip by the restore stage's own way: differences of frames on disk
    gt, lq = folder / "GT", folder / "LQ"
    clip.build_clip(config, "clips", "walk", gt, lq)
    frames = {}
    for execution in ("simulated", "packed"):
        upscale.run(lq, folder / execution, folder / "m.safetensors", execution=execution, seed=config.seed, clip="walk")
        frames[execution] = clips.read_clip(folder / execution).frames_THWC.astype(np.float64) / 255
    assert np.array_equal(frames["packed"], frames["simulated"]) and rows[2].error == 0 and rows[2].psnr_db is None
    lq_TCHW = torch.from_numpy(clips.read_clip(lq).frames_THWC).permute(0, 3, 1, 2).float().div(255).contiguous()
    with torch.no_grad():
        full = to_uint8(
            clip.restorer(config, folder / "m.safetensors", clip.variants_of(exported.read_header(folder / "m.safetensors"))[0])(
                lq_TCHW, "walk"
            )
        )
    for row in rows[1:]:
        assert row.psnr_fp_db == pytest.approx(-10 * np.log10(np.mean((frames[row.execution] - full.numpy() / 255) ** 2)), abs=1e-6)


def test_what_cannot_be_measured(config: Config, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"^no exported model .*none.safetensors; `python -m qvsr export` writes one$"):
        clip.check(config, folder / "none.safetensors")
    other = config.model_copy(update={"backbone": config.backbone.model_copy(update={"scale_factor": 0.5})})
    with pytest.raises(
        BenchError, match=r"m.safetensors was made of tiny, the configuration has another tiny: give the configuration that it was exported"
    ):
        clip.check(other, folder / "m.safetensors")
    with pytest.raises(BenchError, match=r"^bench clip restores the clip of `picture`, which the configuration leaves out: set picture"):
        clip.check(config.model_copy(update={"picture": None}), folder / "m.safetensors")


def test_rows_by_hand(folder: Path, config: Config) -> None:
    header = exported.read_header(folder / "m.safetensors")
    single = {variant: Measured((), peak, peak / 10) for variant, peak in zip(clip.variants_of(header), (200.0, 300.0, 100.0), strict=True)}
    both = {
        "times": {
            variant.name: asdict(Times(value, value - 1, value + 1, 4)) for variant, value in zip(single, (6.0, 12.0, 2.0), strict=True)
        },
        "error": 0.01,
        "psnr": 40.0,
        "psnr_fp": {"simulated": 36.0, "packed": 35.0},
        "shape": [10, 3, 128, 128],
    }
    rows = clip.rows_of("walk", header, (10, 32, 32, 3), 10**9, single, both, FACTS, "cpu")
    assert [row.ratio_fp32 for row in rows] == [1, 0.5, 3]
    assert [(row.peak_mb, row.resident_mb) for row in rows] == [(200, 20), (300, 30), (100, 10)]
    assert [(row.error, row.psnr_db, row.psnr_fp_db) for row in rows] == [(None, None, None), (None, None, 36), (0.01, 40, 35)]
    assert rows[2].gops == 1 and (rows[2].seconds_q1, rows[2].seconds_q3, rows[2].rounds) == (1, 3, 4)
