"""The published U-Net's layers, counted on the meta device, against the table measured on the reference."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from golden import load_json_gz

from qvsr.config import UNetSettings, load
from qvsr.models.unet import InflatedUNet
from qvsr.provenance import ROOT
from qvsr.quant import cost
from qvsr.speed.layers import shapes


def test_every_layer_s_shape_positions_and_macs() -> None:
    table = load_json_gz("unet_layers")
    first = next(iter(table["input_blocks.0.0"]["xshape"][-1:]))  # side of the latent that the table was measured with
    tokens = next(facts["xshape"][1] for name, facts in table.items() if name.endswith("attn2.to_k"))
    with torch.device("meta"):
        unet = InflatedUNet(UNetSettings())
    facts = cost.count(unet, *cost.example_inputs(UNetSettings(), tile=first, context_tokens=tokens, device="meta"))
    ours = {layer.name: layer for layer in facts.layers}
    assert set(ours) == set(table)
    for name, expected in table.items():
        layer = ours[name]
        found = (layer.kind, list(layer.weight_shape), layer.weights, layer.bias, layer.positions, layer.macs)
        assert found == tuple(expected[key] for key in ("type", "wshape", "params", "bias", "pos", "macs")), name
        assert layer.input_positions * expected["wshape"][1] == torch.Size(expected["xshape"]).numel(), name


def test_the_benchmark_has_every_layer() -> None:
    """Each layer of the table is counted with one of the shapes that `bench layers` measures, and none twice."""
    table = load_json_gz("unet_layers")
    expected = Counter(
        (facts["type"], tuple(facts["wshape"]), facts["bias"] > 0, tuple(facts["xshape"]), facts["macs"]) for facts in table.values()
    )
    found = shapes(load(ROOT / "config" / "paper.yaml"))
    counted: Counter[Any] = Counter()
    for shape, count in found.items():
        counted[shape.kind, shape.weight, shape.bias, shape.input, shape.macs] += count
    assert counted == expected
    quantized = [count for shape, count in found.items() if shape.quantized]
    assert (len(quantized), sum(quantized)) == (62, 351)  # as docs/speed.md says
