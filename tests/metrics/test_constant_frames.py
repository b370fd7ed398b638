"""Frames of one colour: every metric that needs no weights has a documented value or a documented error there, and never NaN."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

import metrics  # noqa: F401 (fills the registry)
from metrics._frames import MetricError
from qvsr import protocols
from qvsr.registry import METRICS

STRICT = protocols.read("strict-v1")
NAMES = [name for name in METRICS if not METRICS[name].facts.get("weights") and METRICS[name].facts["frames"] != "clip"]
GREY, LIGHT = (
    torch.full((2, 3, 64, 72), value) for value in (0.2, 0.6)
)  # 51 and 153 of 255: no luma lies at a half, which rounds either way
TEXTURE = torch.rand((2, 3, 64, 72), generator=torch.Generator().manual_seed(0))
DECIBEL = -20 * math.log10(0.4)  # of a difference of 0.4 everywhere
# SSIM of two constants a, b, from its formula: variances are 0, (2 a b + C1) / (a^2 + b^2 + C1); its frames are rounded to 8 bit.
SSIM = (2 * 51 * 153 + 6.5025) / (51**2 + 153**2 + 6.5025)


def gmsd() -> float:
    """From its formula: inside, no gradient and a similarity of 1; at the border frames are continued by 0, so a constant has an edge there."""
    a, b = 51.0, 153.0  # lumas; 64x72 pixels are averaged to 32x36
    edge, corner = 1.0, math.sqrt(2) * 2 / 3  # Prewitt's response to a constant of 1

    def similarity(response: float) -> float:
        return (2 * a * b * response**2 + 170) / ((a**2 + b**2) * response**2 + 170)

    values = [1.0] * (30 * 34) + [similarity(edge)] * (2 * 30 + 2 * 34) + [similarity(corner)] * 4
    return statistics.stdev(values)


EXPECTED = {  # of GREY against LIGHT
    "psnr": DECIBEL,
    "psnr_fp": DECIBEL,
    "ssim": SSIM,
    "ssim_fp": SSIM,
    "gmsd": gmsd(),
    "ssim_gradient": 1.0,  # blind to brightness
    "ewarp_dis": 0.0,  # the prediction alone, which stands still
    "tof": 0.0,  # neither moves
    "flicker": 0.0,  # the error stays the same
}


def measured(name: str, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    metric = METRICS[name]
    operands = (pred,) if metric.facts["needs"] == "none" else (pred, target)
    return metric(*operands, **STRICT.options(metric))


@pytest.mark.parametrize("name", NAMES)
def test_two_different_constants(name: str) -> None:
    assert name in EXPECTED, f"say in this test what {name} gives for two clips of one colour each"
    values = measured(name, GREY, LIGHT)
    assert values.tolist() == pytest.approx([EXPECTED[name]] * len(values), abs=1e-6)  # a deviation of float32 ones


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_a_constant_with_itself_is_ideal(name: str, value: float) -> None:
    facts, frames = METRICS[name].facts, torch.full((2, 3, 64, 72), value)
    ideal = (math.inf if facts["unit"] == "dB" else 1.0) if facts["higher_is_better"] else 0.0
    assert measured(name, frames, frames).tolist() == pytest.approx([ideal] * (2 - (facts["frames"] == "pairs")), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("pred", "target"), [(GREY, TEXTURE), (TEXTURE, GREY), (TEXTURE, TEXTURE)])
def test_one_constant_gives_a_number_or_says_why_not(name: str, pred: torch.Tensor, target: torch.Tensor) -> None:
    try:
        values = measured(name, pred, target)
    except MetricError as error:
        assert str(error).startswith(f"{name}: ")
    else:
        assert not values.isnan().any() and len(values) == 2 - (METRICS[name].facts["frames"] == "pairs")
