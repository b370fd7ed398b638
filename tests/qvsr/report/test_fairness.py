"""The fairness card against counts by hand, and what Snakemake's benchmark files say."""

from __future__ import annotations

import csv
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qvsr.method_settings import QuantVSRSettings
from qvsr.quant import apply, checkpoint, cost
from qvsr.quant.by_timestep import ByTimestep
from qvsr.quant.layer import LayerPlan, QuantLayer
from qvsr.report import fairness
from qvsr.report.fairness import Fairness, Measured


class Net(nn.Module):
    """A Linear on 5x3 tokens, a 1x1 convolution on 5 maps of 2x2, and an output layer that is left out; a norm beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.maps, self.out, self.norm = nn.Linear(8, 6), nn.Conv2d(8, 4, 1, bias=False), nn.Linear(8, 2), nn.LayerNorm(8)

    def forward(self, x: Tensor, t: Tensor) -> None:
        self.tokens(self.norm(x))
        self.maps(x[:, :, :, None].transpose(1, 2)[:, :, :2].expand(-1, -1, 2, 2))
        self.out(x[:, 0])


def quantized(tmp_path: Path, make: Any, trained: int | None = None, **spec: Any) -> tuple[dict[str, Any], cost.Facts, cost.Facts]:
    """A checkpoint of the net with `make`'s layers, read again; its facts and those of full precision."""
    torch.manual_seed(0)
    net, inputs = Net().requires_grad_(False), (torch.zeros(5, 3, 8), torch.zeros(1, dtype=torch.long))
    full = cost.count(net, *inputs)
    apply.quantize_layers(net, ("out",), make)
    apply.freeze(net)
    apply.follow_timesteps(net)
    if trained is not None:
        apply.note(net, trained_params=trained)
    given = {
        "method": "mine", "base": "quantvsr", "bits": "W4A4", "backbone": "b", "calibration": "0123abcd",
        "calibration_set": {"dataset": "photos", "samples": 30, "steps": 5},
        "spec": {"settings": QuantVSRSettings(**spec).model_dump(mode="json"), "exclude": ["out"]},
    }  # fmt: skip
    checkpoint.save(net, tmp_path / "a.safetensors", given)
    return checkpoint.read_header(tmp_path / "a.safetensors"), cost.count(net, *inputs), full


def test_every_column_by_hand(tmp_path: Path) -> None:
    """W4A8 and W2A4, the first with two rotated halves and a branch of rank 2, the second with static ranges."""

    def make(name: str, module: nn.Module) -> QuantLayer:
        if name == "tokens":
            return QuantLayer.from_float(module, LayerPlan(4, 8, (4, 4), True, rank=2), name)
        layer = QuantLayer.from_float(module, LayerPlan(2, 4, weight_symmetric=True), name)
        layer.set_static_activations(-torch.ones(2, 1), torch.ones(2, 1), [500, 1000])
        return layer

    read, facts, full = quantized(tmp_path, make, trained=28, refine_updates=7, rank_min=1, rank_max=2)
    row = fairness.fairness(read, facts, full, Measured(12.5, 900.0))
    branch = 2 * (6 + 8)
    tokens = (
        6 * 8 * 4 + 6 * 2 * (32 + 8) + 8 + 32 * (branch + 6)
    )  # integers; a scale and a zero point of a byte a half; signs; branch, bias
    maps = 4 * 8 * 2 + 4 * (32 + 8) + 2 * 2 * 32  # integers; scales, zero points; two ranges
    positions = {"tokens": 15, "maps": 20, "out": 5}
    macs = {"tokens": 48 * positions["tokens"], "maps": 32 * positions["maps"], "out": 16 * positions["out"]}
    assert row == Fairness(
        method="mine", bits="W4A4", granularity="shared", reduced=True,
        weight_ranges="output channel, 2 parts in 1 layer; symmetric in 1 layer", act_ranges="tensor, 2 parts in 1 layer",
        activations="dynamic in 1 layer, static (2 timesteps) in 1 layer", layers=2, left_out=1, exclude="out",
        calibration_dataset="photos", calibration_samples=30, calibration_steps=5, calibration_digest="0123abcd", trained_params=28,
        branch_params=branch, branch_params_pct=pytest.approx(100 * branch / (48 + 6 + 32 + 16 + 2 + 16)),
        branch_macs_pct=pytest.approx(100 * branch * 15 / sum(macs.values())), weight_bits=pytest.approx((tokens + maps) / (48 + 32)),
        act_bits=pytest.approx((8 * macs["tokens"] + 4 * macs["maps"]) / (macs["tokens"] + macs["maps"])), seconds=12.5, peak_mib=900.0,
    )  # fmt: skip


def test_all_forms_of_a_layer_count_over_its_weights_once(tmp_path: Path) -> None:
    def make(name: str, module: nn.Module) -> Any:
        forms = [QuantLayer.from_float(module, LayerPlan(4, 4), name) for _ in range(3)]
        return ByTimestep(forms, [300, 600, 1000], name) if name == "tokens" else forms[0]

    read, facts, full = quantized(tmp_path, make)
    row = fairness.fairness(read, facts, full, Measured())
    form = 48 * 4 + 6 * (32 + 8) + 6 * 32
    assert row.weight_bits == pytest.approx((3 * form + 32 * 4 + 4 * (32 + 8)) / (48 + 32))
    assert (row.layers, row.left_out, row.act_bits, row.trained_params, row.branch_params) == (2, 1, 4, 0, 0)


