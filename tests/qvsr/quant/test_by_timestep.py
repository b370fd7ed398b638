"""Forms of a layer by timestep: the right one runs, they come back from a file, and together they cost their storage."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from qvsr.quant import apply, checkpoint
from qvsr.quant.by_timestep import ByTimestep, row_of
from qvsr.quant.cost import count
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer

HEADER = {"method": "test", "bits": "W4A4", "backbone": "tiny"}
EXCLUDE = ("time_embed.0", "head", "out")
BOUNDS = (150, 999)


def quantized(bounds: tuple[int, ...] = BOUNDS) -> tiny.Net:
    """Forms that differ by their smoothing, and by nothing else."""
    net = tiny.network()
    forms = {}
    for name, module in apply.quantizable(net, EXCLUDE).items():
        generator = torch.Generator().manual_seed(0)
        smooth = torch.rand(len(bounds), module.weight.shape[1], generator=generator) + 0.5
        forms[name] = [QuantLayer.from_float(module, LayerPlan(4, 4, rotate=True), name, smooth=row) for row in smooth]
    apply.quantize_layers(net, EXCLUDE, lambda name, _module: forms[name][0])
    for name, rows in forms.items():
        apply.replace(net, name, ByTimestep(rows, bounds, name))
    apply.freeze(net)
    apply.follow_timesteps(net)
    return net


def only(row: int) -> tiny.Net:
    """The network with one of the forms throughout."""
    net = quantized()
    for name, module in list(net.named_modules()):
        if isinstance(module, ByTimestep):
            apply.replace(net, name, module.rows[row])
    return net


def test_the_timestep_chooses_the_form() -> None:
    net, first, second = quantized(), only(0), only(1)
    for index, call in enumerate(tiny.calls(tiny.network())):  # at timesteps 0, 100, 200, 300
        expected = tiny.run(first if index < 2 else second, call)
        assert torch.equal(tiny.run(net, call), expected)
        assert not torch.equal(tiny.run(second if index < 2 else first, call), expected)


def test_same_output_from_the_file(tmp_path: Path) -> None:
    net, file = quantized(), tmp_path / "q.safetensors"
    checkpoint.save(net, file, HEADER)
    loaded = checkpoint.load(file, tiny.network())
    for call in tiny.calls(tiny.network()):
        assert torch.equal(tiny.run(loaded, call), tiny.run(net, call))
    assert checkpoint.read_header(file)["by_timestep"]["body"] == list(BOUNDS)
    checkpoint.save(loaded, tmp_path / "again", HEADER)
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_other_files_do_not_mention_it(tmp_path: Path) -> None:
    checkpoint.save(only(0), tmp_path / "q", HEADER)
    assert "by_timestep" not in checkpoint.read_header(tmp_path / "q")


def test_cost_is_all_forms_in_memory_and_one_in_operations() -> None:
    call = tiny.calls(tiny.network(), 1)[0]
    inputs = (call.x, call.t, call.context, call.struct)
    one, two = count(only(0), *inputs), count(quantized(), *inputs)
    assert sum(layer.weights for layer in two.layers if layer.quantized) == 2 * sum(
        layer.weights for layer in one.layers if layer.quantized
    )
    assert sum(layer.macs for layer in two.layers) == sum(layer.macs for layer in one.layers)


def test_refusals() -> None:
    with pytest.raises(QuantError, match=r"body: 2 forms do not fit the rising timesteps \[5, 3\]"):
        ByTimestep([torch.nn.Identity()] * 2, (5, 3), "body")
    with pytest.raises(QuantError, match="body: its form depends on the timestep, and none was set"):
        ByTimestep([torch.nn.Identity()] * 2, (3, 5), "body")(torch.zeros(1))
    with pytest.raises(QuantError, match=r"groups of timesteps need one timestep a call, found \[1, 2\]"):
        row_of(torch.tensor([1, 2]), (5,))
