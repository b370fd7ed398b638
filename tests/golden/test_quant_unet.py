"""A whole network with every layer quantized: quant_unet. Only error levels can be compared, as the set says."""

from __future__ import annotations

import re
from typing import Any

import golden
import pytest
import torch
from networks import diffusion, set_name
from torch import Tensor, nn

from qvsr.method_settings import QuantVSRSettings
from qvsr.quant import apply
from qvsr.quant.layer import LayerPlan, QuantLayer, halves
from qvsr.quantvsr import Complexity, allocate_ranks, measure_complexity

SET = "quant_unet"


class Call:
    """A network call in the form of a calibration sample."""

    def __init__(self, x: Tensor, t: Tensor, context: Tensor, struct: dict[str, Tensor], out: Tensor) -> None:
        self.x, self.t, self.context, self.struct, self.out = x, t, context, struct, out


def plain(name: str) -> str:
    """Our name of a layer: the reference holds the U-Net as its attribute `model`."""
    return name.removeprefix("model.")


@pytest.fixture
def case() -> tuple[dict[str, Any], dict[str, Tensor], Any, Call]:
    meta, tensors = golden.load(SET)
    source = set_name(meta["weights"])
    inputs = golden.under(golden.load(source)[1], re.findall(r"case\d+", meta["weights"])[0] + ".")
    nets = diffusion(source, inputs["context"])
    struct = nets.structure(inputs["latent"], inputs["timesteps"])
    return meta, tensors, nets, Call(inputs["x"], inputs["timesteps"], inputs["context"], struct, tensors["fp_out"])


@torch.no_grad()
def test_error_level_at_every_bit_width(case: Any) -> None:
    meta, tensors, nets, call = case
    outputs: dict[int, Tensor] = {}
    for bits in map(int, meta["relative_mse_to_full_precision"]):
        nets = diffusion(set_name(meta["weights"]), call.context)

        def make(name: str, module: nn.Module, bits: int = bits) -> QuantLayer:
            reference = f"model.{name}"
            parts = halves(module.weight.shape[1])
            matrices = [tensors.get(f"rot{part or ''}.{reference}", torch.eye(size, dtype=torch.int8)) for part, size in enumerate(parts)]
            rotations = [m.float() if torch.equal(m, torch.eye(len(m), dtype=torch.int8)) else m.float() / len(m) ** 0.5 for m in matrices]
            plan = LayerPlan(bits, bits, parts, rank=meta["quantised_layers"][reference])
            return QuantLayer.from_float(module, plan, name, rotations=rotations)

        made = apply.quantize_layers(nets.unet, meta["exclude_prefixes"], make)
        assert {f"model.{name}" for name in made} == set(meta["quantised_layers"])
        outputs[bits] = nets.unet(call.x, call.t, call.context, call.struct)

    for bits, out in outputs.items():
        error = float((out - call.out).pow(2).mean() / call.out.pow(2).mean())
        expected = meta["relative_mse_to_full_precision"][str(bits)]
        # the reference moves by `sensitivity` of its own error when the input moves by 1e-6, so levels agree to about a half
        assert expected / 1.6 < error < expected * 1.6, f"{bits} bits: relative error {error:.4g}, reference {expected:.4g}"


def test_complexity_and_ranks(case: Any) -> None:
    meta, tensors, nets, call = case
    calls = []
    for k in range(len(tensors["stats.x"])):
        t = tensors["stats.timesteps"][k]
        calls.append(Call(tensors["stats.x"][k], t, call.context, nets.structure(tensors["stats.latent"][k], t), call.out))
    measured: Complexity = measure_complexity(nets.unet, apply.quantizable(nets.unet, meta["exclude_prefixes"]), calls)
    assert sorted(measured.names) == sorted(plain(name) for name in meta["measured_layers"])
    order = [measured.names.index(plain(name)) for name in meta["measured_layers"]]
    spatial, temporal = measured.spatial_LS[order], measured.temporal_LS[order]
    # statistics of activations up to some tens: relative to their size, float32 sums over a whole network
    torch.testing.assert_close(spatial, tensors["stats.c_spatial"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(temporal, tensors["stats.c_temporal"], rtol=1e-4, atol=1e-5)
    limits = meta["thresholds"]
    settings = QuantVSRSettings(rank_min=limits["min_rank"], rank_max=limits["max_rank"], quantile=limits["percentile"])
    assert torch.equal(allocate_ranks(tensors["stats.c_spatial"], tensors["stats.c_temporal"], settings), tensors["stats.ranks"])
