"""Spatial and temporal complexity: quant_stca; rank allocation: quant_rank."""

from __future__ import annotations

import golden
import torch

from qvsr.method_settings import QuantVSRSettings
from qvsr.quantvsr import allocate_ranks, complexity, is_measured


def test_complexity() -> None:
    meta, tensors = golden.load("quant_stca")
    assert {case["case"] for case in meta["cases"]} == {name for (name,) in golden.matching(tensors, r"(.+)\.x")}
    for case in meta["cases"]:
        name = case["case"]
        spatial, temporal = complexity(tensors[f"{name}.x"], "temporal_conv" in case["layer_name"])
        golden.assert_close(spatial.reshape(1), tensors[f"{name}.c_spatial"], meta, f"{name} spatial")
        golden.assert_close(temporal.reshape(1), tensors[f"{name}.c_temporal"], meta, f"{name} temporal")


def test_which_layers_are_measured() -> None:
    meta, _ = golden.load("quant_stca")
    assert not any(is_measured(name) for name in meta["layers_without_statistics"])
    assert all(is_measured(case["layer_name"]) for case in meta["cases"])


def test_ranks() -> None:
    meta, tensors = golden.load("quant_rank")
    assert len(meta["cases"]) == len(golden.matching(tensors, r"case(\d+)\.ranks"))
    for number, case in enumerate(meta["cases"]):
        measured = [row for row in range(case["layers"]) if row not in case["layers_without_statistics"]]
        step = QuantVSRSettings().rank_multiple
        settings = QuantVSRSettings(rank_min=case["min_rank"], rank_max=case["max_rank"], quantile=case["percentile"])
        ranks = torch.full((case["layers"],), (case["min_rank"] + step // 2) // step * step)
        ranks[measured] = allocate_ranks(
            tensors[f"case{number}.c_spatial"][measured], tensors[f"case{number}.c_temporal"][measured], settings
        )
        golden.assert_close(ranks, tensors[f"case{number}.ranks"], meta, f"case {number}")
