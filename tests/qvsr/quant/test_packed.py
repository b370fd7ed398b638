"""Packed execution of a layer and of networks against simulated: the same integers, so the same numbers up to float32 sums."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

from qvsr.config import load
from qvsr.kernels import native, ops
from qvsr.kernels.packing import row_bytes
from qvsr.models.checkpoints import load_backbone
from qvsr.quant import apply, checkpoint
from qvsr.quant.cost import example_inputs
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer, Timestep, halves

CLOSE = 1e-5  # relative; float32 sums of some hundred products are off by 1e-7, a value that rounds differently by 1e-3 and more
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 10), (3, 5, 24)),
    "linear, odd": (lambda: nn.Linear(13, 1, bias=False), (7, 13)),
    "linear, one input": (lambda: nn.Linear(1, 6), (4, 1)),
    "conv1d": (lambda: nn.Conv1d(24, 10, 3, stride=2, padding=2, dilation=2), (2, 24, 15)),
    "conv2d": (lambda: nn.Conv2d(24, 10, 3, padding=1), (2, 24, 6, 5)),
    "conv2d 1x1": (lambda: nn.Conv2d(24, 10, 1, stride=(1, 2)), (2, 24, 6, 5)),
    "conv2d strided": (lambda: nn.Conv2d(24, 10, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 24, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(24, 10, (3, 1, 1), padding=(1, 0, 0)), (1, 24, 5, 3, 4)),
    "conv3d, all": (lambda: nn.Conv3d(24, 10, (3, 2, 3), (1, 2, 1), (1, 0, 2), (1, 1, 2)), (2, 24, 5, 5, 6)),
}
each_module = pytest.mark.parametrize("name", MODULES)


@pytest.fixture(params=["our own", "int_mm"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both products of a CPU."""
    if request.param == "int_mm":
        monkeypatch.setattr(native, "engine", lambda: 0)
    elif not native.engine():
        pytest.skip(f"there is no product of our own here: {native.missing()}")
    return request.param


def module_and_input(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    return make().requires_grad_(False), torch.randn(shape) + 0.3


def off(layer: QuantLayer, x: Tensor) -> float:
    """Relative difference of packed from simulated, of whatever layout the input has; the layer stays packed."""
    layer.set_execution("simulated")
    expected = layer(x)
    layer.set_execution("packed")
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim() if layer.geometry.kernel else 0)
    found = [layer(x)] if last is None else [layer(x), layer(x.to(memory_format=last))]
    assert all(one.shape == expected.shape for one in found)
    return max(float((one - expected).norm() / expected.norm().clamp_min(1e-30)) for one in found)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@each_module
