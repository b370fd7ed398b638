"""The file of a quantized network: the same outputs to the bit, a size that shows the bits, and refusals by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from qvsr.quant import apply, checkpoint
from qvsr.quant.checkpoint import CheckpointError
from qvsr.quant.layer import LayerPlan, QuantLayer, halves

HEADER = {"method": "test", "bits": "W4A4", "backbone": "tiny", "settings": {"a": 1}}
EXCLUDE = ("time_embed.0", "head", "out")


def quantized(bits: int = 4, width: int = 16, **options: object) -> tiny.Net:
    net = tiny.network(width)
    static = bool(options.pop("static", False))
    fields = {key: options[key] for key in ("act_granularity", "weight_symmetric", "act_symmetric") if key in options}

    def make(name: str, module: torch.nn.Module) -> QuantLayer:
        parts = halves(module.weight.shape[1])
        layer = QuantLayer.from_float(
            module, LayerPlan(bits, bits, parts, bool(options.get("rotate", True)), int(options.get("rank", 3)), **fields), name
        )  # type: ignore[call-overload]
        if static:
            layer.set_static_activations(
                torch.full((2, len(parts)), -2.0), torch.tensor([[2.0], [3.0]]).expand(2, len(parts)), timesteps=[150, 999]
            )
        return layer

    apply.quantize_layers(net, EXCLUDE, make)
    apply.freeze(net)
    apply.follow_timesteps(net)
    return net


@pytest.mark.parametrize("bits", range(2, 9))
def test_same_output_to_the_bit(tmp_path: Path, bits: int) -> None:
    net = quantized(bits)
    call = tiny.calls(tiny.network(), 1)[0]
    expected = tiny.run(net, call)
    checkpoint.save(net, tmp_path / "q.safetensors", HEADER)
    loaded = checkpoint.load(tmp_path / "q.safetensors", tiny.network())
    assert torch.equal(tiny.run(loaded, call), expected)
    for name, layer in apply.quant_layers(net).items():
        again = apply.quant_layers(loaded)[name]
        assert again.describe() == layer.describe()
        assert all(torch.equal(tensor, again.state()[role]) for role, tensor in layer.state().items())


@pytest.mark.parametrize(
    "options",
    [
        {"static": True},
        {"rotate": False},
        {"rank": 0},
        {"act_granularity": "frame"},
        {"act_granularity": "token", "act_symmetric": True, "weight_symmetric": True},
    ],
    ids=str,
)
def test_every_field_comes_back(tmp_path: Path, options: dict[str, object]) -> None:
    net = quantized(**options)
    checkpoint.save(net, tmp_path / "q.safetensors", HEADER)
    loaded = checkpoint.load(tmp_path / "q.safetensors", tiny.network())
    for call in tiny.calls(tiny.network(), 3):
        assert torch.equal(tiny.run(loaded, call), tiny.run(net, call))


def test_chosen_integers_come_back(tmp_path: Path) -> None:
    net = tiny.network()

    def make(name: str, module: torch.nn.Module) -> QuantLayer:
        layer = QuantLayer.from_float(module, LayerPlan(4, 4), name)
        layer.set_integers(15 - layer.integers())
        return layer

    chosen = {name: layer.integers() for name, layer in apply.quantize_layers(net, EXCLUDE, make).items()}
    apply.freeze(net)
    checkpoint.save(net, tmp_path / "q.safetensors", HEADER)
    loaded = apply.quant_layers(checkpoint.load(tmp_path / "q.safetensors", tiny.network()))
    assert all(torch.equal(loaded[name].integers(), integers) for name, integers in chosen.items())


def test_a_checkpoint_from_before_the_granularity_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = quantized()
    full = QuantLayer.describe
    new = ("act_granularity", "act_granularity_used", "weight_symmetric", "act_symmetric", "offset")
    monkeypatch.setattr(QuantLayer, "describe", lambda self: {key: value for key, value in full(self).items() if key not in new})
    checkpoint.save(net, tmp_path / "q.safetensors", HEADER)
    monkeypatch.undo()
    loaded = checkpoint.load(tmp_path / "q.safetensors", tiny.network())
    call = tiny.calls(tiny.network(), 1)[0]
    assert torch.equal(tiny.run(loaded, call), tiny.run(net, call))


def test_given_rotations_smoothing_and_offsets_come_back(tmp_path: Path) -> None:
    net = tiny.network()
    generator = torch.Generator().manual_seed(0)

    def make(name: str, module: torch.nn.Module) -> QuantLayer:
        k = module.weight.shape[1]
        matrix = torch.linalg.qr(torch.randn(k, k, generator=generator))[0]
        smooth, offset = torch.rand(k, generator=generator) + 0.5, torch.randn(k, generator=generator)
        return QuantLayer.from_float(module, LayerPlan(6, 6), name, rotations=[matrix], smooth=smooth, offset=offset)

    apply.quantize_layers(net, EXCLUDE, make)
    apply.freeze(net)
    checkpoint.save(net, tmp_path / "q.safetensors", HEADER)
    loaded = checkpoint.load(tmp_path / "q.safetensors", tiny.network())
    call = tiny.calls(tiny.network(), 1)[0]
    assert torch.equal(tiny.run(loaded, call), tiny.run(net, call))


def test_open_layers_are_saved_as_they_would_be_frozen(tmp_path: Path) -> None:
    net = tiny.network()
    apply.quantize_layers(net, EXCLUDE, lambda n, m: QuantLayer.from_float(m, LayerPlan(4, 4, rank=2), n))
    checkpoint.save(net, tmp_path / "open.safetensors", HEADER)
    apply.freeze(net)
    checkpoint.save(net, tmp_path / "frozen.safetensors", HEADER)
    assert (tmp_path / "open.safetensors").read_bytes() == (tmp_path / "frozen.safetensors").read_bytes()


def test_same_bytes_twice_and_facts_in_the_header(tmp_path: Path) -> None:
    for name in ("a", "b"):
        net = quantized()
        apply.note(net, losses={"x": 1.5})
        checkpoint.save(net, tmp_path / name, HEADER)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    header = checkpoint.read_header(tmp_path / "a")
    assert header["settings"] == {"a": 1} and header["losses"] == {"x": 1.5} and header["layers"]["body"]["rank"] == 3
    assert apply.record(checkpoint.load(tmp_path / "a", tiny.network()))["losses"] == {"x": 1.5}


def test_size_shows_the_bits(tmp_path: Path) -> None:
    sizes = {}
    for bits in (4, 6, 8):
        net = quantized(bits, width=64, rank=0)
        checkpoint.save(net, tmp_path / f"{bits}", HEADER)
        sizes[bits] = (tmp_path / f"{bits}").stat().st_size
    weights = sum(layer.integers().numel() for layer in apply.quant_layers(net).values())
    assert sizes[8] - sizes[6] == pytest.approx(weights * 2 / 8, rel=0.01)
    assert sizes[6] - sizes[4] == pytest.approx(weights * 2 / 8, rel=0.01)
    assert sizes[4] < weights * 4 / 8 * 1.2  # scales, zero points, header


def test_other_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "q.safetensors"
    checkpoint.save(quantized(), file, HEADER)
    for other in (tiny.network(seed=1), tiny.network(width=32)):
        with pytest.raises(CheckpointError, match=r"q\.safetensors was made from other weights of backbone tiny"):
            checkpoint.load(file, other)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "q.safetensors"
    checkpoint.save(quantized(), file, HEADER)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"q\.safetensors is damaged"):
        checkpoint.load(file, tiny.network())
    file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(CheckpointError, match=r"q\.safetensors is damaged \(its content is not what was written\)"):
        checkpoint.load(file, tiny.network())
    with pytest.raises(CheckpointError, match=r"no quantized checkpoint .*absent"):
        checkpoint.read_header(tmp_path / "absent")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="other is no quantized checkpoint of qvsr"):
        checkpoint.read_header(tmp_path / "other")


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the network has no quantized layer"):
        checkpoint.save(tiny.network(), tmp_path / "q", HEADER)
    with pytest.raises(CheckpointError, match="the header must name backbone"):
        checkpoint.save(quantized(), tmp_path / "q", {"method": "m", "bits": "W4A4"})
    assert not list(tmp_path.iterdir())
