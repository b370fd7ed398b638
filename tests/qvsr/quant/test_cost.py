"""Parameters and multiply-accumulates against the published table, PyTorch's own counter and sums by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qvsr import config
from qvsr.config import UNetSettings
from qvsr.models.unet import InflatedUNet
from qvsr.quant import apply, checkpoint, cost
from qvsr.quant.layer import LayerPlan, QuantLayer

EXCLUDE = config.MethodSettings().exclude
SMALL = UNetSettings(
    model_channels=64,
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    num_head_channels=32,
    context_dim=16,
    semb_channels=8,
)


@pytest.fixture(scope="module")
def published() -> cost.Facts:
    """The published U-Net on the meta device: no weights, no arithmetic."""
    with torch.device("meta"):
        unet = InflatedUNet(UNetSettings())
    return cost.count(unet, *cost.example_inputs(UNetSettings(), tile=64, context_tokens=77, device="meta"))


def test_full_precision_is_the_published_size(published: cost.Facts) -> None:
    row = cost.cost(published, "full_precision", "W32A32")
    assert row.params_m == pytest.approx(935.321287, abs=1e-6)  # whole numbers in 1e-6
    assert sum(layer.macs for layer in published.layers) / 1e9 == pytest.approx(1879.668, abs=5e-4)
    assert row.macs_g == pytest.approx(1880.75, abs=5e-3)  # with bias additions; the paper prints 1881
    assert row.attention_macs_g == pytest.approx(315.135, abs=5e-4)
    assert row.rank_mean == 0 and row.params_exact_m == pytest.approx(row.params_m)
    assert row.macs_exact_g == pytest.approx(row.macs_g + row.attention_macs_g)


@pytest.mark.parametrize(("bits", "params", "macs"), [(8, 263.3, 577.3), (6, 204.8, 459.7), (4, 146.4, 342.2)])
def test_rank_24_everywhere_comes_near_the_published_table(published: cost.Facts, bits: int, params: float, macs: float) -> None:
    """The paper prints 263, 204, 146 M and 563, 446, 328 G for ranks that it allocates by layer."""
    planned = cost.plan(published, bits, bits, EXCLUDE, rank=24, split=True, rotate=True)
    row = cost.cost(planned, "quantvsr", f"W{bits}A{bits}")
    assert round(row.params_m, 1) == params and round(row.macs_g, 1) == macs
    assert row.quantized_layers == 351 and row.layers == 354 and row.rank_mean == 24
    assert row.rotation_macs_g == pytest.approx(546.395, abs=5e-4)


def test_one_rank_unit(published: cost.Facts) -> None:
    rows = [cost.cost(cost.plan(published, 4, 4, EXCLUDE, rank=rank), "quantvsr", "W4A4") for rank in (16, 17)]
    assert rows[1].params_m - rows[0].params_m == pytest.approx(1.22656, abs=1e-6)
    assert rows[1].macs_g - rows[0].macs_g == pytest.approx(4.46148, abs=1e-6)


def test_pytorch_s_counter_agrees() -> None:
    unet = InflatedUNet(SMALL).eval()
    inputs = cost.example_inputs(SMALL, tile=8, context_tokens=3)
    facts = cost.count(unet, *inputs)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # it does not know the fused CPU kernel
        unet(*inputs)
    assert sum(layer.macs for layer in facts.layers) + facts.attention_macs == counter.get_total_flops() // 2  # two operations each
    stored = sum(layer.weights + layer.bias for layer in facts.layers) + facts.other_params
    assert stored == sum(p.numel() for p in unet.parameters())
    assert all(not module._forward_hooks for module in unet.modules())


def quantize(unet: nn.Module, bits: int, rank: int, split: bool, rotate: bool) -> nn.Module:
    """Every layer but the excluded ones replaced, as a method does."""
    for name, module in cost.layers_of(unet).items():
        if name.startswith(EXCLUDE):
            continue
        half = module.weight.shape[1] // 2
        plan = LayerPlan(bits, bits, (half, half) if split else (), rotate, min(rank, module.weight.shape[0], module.weight[0].numel()))
        parent, _, last = name.rpartition(".")
        setattr(unet.get_submodule(parent), last, QuantLayer.from_float(module, plan, name))
    return unet


@pytest.mark.parametrize(("rank", "split", "rotate"), [(0, False, False), (4, True, True)])
def test_a_plan_costs_what_the_quantized_model_costs(rank: int, split: bool, rotate: bool) -> None:
    torch.manual_seed(0)
    unet, inputs = InflatedUNet(SMALL).eval(), cost.example_inputs(SMALL, tile=8, context_tokens=3)
    planned = cost.plan(cost.count(unet, *inputs), 4, 4, EXCLUDE, rank, split, rotate)
    quantized = quantize(unet, 4, rank, split, rotate)
    measured = cost.count(quantized, *inputs)
    assert measured == planned
    assert cost.cost(measured, "m", "W4A4") == cost.cost(planned, "m", "W4A4")
    for layer in cost.layers_of(quantized).values():
        if isinstance(layer, QuantLayer):
            layer.freeze()
    assert cost.count(quantized, *inputs) == planned  # integers instead of floats: the same cost


def test_granularity_and_symmetry_store_nothing_more() -> None:
    network = nn.Sequential(nn.Linear(8, 6))
    counted = []
    for fields in ({}, {"act_granularity": "frame"}, {"act_granularity": "token", "weight_symmetric": True, "act_symmetric": True}):
        layer = QuantLayer.from_float(network[0], LayerPlan(4, 4, (4, 4), True, **fields))
        counted.append(cost.count(nn.Sequential(layer), torch.zeros(5, 8)))
    assert counted[0] == counted[1] == counted[2] and counted[0].layers[0].side_bits == (32 + 8) * 6 * 2 + 8


def test_side_bits_are_those_of_the_file(tmp_path: Path) -> None:
    """Scales, zero points, signs, smoothing, branch, bias and static ranges, as the safetensors file holds them."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 6), nn.Conv2d(12, 4, 3, bias=False))  # no Hadamard matrix for 6 channels

    def make(name: str, module: nn.Module) -> QuantLayer:
        channels = module.weight.shape[1]  # type: ignore[union-attr,index]
        plan = LayerPlan(3, 4, (channels // 2,) * 2, True, rank=2)
        layer = QuantLayer.from_float(module, plan, name, smooth=torch.rand(channels) + 0.5 if name == "0" else None)  # type: ignore[arg-type]
        if name == "0":
            layer.set_static_activations(-torch.ones(3, 2), torch.ones(3, 2), [10, 20, 30])
            layer.timestep.value = 0
        else:  # a channel without 0 in its range has its zero point beyond a byte
            layer.set_weight_ranges([(torch.full((4, 1, 1, 1), 1.0), torch.full((4, 1, 1, 1), 1.01))] * 2)
        layer.freeze()
        return layer

    apply.quantize_layers(network, (), make)
    checkpoint.save(network, tmp_path / "a.safetensors", {"method": "m", "bits": "W3A4", "backbone": "b"})
    network.forward = lambda x: network[1](network[0](x[..., 0, 0]).repeat(1, 2)[:, :, None, None].expand(-1, -1, 3, 3))  # type: ignore[method-assign]
    facts = cost.count(network, torch.zeros(2, 8, 1, 1)).layers
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        stored = {key: 8 * file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118
    assert stored["0.weight"] == 3 * 6 * 8 and stored["1.weight"] == 3 * 4 * 12 * 9 and stored["1.zero_point"] == 16 * 4 * 2
    for layer in facts:
        own = {key: bits for key, bits in stored.items() if key.startswith(layer.name + ".")}
        assert layer.stored_bits == sum(own.values())
        assert layer.side_bits == sum(bits for key, bits in own.items() if key.split(".")[1] not in ("weight", "up", "down", "bias"))
    assert {key.split(".")[1] for key in stored} >= {"signs", "smooth", "act_scale", "act_zero_point", "scale", "zero_point"}


def test_an_offset_is_stored_by_channel_and_by_output_and_tap() -> None:
    """32 bits each, and nothing else differs: its map of constants is added with the bias."""
    module, x = nn.Conv2d(8, 6, 3, padding=1), torch.zeros(1, 8, 5, 5)
    plain, shifted = (
        cost.count(nn.Sequential(QuantLayer.from_float(module, LayerPlan(4, 4), **fields)), x).layers[0]
        for fields in ({}, {"offset": torch.ones(8)})
    )
    assert shifted.side_bits - plain.side_bits == 32 * (8 + 6 * 9)
    assert replace(shifted, side_bits=plain.side_bits) == plain


def test_both_countings_by_hand() -> None:
    """A 3x3 convolution 8 -> 16 with bias on 4x4 pixels, W4A8, rank 2, two rotated halves; beside it a norm with 16 parameters."""
    layer = cost.LayerFact("conv", "Conv2d", (16, 8, 3, 3), 16, 16, 16, 4, 8, rank=2, rotated=(4, 4), side_bits=2 * 32 * 16 * 2 + 8 * 8)
    row = cost.cost(cost.Facts((layer,), other_params=16, attention_macs=100), "m", "W4A8")
    weights, branch = 16 * 8 * 9, 2 * (16 + 8 * 9)
    assert row.params_m * 1e6 == pytest.approx((weights + 16 + 16) * 4 / 32 + branch)
    assert row.macs_g * 1e9 == pytest.approx((weights * 16 + 16 * 16) * 8 / 32 + branch * 16)  # A8 is the wider operand
    assert row.rotation_macs_g * 1e9 == pytest.approx(16 * 2 * 4 * 4)
    assert row.params_exact_m * 1e6 == pytest.approx(weights * 4 / 32 + 16 + 16 + branch + (2 * 32 * 16 * 2 + 64) / 32)
    assert row.macs_exact_g * 1e9 == pytest.approx(weights * 16 * 8 / 32 + 16 * 16 + branch * 16 + 16 * 2 * 16 + 100)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.proj(x)
        return F.scaled_dot_product_attention(q, key=x[..., :5, :], value=x[..., :5, :4])


def test_attention_by_hand() -> None:
    facts = cost.count(Attends(), torch.zeros(2, 3, 7, 8))
    assert facts.attention_macs == 2 * 3 * 7 * 5 * (8 + 4)
    assert facts.layers[0].positions == 2 * 3 * 7 and facts.layers[0].macs == 42 * 64


def test_a_layer_called_twice_counts_twice() -> None:
    layer = nn.Conv1d(4, 6, 3)
    network = nn.Sequential(layer, nn.ConstantPad1d(0, 0.0))
    network.forward = lambda x: layer(x) + layer(x)  # type: ignore[method-assign]
    assert cost.count(network, torch.zeros(1, 4, 10)).layers[0].positions == 16


def test_rows_of_a_configuration_without_weights() -> None:
    one = {"kind": "photographs"}
    run = config.validate(
        {
            "datasets": {"a": one, "b": one}, "evaluate": ["a"], "calibration": {"dataset": "b"}, "bits": ["W8A8", "W4A4"],
            "backbone": {"unet": SMALL.model_dump(), "structure": {"out_channels": 8}}, "sampling": {"tile": 8, "tile_overlap": 4},
        },
        "test",
    )  # fmt: skip
    rows = cost.planned_costs(run, rank=3)
    assert [(row.method, row.bits) for row in rows] == [
        ("full_precision", "W32A32"), ("maxmin", "W8A8"), ("quantvsr", "W8A8"), ("maxmin", "W4A4"), ("quantvsr", "W4A4")
    ]  # fmt: skip
    assert [row.rank_mean for row in rows] == [0, 0, 3, 0, 3] and rows[4].rotation_macs_g > 0 == rows[3].rotation_macs_g
    assert cost.planned_costs(run)[2].rank_mean == pytest.approx(run.method.quantvsr.rank_min, rel=0.2)  # narrow layers cap it
    facts = cost.count(InflatedUNet(SMALL).eval(), *cost.example_inputs(SMALL, tile=8, context_tokens=77))
    assert cost.cost(facts, "full_precision", "W32A32") == rows[0]


def test_rows_of_variants_are_counted_with_their_own_settings() -> None:
    one = {"kind": "photographs"}
    run = config.validate(
        {
            "datasets": {"a": one, "b": one}, "evaluate": ["a"], "calibration": {"dataset": "b"}, "bits": ["W4A4"],
            "backbone": {"unet": SMALL.model_dump(), "structure": {"out_channels": 8}}, "sampling": {"tile": 8, "tile_overlap": 4},
            "variants": {"bare": {"method": "quantvsr", "settings": {"branch": False, "rotation": False, "channel_split": False}}},
            "methods": ["maxmin", "bare", "quantvsr"],
        },
        "test",
    )  # fmt: skip
    _, maxmin, bare, quantvsr = cost.planned_costs(run)
    assert bare.method == "bare" and {**bare.row(), "method": "maxmin"} == maxmin.row()
    assert quantvsr.rank_mean > 0 == bare.rank_mean


def test_an_exclusion_ends_at_a_dot_as_where_layers_are_replaced() -> None:
    facts = cost.Facts(tuple(cost.LayerFact(name, "Linear", (4, 4), 1) for name in ("in.1", "in.1.op", "in.10")), 0, 0)
    assert [layer.quantized for layer in cost.plan(facts, 4, 4, ("in.1",)).layers] == [False, False, True]


def test_what_cannot_be_counted() -> None:
    with pytest.raises(cost.CostError, match="ReLU has no linear, convolution or quantized layer"):
        cost.count(nn.ReLU(), torch.zeros(1))
    with pytest.raises(cost.CostError, match="sampling.tile 7 is no multiple of 2, which 2 levels of the U-Net need"):
        cost.example_inputs(SMALL, tile=7, context_tokens=3)


def test_rows_of_methods_with_one_rank_or_a_rotation() -> None:
    one = {"kind": "photographs"}
    run = config.validate(
        {
            "datasets": {"a": one, "b": one}, "evaluate": ["a"], "calibration": {"dataset": "b"}, "bits": ["W4A4"],
            "backbone": {"unet": SMALL.model_dump(), "structure": {"out_channels": 8}}, "sampling": {"tile": 8, "tile_overlap": 4},
            "methods": ["svdquant", "vidit_q"], "method": {"svdquant": {"rank": 5}},
        },
        "test",
    )  # fmt: skip
    _, svdquant, vidit_q = cost.planned_costs(run)
    assert svdquant.rank_mean == 5 and svdquant.rotation_macs_g == 0
    assert vidit_q.rank_mean == 0 and vidit_q.rotation_macs_g > 0
    assert cost.planned_costs(run, rank=3)[1].rank_mean == 3