def facts(*cuts: tuple[int, ...], used: str = "tensor", symmetric: bool = False) -> list[dict[str, Any]]:
    return [
        {"shape": [4, sum(parts)], "parts": parts, "act_granularity_used": used, "act_symmetric": symmetric, "weight_symmetric": symmetric}
        for parts in cuts
    ]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (facts((64,), (128,)), "tensor"),
        (facts((32, 32), (64, 64), (5,)), "tensor, 2 halves"),
        (facts((64,), (64, 64), (64, 64, 8)), "tensor, groups of 64"),
        (facts((64,), (32, 96), (10, 20, 30)), "tensor, 2 to 3 parts in 2 layers"),
        ([*facts((8,), (8,), used="token"), *facts((8,), used="frame")], "token in 2 layers, frame in 1 layer"),
        (facts((8,), symmetric=True), "tensor; symmetric"),
    ],
)
def test_ranges_in_words(layers: list[dict[str, Any]], words: str) -> None:
    assert fairness.act_ranges(layers) == words


def test_a_benchmark_file(tmp_path: Path) -> None:
    names = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"
    (tmp_path / "whole.tsv").write_text(names + "33.44\t0:00:33\t1028.75\t1\t1\t1\t0\t0\t99\t33\n")
    (tmp_path / "short.tsv").write_text(names + "0.1\t0:00:00\tNA\tNA\tNA\tNA\t0\t0\t0\t0\n")
    (tmp_path / "empty.tsv").write_text("")
    assert fairness.read_benchmark(tmp_path / "whole.tsv") == Measured(33.44, 1028.75)
    assert fairness.read_benchmark(tmp_path / "short.tsv") == Measured(0.1, None)
    assert fairness.read_benchmark(tmp_path / "empty.tsv") == fairness.read_benchmark(tmp_path / "none.tsv") == Measured()


ROW = Fairness(
    "maxmin", "W4A4", "shared", False, "output channel", "tensor", "dynamic", 194, 3, "time_embed.0 out.2", "photos", 30, 5, "abcd", 0, 0, 0.0,
    0.0, 4.25, 4.0, None, None,
)  # fmt: skip
OURS = replace(
    ROW, method="quant_vsr", reduced=True, trained_params=123456, branch_params=1000, branch_params_pct=12.34, branch_macs_pct=9.87,
    weight_bits=8.125, act_bits=4.5, seconds=61.4, peak_mib=1028.75,
)  # fmt: skip


def test_the_card_for_people(tmp_path: Path) -> None:
    fairness.write_fairness(tmp_path, [OURS, ROW], ["maxmin", "quant_vsr"])
    text = (tmp_path / "fairness.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|") and line[1] != "-"]
    assert lines == [
        ["Bits", "Method", "Setting", "Weight ranges", "Activation ranges", "Activations", "Trained", "Branch params", "Branch MACs",
         "Effective weight bits", "Mean activation bits", "Time (s)", "Peak (MiB)"],
        ["W4A4", "maxmin", "shared", "output channel", "tensor", "dynamic", "0", "–", "–", "4.250", "4.000", "–", "–"],
        ["W4A4", "quant_vsr", "shared, *reduced*", "output channel", "tensor", "dynamic", "123,456", "12.3%", "9.9%", "8.125", "4.500", "61", "1029"],
    ]  # fmt: skip
    assert "\n- All: 3 of 197 layers left at full precision (time_embed.0 out.2).\n" in text
    assert "\n- All: calibrated on 30 samples of data set photos at 5 sampling steps, digest abcd.\n" in text
    latex = (tmp_path / "fairness.tex").read_text()
    assert r"W4A4 & quant\_vsr & shared, \emph{reduced} & " in latex and r"12.3\%" in latex and r"time\_embed.0" in latex
    assert latex.count("{") == latex.count("}")


def test_what_rows_do_not_share_is_said_of_each(tmp_path: Path) -> None:
    fairness.write_fairness(tmp_path, [ROW, replace(OURS, calibration_samples=8, calibration_digest="ef"), replace(ROW, bits="W8A8")])
    text = (tmp_path / "fairness.md").read_text()
    assert "\n- maxmin W8A8, maxmin W4A4: calibrated on 30 samples of data set photos at 5 sampling steps, digest abcd.\n" in text
    assert "\n- quant_vsr W4A4: calibrated on 8 samples of data set photos at 5 sampling steps, digest ef.\n" in text
    assert "\n- All: 3 of 197 layers" in text


def test_the_same_bytes_whatever_the_order_and_every_column(tmp_path: Path) -> None:
    rows = [replace(row, bits=bits) for row in (ROW, OURS) for bits in ("W8A8", "W6A6", "W4A4")]
    fairness.write_fairness(tmp_path / "a", rows)
    fairness.write_fairness(tmp_path / "b", random.Random(3).sample(rows, len(rows)))
    for form in fairness.FORMS:
        assert (tmp_path / "a" / f"fairness.{form}").read_bytes() == (tmp_path / "b" / f"fairness.{form}").read_bytes()
    with (tmp_path / "a" / "fairness.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == fairness.COLUMNS and fairness.COLUMNS[-2:] == (
        "seconds",
        "peak_mib",
    )  # measured ones last: others never differ
    found = {(line["method"], line["bits"]): line for line in lines}
    assert found["maxmin", "W4A4"]["seconds"] == "" and found["quant_vsr", "W4A4"]["weight_bits"] == "8.125000"
    assert (found["maxmin", "W4A4"]["reduced"], found["quant_vsr", "W4A4"]["reduced"]) == ("false", "true")
