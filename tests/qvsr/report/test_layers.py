"""The per-layer report: every column against float64 arithmetic by hand, what has no noise or no signal, the figure."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from qvsr.quant import apply
from qvsr.quant.by_timestep import ByTimestep
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer, halves
from qvsr.report import layers


class Net(nn.Module):
    """One layer under the U-Net's signature, and one that stays at full precision."""

    def __init__(self, layer: nn.Module, name: str = "layer") -> None:
        super().__init__()
        self.name = name
        self.add_module(name, layer)
        self.other = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, struct: dict[str, Tensor]) -> Tensor:
        out: Tensor = self.get_submodule(self.name)(x)
        return out


@dataclass
class Call:
    x: Tensor
    t: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    context: Tensor = field(default_factory=lambda: torch.zeros(1, 1, 1))
    struct: dict[str, Tensor] = field(default_factory=dict)
    out: Tensor = field(default_factory=lambda: torch.zeros(()))


def quantized(module: nn.Module, plan: LayerPlan, name: str = "layer", **how: object) -> tuple[Net, Net, QuantLayer]:
    layer = QuantLayer.from_float(module, plan, name, **how)
    return Net(module, name), Net(layer, name), layer


def decibels(exact: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum()))


def rounded(values: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int) -> np.ndarray:
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    return (np.clip(np.round(values / scale) + zero, 0, 2**bits - 1) - zero) * scale


MODULES = {
    "Linear": (lambda: nn.Linear(8, 6), (5, 7, 8)),
    "Conv2d": (lambda: nn.Conv2d(8, 6, 3, padding=1), (5, 8, 4, 4)),
}


@pytest.mark.parametrize("kind", MODULES)
def test_every_column_by_hand(kind: str) -> None:
    """Split, rotated, smoothed, with a branch of rank 2; two calls at two timesteps, summed before the ratio."""
    torch.manual_seed(3)
    make, shape = MODULES[kind]
    module = make().requires_grad_(False)
    smooth = torch.rand(8) + 0.5
    full, net, layer = quantized(module, LayerPlan(3, 4, halves(8), True, 2), smooth=smooth)
    layer.freeze()
    calls = [Call(torch.randn(shape), torch.tensor([700])), Call(3 * torch.randn(shape), torch.tensor([20]))]
    everything, first, second = layers.report(full, net, calls, {"layer": 30, "other": 10})
    assert [row.t for row in (everything, first, second)] == [None, 20, 700]
    assert {(row.layer, row.kind, row.weight_bits, row.act_bits, row.rank) for row in (everything, first, second)} == {
        ("layer", kind, 3, 4, 2)
    }
    assert everything.shape == ("6x8" if kind == "Linear" else "6x8x3x3") and everything.macs_pct == 75

    weight, scaling = module.weight.double().numpy(), smooth.double().numpy()
    if kind == "Linear":
        weight = weight[:, :, None, None]
    rotations = [getattr(layer, f"rotation_{part}").double().numpy() for part in range(2)]
    rotate = np.block([[rotations[0], np.zeros((4, 4))], [np.zeros((4, 4)), rotations[1]]])
    target = np.einsum("nkhw,kl->nlhw", weight * scaling[:, None, None], rotate)
    down = layer.down.double().numpy().reshape(2, 8, *weight.shape[2:])
    if kind == "Conv2d":  # there the rotation stands on the left
        target = np.einsum("lk,nkhw->nlhw", rotate, weight * scaling[:, None, None])
        branch = np.einsum("nr,lk,rkhw->nlhw", layer.up.double().numpy(), rotate, down)
    else:
        branch = np.einsum("nr,rkhw,kl->nlhw", layer.up.double().numpy(), down, rotate)
    residual = (target - branch).reshape(6, 2, -1)
    values = rounded(residual, residual.min(2, keepdims=True), residual.max(2, keepdims=True), 3).reshape(target.shape)
    assert everything.weight_sqnr_db == pytest.approx(decibels(target, values + branch), rel=1e-4)  # float32 against float64
    assert (everything.weight_low, everything.weight_high) == pytest.approx((residual.min(), residual.max()), rel=1e-4)
    assert everything.weight_clipped_pct == 0

    exact_inputs, exact_outputs = {}, {}
    for call in calls:
        x = call.x.double().numpy()
        maps = x.reshape(-1, 8, 1, 1) if kind == "Linear" else x
        thin = maps / scaling[None, :, None, None]
        turned = np.einsum("bkhw,kl->blhw" if kind == "Linear" else "bkhw,lk->blhw", thin, rotate)
        inputs = np.concatenate([rounded(part, part.min(), part.max(), 4) for part in np.split(turned, 2, 1)], 1)
        padding = 0 if kind == "Linear" else 1

        def convolve(a: np.ndarray, b: np.ndarray, padding: int = padding) -> np.ndarray:
            return F.conv2d(torch.from_numpy(a), torch.from_numpy(b), padding=padding).numpy()

        bias = module.bias.double().numpy()[:, None, None]
        exact = convolve(maps, weight) + bias
        product = np.einsum("nr,rkhw->nkhw", layer.up.double().numpy(), down)
        exact_inputs[int(call.t)] = (turned, inputs)
        exact_outputs[int(call.t)] = (exact, convolve(inputs, values) + convolve(thin, product) + bias)
    for row in (first, second):
        assert row.act_sqnr_db == pytest.approx(decibels(*exact_inputs[row.t]), rel=1e-4)
        assert row.output_sqnr_db == pytest.approx(decibels(*exact_outputs[row.t]), rel=1e-4)
        assert (row.input_low, row.input_high) == pytest.approx((exact_inputs[row.t][0].min(), exact_inputs[row.t][0].max()), rel=1e-4)
        assert row.weight_sqnr_db == everything.weight_sqnr_db and row.act_clipped_pct == 0
    for column, pairs in (("act_sqnr_db", exact_inputs), ("output_sqnr_db", exact_outputs)):
        both = [np.concatenate([pair[side].ravel() for pair in pairs.values()]) for side in (0, 1)]
        assert getattr(everything, column) == pytest.approx(decibels(*both), rel=1e-4)
    assert everything.input_high == max(first.input_high, second.input_high)


