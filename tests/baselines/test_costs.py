"""What ``python -m qvsr cost`` counts without weights is what each method leaves on the network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import baselines  # noqa: F401
from qvsr.config import QuantSpec, validate
from qvsr.quant import apply, checkpoint, cost
from qvsr.registry import BASELINES
from tests.baselines import conformance
from tests.baselines.test_conformance import QUICK

# The fewest counts that leave everything on the layers; ranks by complexity are known after calibration only.
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, QUICK.get(name, {})) for name in BASELINES if name not in ("full_precision", "quantvsr")),
    ("quantvsr", {"rank_min": 2, "rank_max": 4, "stca": False, "refine_updates": 1, "lba_updates": 1, "accumulate": 1}),
    ("quantvsr", {"branch": False, "lba": False}),
    ("maxmin", {"channel_split": True}),
    ("quarot", {"rotation": False}),
    ("svdquant", {"rank": 100, "limit_ranks": True, "samples": 1, "iterations": 0, "smooth": False}),
    ("vidit_q", {"timestep_bounds": [150, 1000]}),
]


@pytest.mark.parametrize(
    ("name", "settings"), CASES, ids=lambda one: one if isinstance(one, str) else "-".join(map(str, one.values())) or "default"
)
def test_planned_facts_are_those_of_the_quantized_network(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Shapes, positions, bits, ranks, rotated parts of every layer. Calibration may add to what is stored beside the integers, and biases."""
    exclude = conformance.EXCLUDE["unet"]
    config = validate(
        {
            **conformance.CONFIG, "methods": [name], "bits": ["W3A5"], "method": {"exclude": exclude, name: settings},
            "backbone": {"unet": conformance.UNET.model_dump(), "structure": {"out_channels": 8}, "context_tokens": 3},
            "sampling": {"tile": 8, "tile_overlap": 4}, "calibration": {"dataset": "calibration"},
        },
        "test",
    )  # fmt: skip
    own = getattr(config.method, name)
    spec = QuantSpec(method=name, weight_bits=3, act_bits=5, exclude=exclude, settings=own.model_dump())
    unet = BASELINES[name](conformance.network("unet"), conformance.calls("unet"), spec)
    measured = cost.count(unet, *cost.example_inputs(conformance.UNET, tile=8, context_tokens=3))
    apply.note(unet, unet_digest="0" * 64)
    checkpoint.save(unet, tmp_path / "q.safetensors", {"method": name, "bits": "W3A5", "backbone": "tiny"})
    header, stored = cost.checkpoint_facts(tmp_path / "q.safetensors", config)
    assert stored == measured and header["method"] == name  # what reads no weight is what a call of the network gives
    assert cost.stored_costs([tmp_path / "q.safetensors"], config)[1] == cost.cost(measured, name, "W3A5")
    other = config.model_copy(
        update={"backbone": config.backbone.model_copy(update={"unet": conformance.UNET.model_copy(update={"context_dim": 24})})}
    )
    with pytest.raises(
        cost.CostError, match=r"q.safetensors is of another network: .*attn2.to_[kv]\S* \(.*\), the configuration has \(.*24\)"
    ):
        cost.stored_costs([tmp_path / "q.safetensors"], other)
    [(_, _, planned)] = [row for row in cost.planned_facts(config) if row[0] == name]
    found = {layer.name: layer for layer in measured.layers}
    assert found.keys() == {layer.name for layer in planned.layers}
    for layer in planned.layers:
        one = found[layer.name]
        assert replace(one, side_bits=0, bias=0) == replace(layer, side_bits=0, bias=0)
        assert one.side_bits >= layer.side_bits
        aligned = name == "quantvsr" and own.lba and layer.quantized
        assert one.bias == layer.bias or (aligned and (one.bias, layer.bias) == (layer.weight_shape[0], 0))
    assert (measured.other_params, measured.attention_macs) == (planned.other_params, planned.attention_macs)