@pytest.mark.parametrize("granularity", ["tensor", "frame", "token"])
@pytest.mark.parametrize("bits", [(4, 4), (6, 6), (8, 8), (3, 7), (8, 16)])
def test_packed_is_simulated(name: str, granularity: str, bits: tuple[int, int], product: str) -> None:
    module, x = module_and_input(name)
    channels = x.shape[-1] if isinstance(module, nn.Linear) else x.shape[1]
    cuts = ((), (channels // 3, channels - channels // 3)) if channels > 1 else ((),)
    for parts, rotate, rank, symmetric in itertools.product(cuts, (False, True), (0, 1), (False, True)):
        plan = LayerPlan(*bits, parts, rotate, rank, act_granularity=granularity, act_symmetric=symmetric, weight_symmetric=symmetric)
        layer = QuantLayer.from_float(module, plan, name)
        layer.freeze()
        assert off(layer, x) <= CLOSE, plan


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("bits", [4, 8])
def test_offset_smoothing_clips_and_tables_by_timestep(name: str, bits: int, product: str) -> None:
    module, x = module_and_input(name)
    generator = torch.Generator().manual_seed(1)
    smooth, offset = torch.rand(24, generator=generator) + 0.5, torch.randn(24, generator=generator)
    plan = LayerPlan(bits, bits, halves(24), rotate=True, rank=3)
    clipped = QuantLayer.from_float(module, plan, name, smooth=smooth, offset=offset)
    clipped.set_activation_clip(torch.tensor([0.7, 0.9]))
    table = QuantLayer.from_float(module, plan, name, smooth=smooth, offset=offset)
    table.set_static_activations(torch.tensor([[-1.0, -2.0], [-3.0, 0.5]]), torch.tensor([[1.0, 1.5], [3.0, 2.0]]), timesteps=[100, 999])
    table.start_correction([100, 999]).data.copy_(torch.randn(2, 10, generator=generator))
    table.fold_correction()
    for layer in (clipped, table):
        layer.freeze()
    assert off(clipped, x) <= CLOSE
    outputs = []
    for timestep in (50, 500):
        table.timestep = Timestep(timestep)
        assert off(table, x) <= CLOSE
        outputs.append(table(x))
    assert not torch.allclose(*outputs)
    table.timestep = Timestep()
    with pytest.raises(QuantError, match="ranges depend on the timestep, and none was set"):
        table(x)


EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "all zero": lambda x: 0 * x,
    "constant": lambda x: 0 * x + 5,
    "constant, large": lambda x: 0 * x + 3e5,
    "one outlier": lambda x: x.flatten().index_fill(0, torch.tensor(3), 1e4).view(x.shape),
    "below the smallest scale": lambda x: 1e-6 * x,
    "far from zero": lambda x: x + 1000,
    "all positive": lambda x: x.abs() + 0.1,
}


@pytest.mark.parametrize("name", ["linear", "linear, odd", "linear, one input", "conv2d", "conv2d strided", "conv3d"])
@pytest.mark.parametrize("values", EXTREMES)
def test_extreme_inputs(name: str, values: str, product: str) -> None:
    module, x = module_and_input(name)
    x = EXTREMES[values](x)
    for bits, granularity in itertools.product((4, 8), ("tensor", "frame")):
        layer = QuantLayer.from_float(module, LayerPlan(bits, bits, act_granularity=granularity), name)
        layer.freeze()
        assert off(layer, x) <= CLOSE


@each_module
def test_an_empty_batch_is_an_empty_output(name: str) -> None:
    module, x = module_and_input(name)
    layer = QuantLayer.from_float(module, LayerPlan(4, 4, rank=1), name)
    layer.freeze()
    layer.set_execution("packed")
    assert layer(x[:0]).shape == module(x[:0]).shape


def test_a_packed_layer_holds_its_bits_and_nothing_more() -> None:
    layer = QuantLayer.from_float(nn.Conv2d(24, 10, 3, padding=1), LayerPlan(4, 4, halves(24), rotate=True))
    layer.freeze()
    before = {role: tensor.clone() for role, tensor in layer.state().items()}
    layer.set_execution("packed")
    assert layer.weight_q is None and layer.weight_packed.numel() == 10 * row_bytes(24 * 9, 4) == 10 * 24 * 9 // 2
    assert all(torch.equal(tensor, before[role]) for role, tensor in layer.state().items())
    again = copy.deepcopy(layer)
    layer.set_execution("simulated")
    assert layer.weight_packed is None and torch.equal(layer.weight_q, before["weight"])
    x = torch.randn(1, 24, 5, 4)
    assert again.execution == "packed" and off(again, x) <= CLOSE


def test_what_packed_execution_refuses() -> None:
    net = tiny.network()
    layers = apply.quantize_layers(net, (), lambda name, module: QuantLayer.from_float(module, LayerPlan(4, 4), name))
    layers["body"].freeze()
    with pytest.raises(QuantError, match=r"time_embed.0: it is open, packed execution needs its integers; freeze it first"):
        apply.set_execution(net, "packed")
    assert {layer.execution for layer in layers.values()} == {"simulated"}
    with pytest.raises(QuantError, match="no execution 'paked'; did you mean packed"):
        apply.set_execution(net, "paked")
    with pytest.raises(QuantError, match="body: no execution 'fast'"):
        layers["body"].set_execution("fast")
    apply.freeze(net)
    apply.set_execution(net, "packed")
    with torch.enable_grad(), pytest.raises(QuantError, match="body: packed execution has no gradients"):
        layers["body"](torch.randn(1, 16, 4, 4, requires_grad=True))
    with pytest.raises(ValueError, match="quantize_activation: x is float64, float32 or bfloat16 is needed"):
        layers["body"](torch.randn(1, 16, 4, 4).double())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_is_the_same_from_packed_and_runs_packed(bits: int, tmp_path: Path) -> None:
    net, header = tiny.network(), {"method": "test", "bits": f"W{bits}A{bits}", "backbone": "tiny"}
    plan = LayerPlan(bits, bits, rotate=True, rank=1)
    apply.quantize_layers(net, ("time_embed.0",), lambda name, module: QuantLayer.from_float(module, plan, name))
    apply.freeze(net)
    checkpoint.save(net, tmp_path / "simulated.safetensors", header)
    apply.set_execution(net, "packed")
    checkpoint.save(net, tmp_path / "packed.safetensors", header)
    assert (tmp_path / "simulated.safetensors").read_bytes() == (tmp_path / "packed.safetensors").read_bytes()
    loaded = checkpoint.load(tmp_path / "packed.safetensors", tiny.network())
    apply.set_execution(loaded, "packed")
    for call in tiny.calls(tiny.network()):
        assert torch.equal(tiny.run(loaded, call), tiny.run(net, call))


def test_every_layer_of_the_small_u_net_on_its_own_input() -> None:
    """The layers' inputs in a simulated pass, given to both executions: to the last bit, if they lie in memory alike."""
    net, inputs = mini(4)
    seen: dict[str, Tensor] = {}
    layers = apply.quant_layers(net)
    hooks = [
        layer.register_forward_hook(lambda _layer, args, _out, name=name: seen.update({name: args[0].clone()}))
        for name, layer in layers.items()
    ]
    net(*inputs)
    for hook in hooks:
        hook.remove()
    assert set(seen) == set(layers)
    for name, layer in layers.items():
        expected = layer(seen[name])
        layer.set_execution("packed")
        assert torch.equal(layer(seen[name]), expected), name


@each_module
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_16_bits_give_the_same_bytes_packed_and_simulated(name: str, dtype: torch.dtype, product: str) -> None:
    """Both compute in float32 and round the result once; the branch's first layer sees bfloat16 as it is."""
    module, x = module_and_input(name)
    channels = x.shape[-1] if isinstance(module, nn.Linear) else x.shape[1]
    x = x.to(dtype)
    for bits, rank in itertools.product((4, 8), (0, 1)):
        plan = LayerPlan(bits, bits, (channels // 2, channels - channels // 2) if channels > 1 else (), rotate=True, rank=rank)
        layer = QuantLayer.from_float(module, plan, name)
        layer.freeze()
        expected, whole = layer(x), layer(x.float())
        if rank == 0 or dtype == torch.float16:
            assert torch.equal(expected, whole.to(dtype))
        assert expected.dtype == dtype and (expected - whole).norm() < 0.01 * whole.norm()
        layer.set_execution("packed")
        assert layer(x).dtype == dtype and torch.equal(layer(x), expected)


def test_a_packed_layer_s_result_is_made_in_the_input_s_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what computes it: nothing behind that reads float32 again."""
    found, direct = [], ops.direct

    def noted(name: str, x: Tensor, bits: int) -> Callable[..., Tensor]:
        function = direct(name, x, bits)
        return function if name == "quantize_activation" else lambda *arguments: found.append(function(*arguments)) or found[-1]

    monkeypatch.setattr(ops, "direct", noted)
    for name in ("linear", "conv2d"):
        module, x = module_and_input(name)
        layer = QuantLayer.from_float(module, LayerPlan(4, 4), name)
        layer.freeze()
        layer.set_execution("packed")
        y = layer(x.bfloat16())
        assert found[-1].dtype == torch.bfloat16 and found[-1].data_ptr() == y.data_ptr()
    assert len(found) == 2


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_small_u_net_gives_the_same_bytes_packed_and_simulated(bits: int) -> None:
    """Not only 60 dB: a float32 sum that is off in its last digit would round to another level in some layer and move everything behind it."""
    net, inputs = mini(bits)
    expected = net(*inputs)
    apply.set_execution(net, "packed")
    assert torch.equal(net(*inputs), expected)
    assert not torch.equal(net(inputs[0] * (1 + 1e-6), *inputs[1:]), expected), "the comparison would notice a difference"


def test_the_small_u_net_with_bfloat16_between_its_layers() -> None:
    """The same bytes packed and simulated; near float32, for what both round: a W8A8 network, as 4 bits amplify any difference."""
    net, inputs = mini(8)
    exact = net(*inputs)
    apply.set_precision(net, torch.bfloat16)
    expected = net(*inputs)
    apply.set_execution(net, "packed")
    found = net(*inputs)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.1
    assert {parameter.dtype for name, parameter in net.named_parameters() if name.startswith("out.0")} == {torch.bfloat16}


def mini(bits: int) -> tuple[nn.Module, tuple]:
    """The shipped network, quantized without calibration, and one call of it."""
    config = load(Path(__file__).parents[3] / "config" / "default.yaml")
    net = load_backbone(config.backbone).unet

    def make(name: str, module: nn.Module) -> QuantLayer:
        outputs, inputs = module.weight.shape[:2]
        return QuantLayer.from_float(module, LayerPlan(bits, bits, halves(inputs), rotate=True, rank=min(4, inputs, outputs)), name)

    apply.quantize_layers(net, config.method.exclude, make)
    apply.freeze(net)
    generator = torch.Generator().manual_seed(0)
    x, t, context, struct = example_inputs(config.backbone.unet, 16, config.backbone.context_tokens)
    struct = {width: 0.3 * torch.randn(maps.shape, generator=generator) for width, maps in struct.items()}
    return net, (torch.randn(x.shape, generator=generator), t + 500, torch.randn(context.shape, generator=generator), struct)


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv3d"])
def test_one_and_two_threads_give_the_same_bytes(name: str, product: str) -> None:
    """With rotation and branch, which are products in float32; here they do not depend on the threads either."""
    module, x = module_and_input(name)
    x = torch.cat([x] * 40, -1) if not isinstance(module, nn.Linear) else torch.cat([x] * 40, 0)
    layer = QuantLayer.from_float(module, LayerPlan(8, 8, halves(24), rotate=True, rank=3), name)
    layer.freeze()
    layer.set_execution("packed")
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outputs)