def test_complexity_is_that_of_the_raw_input() -> None:
    full, net, _ = quantized(nn.Conv2d(2, 2, 1), LayerPlan(4, 4), smooth=torch.tensor([3.0, 4.0]))
    x = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    maps = x.double().numpy()
    (everything, _) = layers.report(full, net, [Call(x)], {"layer": 1})
    assert everything.c_s == pytest.approx(maps.reshape(5, 2, 9).std(2, ddof=1).mean(), rel=1e-5)  # float32
    assert everything.c_t == pytest.approx(((maps[1:] - maps[:-1]) ** 2).mean(), rel=1e-5)


def test_a_temporal_convolution_folds_its_frames() -> None:
    full, net, _ = quantized(nn.Conv3d(2, 2, (3, 1, 1), padding=(1, 0, 0)), LayerPlan(4, 4), "temporal_conv")
    x = torch.randn(1, 2, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    frames = x[0].transpose(0, 1).double().numpy()
    (everything, _) = layers.report(full, net, [Call(x)], {"temporal_conv": 1})
    assert everything.c_t == pytest.approx(((frames[1:] - frames[:-1]) ** 2).mean(), rel=1e-5)  # float32


def test_clipped_shares_with_ranges_by_timestep() -> None:
    """One of four values lies beyond -1 … 1 at the first timesteps, none beyond -4 … 4 later."""
    full, net, layer = quantized(nn.Linear(4, 2), LayerPlan(4, 8))
    layer.set_static_activations(torch.tensor([[-1.0], [-4.0]]), torch.tensor([[1.0], [4.0]]), [100, 999])
    x = torch.tensor([[0.0, 0.5, -0.5, 3.0]])
    everything, early, late = layers.report(full, net, [Call(x, torch.tensor([100])), Call(x, torch.tensor([500]))], {"layer": 1})
    assert (early.act_clipped_pct, late.act_clipped_pct, everything.act_clipped_pct) == (25, 0, 12.5)
    error = 3.0 - 1.0  # of the clipped value, within half a level of 1/128; the others' errors are a thousand times smaller
    assert early.act_sqnr_db == pytest.approx(10 * math.log10(9.5 / error**2), abs=0.02)
    assert early.act_sqnr_db < everything.act_sqnr_db < late.act_sqnr_db


def test_a_branch_that_moved_leaves_weights_beyond_their_range() -> None:
    """Ranges are those of the first residual, here -1 … 1; the branch then pushes two of six weights to ±2."""
    module = nn.Linear(3, 2, bias=False).requires_grad_(False)
    module.weight.copy_(torch.tensor([[-1.0, 0.0, 1.0], [1.0, 0.0, -1.0]]))
    full, net, layer = quantized(module, LayerPlan(8, 8, rank=1), branch=(torch.zeros(2, 1), torch.zeros(1, 3)))
    assert layer.up is not None and layer.down is not None
    layer.up.copy_(torch.tensor([[1.0], [1.0]]))
    layer.down.copy_(torch.tensor([[-1.0, 0.0, 0.0]]))  # the residual becomes 0, 0, 1 and 2, 0, -1
    everything, _ = layers.report(full, net, [Call(torch.ones(1, 3))], {"layer": 1})
    assert (everything.weight_low, everything.weight_high) == (-1, 2)
    assert everything.weight_clipped_pct == pytest.approx(100 / 6)
    assert everything.weight_sqnr_db == pytest.approx(
        10 * math.log10(4 / 1), abs=0.05
    )  # 2 comes back as 1: an error of 1 in an energy of 4


def test_exact_is_infinite_and_silence_is_empty() -> None:
    module = nn.Linear(4, 1, bias=False).requires_grad_(False)
    module.weight.copy_(torch.tensor([[0.0, 1.0, 2.0, 3.0]]))  # the four levels of two bits
    full, net, _ = quantized(module, LayerPlan(2, 2))
    rows = layers.report(full, net, [Call(torch.tensor([[3.0, 2.0, 1.0, 0.0]]))], {"layer": 1})
    assert [(row.weight_sqnr_db, row.act_sqnr_db, row.output_sqnr_db) for row in rows] == [(math.inf, math.inf, math.inf)] * 2
    silent = layers.report(full, net, [Call(torch.zeros(1, 4))], {"layer": 1})
    assert [(row.weight_sqnr_db, row.act_sqnr_db, row.output_sqnr_db) for row in silent] == [(math.inf, None, None)] * 2
    (line, _) = csv.DictReader(io.StringIO(layers.layers_csv(silent)))
    assert (line["weight_sqnr_db"], line["act_sqnr_db"], line["output_sqnr_db"], line["t"]) == ("inf", "", "", "")
    assert tuple(line) == layers.COLUMNS


def test_forms_by_timestep_have_weights_of_their_own() -> None:
    torch.manual_seed(0)
    module = nn.Linear(8, 8).requires_grad_(False)
    forms = [QuantLayer.from_float(module, LayerPlan(4, 4), smooth=factor) for factor in (None, torch.linspace(0.1, 4, 8))]
    net = Net(ByTimestep(forms, [500, 1000]))
    apply.freeze(net)
    calls = [Call(torch.randn(3, 8), torch.tensor([t])) for t in (0, 500, 900)]
    everything, *by_t = layers.report(Net(module), net, calls, {"layer": 1})
    assert [row.t for row in by_t] == [0, 500, 900] and {row.layer for row in by_t} == {"layer"}
    assert by_t[0].weight_sqnr_db == by_t[1].weight_sqnr_db != by_t[2].weight_sqnr_db
    alone = [layers.report(Net(module), Net(form), [calls[0]], {"layer": 1})[0] for form in forms]
    assert [by_t[1].weight_sqnr_db, by_t[2].weight_sqnr_db] == [one.weight_sqnr_db for one in alone]
    assert (
        min(by_t[1].weight_sqnr_db, by_t[2].weight_sqnr_db)
        < everything.weight_sqnr_db
        < max(by_t[1].weight_sqnr_db, by_t[2].weight_sqnr_db)
    )


def test_samples_are_spread_over_timesteps_and_clips() -> None:
    timesteps = [t for _ in range(6) for t in (900, 600, 300, 0)]  # six clips of four timesteps each
    chosen = layers.spread(timesteps, 8)
    assert sorted(timesteps[index] for index in chosen) == [0, 0, 300, 300, 600, 600, 900, 900]
    assert len({index // 4 for index in chosen}) == 6  # every clip is among them
    assert layers.spread(timesteps, 24) == list(range(24))
    assert layers.spread([0, 0, 0, 500], 4) == [0, 1, 3]  # a timestep with fewer samples leaves its share


def test_what_cannot_be_reported() -> None:
    full, net, _ = quantized(nn.Linear(4, 2), LayerPlan(4, 4))
    with pytest.raises(QuantError, match="layers: the calibration set is empty"):
        layers.report(full, net, [], {"layer": 1})
    with pytest.raises(QuantError, match="layers: the network has no quantized layer"):
        layers.report(full, full, [Call(torch.ones(1, 4))], {"layer": 1})
    unreached = Net(nn.Linear(4, 2))
    unreached.other = QuantLayer.from_float(unreached.other, LayerPlan(4, 4), "other")
    with pytest.raises(QuantError, match="layers: other was not reached by any of the 1 samples"):
        layers.report(full, unreached, [Call(torch.ones(1, 4))], {"layer": 1, "other": 1})


def row(layer: str, output: float | None, rank: int = 0, t: int | None = None, kind: str = "Linear", **more: float) -> layers.LayerRow:
    return layers.LayerRow(
        layer,
        kind,
        "8x8",
        t,
        4,
        4,
        rank,
        1.0,
        20.0,
        18.0,
        output,
        -1.0,
        1.0,
        0.0,
        -2.0,
        2.0,
        0.0,
        more.get("c_s", 0.5),
        more.get("c_t", 0.1),
    )


ROWS = [
    one
    for index in range(30)
    for t in (None, 0, 500)
    for one in [
        row(
            f"{('input_blocks', 'output_blocks')[index // 15]}.{index}", 10.0 + index + (t or 0) / 100, 4 * (index % 3), t,
            ("Linear", "Conv2d")[index % 2], c_s=0.01 * index,
        )
    ]
]  # fmt: skip


def test_the_worst_layers_come_first_and_silent_ones_not_at_all() -> None:
    text = layers.worst([row("good", 30.0), row("silent", None), row("bad", 3.25, rank=8), row("bad", 1.0, t=5), row("exact", math.inf)])
    assert [line.split()[0] for line in text.splitlines()] == ["worst", "bad", "good", "exact"]
    assert "3.25" in text.splitlines()[1] and text.splitlines()[1].endswith("   8")
    assert len(layers.worst(ROWS).splitlines()) == 11


@pytest.mark.parametrize("branch", [True, False])
def test_the_figure_is_the_same_twice_and_shows_the_values(tmp_path: Path, branch: bool) -> None:
    rows = [one if branch else replace(one, rank=0) for one in ROWS]
    layers.draw(tmp_path / "a.png", rows, "m W4A4")
    layers.draw(tmp_path / "b.png", list(rows), "m W4A4")
    layers.draw(tmp_path / "c.png", [*rows[:-3], *(replace(one, output_sqnr_db=5.0) for one in rows[-3:])], "m W4A4")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (1650, 1650) and not picture.text  # no software, no date
    dark = np.asarray(picture.convert("L")) < 200
    assert not dark[:4].any() and not dark[-4:].any() and not dark[:, :4].any() and not dark[:, -4:].any()  # nothing is cut off


def test_the_figure_of_layers_without_any_noise(tmp_path: Path) -> None:
    layers.draw(tmp_path / "a.png", [row("a", math.inf), row("b", None)], "m W8A8")
    assert (tmp_path / "a.png").stat().st_size > 1000
