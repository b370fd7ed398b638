"""What every method must do, checked on two small networks: ours and those of other packages.

    python -m tests.baselines.conformance NAME ['{"key": value}']     from the root of this repository, one line a check
    conformance.check("NAME", {"key": value})                         in a test

A method that passes decides every layer, is nearly full precision at 16 bits, gives the same bytes twice and the same output from its file,
computes what its integers say, and has settings that refuse what they do not know. Each check is a function of the method's name and its
settings and fails with an AssertionError that says what was found.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from qvsr import plan
from qvsr.config import Config, ConfigError, QuantSpec, UNetSettings
from qvsr.kernels.packing import unpack
from qvsr.quant import apply, checkpoint
from qvsr.quant.by_timestep import ByTimestep, row_of
from qvsr.quant.layer import EXECUTIONS, QuantLayer
from qvsr.quant.rotation import rotation_from_signs
from qvsr.registry import BASELINES, load_plugin, plugins
from tests.qvsr.quant import tiny

BITS = 4  # of all checks but that against full precision
NEAR_DB = 60.0
CONFIG = {
    "datasets": {"clips": {"kind": "folder", "path": "a"}, "calibration": {"kind": "folder", "path": "b"}},
    "evaluate": ["clips"],
    "metrics": ["psnr"],
}
EXCLUDE = {"net": ("time_embed.0", "head", "out"), "unet": tiny.UNET_EXCLUDE}
# One level with everything that the U-Net has: residual blocks, attention, temporal layers, skip connections
UNET = UNetSettings(
    model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(2,), num_head_channels=32, context_dim=8,
    semb_channels=8, spade_channels=8,
)  # fmt: skip


def network(kind: str) -> nn.Module:
    """Full precision: `net` has eight layers of all kinds, `unet` is the real class with few layers."""
    return tiny.network() if kind == "net" else tiny.initialised(UNET)


@cache
def calls(kind: str) -> list[tiny.Call]:
    """Recorded calls of the full-precision network, all at different timesteps."""
    net = network(kind)
    if isinstance(net, tiny.Net):
        return tiny.calls(net, 3)
    generator, made = torch.Generator().manual_seed(1), []
    for k in range(3):
        struct = {str(size): torch.randn(5, 8, size, size, generator=generator) for size in (4, 8)}
        x, context = torch.randn(5, 4, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
        made.append(tiny.Call(x, torch.tensor([300 * k]), context, struct))
        made[-1].out = tiny.run(net, made[-1])
    return made


def resolved(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The method's whole settings, as the workflow resolves and checks them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "conformance.yaml"
        file.write_text(json.dumps({**CONFIG, "methods": [name], "method": {name: settings} if settings else {}}))
        config = plan.resolve([file], {})
    if name in plugins():
        return config.plugin_settings(name, BASELINES[name].facts.get("settings"))
    own = config.resolve_method(name)[1]
    return {} if own is None else own.model_dump(mode="json")


def quantized(name: str, settings: Mapping[str, Any], kind: str = "net", bits: int = BITS, seed: int = 0) -> nn.Module:
    """A network quantized by a method; `seed` is of torch's own generator, on which nothing may depend."""
    spec = QuantSpec(method=name, weight_bits=bits, act_bits=bits, exclude=EXCLUDE[kind], settings=resolved(name, settings))  # type: ignore[arg-type]
    net, samples = network(kind), calls(kind)
    torch.manual_seed(seed)
    done: nn.Module = BASELINES[name](net, samples, spec)
    return done


@cache
def _kept(name: str, settings: str, kind: str) -> nn.Module:
    return quantized(name, json.loads(settings), kind)


def made(name: str, settings: Mapping[str, Any], kind: str = "net") -> nn.Module:
    """:func:`quantized`, made once for all checks."""
    return _kept(name, json.dumps(settings, sort_keys=True), kind)


# ---- the checks ------------------------------------------------------------------------------------------------------


def every_layer_is_decided(name: str, settings: Mapping[str, Any]) -> None:
    """Each quantizable layer is a frozen QuantLayer, or several by timestep; each excluded one is as it was."""
    for kind in ("net", "unet"):
        original, net = network(kind), made(name, settings, kind)
        layers = apply.quantizable(original)
        chosen = apply.quantizable(original, EXCLUDE[kind])
        for layer, module in layers.items():
            found = net.get_submodule(layer)
            if layer in chosen:
                forms = list(found.rows) if isinstance(found, ByTimestep) else [found]
                for form in forms:
                    assert isinstance(form, QuantLayer), f"{name}: {layer} is a {type(form).__name__}, not quantized; it is not excluded"
                    assert not form.is_open, f"{name}: {layer} still holds its floating-point weight; call qvsr.quant.apply.freeze"
            else:
                assert type(found) is type(module), f"{name}: {layer} is excluded and became a {type(found).__name__}"
                for key, value in module.state_dict().items():
                    assert torch.equal(found.state_dict()[key], value), f"{name}: {layer}.{key} is excluded and has changed"


def near_full_precision_at_16_bits(name: str, settings: Mapping[str, Any]) -> None:
    """The output on the recorded calls is within 60 dB: what is left of a method without its rounding must be the network itself."""
    for kind in ("net", "unet"):
        net = quantized(name, settings, kind, bits=16)
        for index, call in enumerate(calls(kind)):
            found = float(-10 * torch.log10(torch.tensor(tiny.relative_error(tiny.run(net, call), call.out))))
            assert found >= NEAR_DB, (
                f"{name}: at 16 bits call {index} of {kind} is {found:.1f} dB from full precision, {NEAR_DB:g} are needed"
            )


def deterministic(name: str, settings: Mapping[str, Any]) -> None:
    """Two runs write the same bytes, whatever the state of torch's own generator."""
    files = [_bytes(name, made(name, settings)), _bytes(name, quantized(name, settings, seed=1))]
    assert files[0] == files[1], f"{name}: two runs give different checkpoints; draw from spec.seed only"


def survives_the_checkpoint(name: str, settings: Mapping[str, Any]) -> None:
    """A network read from its file gives the same output bits: nothing that matters is outside of the quantized layers."""
    for kind in ("net", "unet"):
        net = made(name, settings, kind)
        with tempfile.TemporaryDirectory() as folder:
            loaded = checkpoint.load(_saved(name, net, Path(folder)), network(kind))
        for call in calls(kind):
            assert torch.equal(tiny.run(loaded, call), tiny.run(net, call)), f"{name}: the network from the file gives another output"


def executions_agree(name: str, settings: Mapping[str, Any]) -> None:
    """Every execution of every layer gives what the integers, scales and zero points of the file say (:class:`Reference`, float64)."""
    for kind in ("net", "unet"):
        original = network(kind)
        with tempfile.TemporaryDirectory() as folder:
            file = _saved(name, made(name, settings, kind), Path(folder))
            references, net = references_of(file, original), checkpoint.load(file, network(kind))
        for execution in EXECUTIONS:
            apply.set_execution(net, execution)
            for call in calls(kind):
                for layer, (x, y) in _seen(net, call).items():
                    expected, unsure = references[layer](x, int(call.t))
                    # float32 sums beside exact ones; the rest is inputs so near to a half that float32 may round them either way
                    beyond = float(((y - expected).abs() - unsure - 2e-5 * expected.abs().max()).max())
                    assert beyond <= 0, f"{name}: {layer} ({execution}) is {beyond:.2g} off what its integers say"


def bad_settings_are_refused(name: str, settings: Mapping[str, Any]) -> None:
    """A setting that there is not, and one of the wrong type, is one line that names the method and the key."""
    owner: Any = (
        BASELINES[name].facts.get("settings") if name in plugins() else type(getattr(Config.model_fields["method"].default, name, None))
    )
    keys = list(owner.model_fields) if isinstance(owner, type) and hasattr(owner, "model_fields") else []
    for key in ("no_such_setting", *keys):
        try:
            resolved(name, {key: {"a value": "of no type"}})
        except ConfigError as error:
            text = str(error)
            named = f"method.{name}" in text and (key in text or not keys)  # without any settings the method itself is what is not known
            assert named and "\n" not in text, f"{name}: the refusal of {key} does not name it: {text}"
        else:
            raise AssertionError(f"{name}: the setting {key} takes {{'a value': 'of no type'}}; give it a type, and forbid unknown keys")


CHECKS = (
    every_layer_is_decided,
    near_full_precision_at_16_bits,
    deterministic,
    survives_the_checkpoint,
    executions_agree,
    bad_settings_are_refused,
)


def check(name: str, settings: Mapping[str, Any] | None = None) -> None:
    """All checks of one method; an installed package's is loaded.

    Args:
        settings: as below `method.NAME` in a configuration; counts as small as they can be keep it quick.
    """
    load_plugin(name)
    for one in CHECKS:
        one(name, settings or {})


# ---- a layer by its file ---------------------------------------------------------------------------------------------


class Reference:
    """A layer computed in float64 from what the checkpoint holds: integer sums, which float64 has exactly, then the scales.

    Args:
        module: the full-precision layer; only its stride, padding and dilation are read.
        facts, state: of the layer, from the file.
    """

    ROLES = {
        "weight", "scale", "zero_point", "up", "down", "bias", "smooth", "signs", "act_scale", "act_zero_point", "act_clip", "offset", "offset_taps",
    }  # fmt: skip

    def __init__(self, name: str, module: nn.Module, facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        unknown = {role for role in state if role not in self.ROLES and not role.startswith("rotation.")}
        assert not unknown, f"{name}: its checkpoint holds {unknown}, which the reference does not know yet: teach it"
        self.module, self.facts, self.parts = module, facts, facts["parts"]
        shape = facts["shape"]
        self.linear = facts["kind"] == "Linear"
        self.weight = unpack(state["weight"], facts["weight_bits"], int(np.prod(shape))).view(shape).double()
        self.values = {role: tensor.double() for role, tensor in state.items() if role not in ("weight", "signs")}
        self.rotations: list[Tensor | None] = [self.values.get(f"rotation.{part}") for part in range(len(self.parts))]
        if "signs" in state:
            bits = np.unpackbits(state["signs"].numpy(), count=shape[1], bitorder="little").astype(np.int8)
            signs = torch.from_numpy(bits * 2 - 1).split(self.parts)
            self.rotations = [
                rotation_from_signs(one, torch.float64) if rotated else None for one, rotated in zip(signs, facts["rotated"], strict=True)
            ]

    def __call__(self, x: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """The output, and by how much it may differ because an input lies so near to a half that float32 rounds it the other way."""
        x = x.double()
        axis = -1 if self.linear else 1
        if "offset" in self.values:
            x = x - self._along(self.values["offset"], axis, x.dim())
        if "smooth" in self.values:
            x = x / self._along(self.values["smooth"], axis, x.dim())
        y = unsure = torch.zeros(())
        for part, piece in enumerate(x.split(self.parts, axis)):
            rotation = self.rotations[part]
            if rotation is not None:
                piece = piece @ rotation if self.linear else torch.einsum("dc,bc...->bd...", rotation, piece)
            scale, zero_point = self._grid(piece, part, timestep)
            top = 2 ** self.facts["act_bits"] - 1
            q = (torch.round(piece / scale) + zero_point).clamp(0, top)
            near = ((piece / scale) % 1 - 0.5).abs() < 4e-6 * top  # float32 keeps 6e-8 of the largest; sums before it lose more
            weight = self.weight.split(self.parts, 1)[part] - self._along(self.values["zero_point"][:, part], 0, self.weight.dim())
            factor = self._at_outputs(scale) * self._along(self.values["scale"][:, part], axis, x.dim())
            y = y + factor * self._product(q - zero_point, weight)
            unsure = unsure + factor * self._product(near.double(), weight.abs())
        if "up" in self.values:
            thin = self._product(x, self.values["down"])
            y = y + (thin @ self.values["up"].T if self.linear else torch.einsum("nr,br...->bn...", self.values["up"], thin))
        if "offset_taps" in self.values:  # one channel of ones: at a zero-padded border fewer taps see the offset
            ones = x.new_ones(1) if self.linear else x.new_ones(1, 1, *x.shape[2:])
            y = y + self._product(ones, self.values["offset_taps"])
        if "bias" in self.values:
            bias = self.values["bias"]
            row = bias[row_of(timestep, self.facts["bias_timesteps"])] if bias.dim() == 2 else bias
            y = y + self._along(row, axis, x.dim())
        return y, unsure

    def _grid(self, piece: Tensor, part: int, timestep: int) -> tuple[Tensor, Tensor]:
        if self.facts["activations"] == "static":
            row = row_of(timestep, self.facts["act_timesteps"]) if self.facts["act_timesteps"] else 0
            return self.values["act_scale"][row, part], self.values["act_zero_point"][row, part]
        everything = tuple(range(piece.dim()))
        shared = {"tensor": everything, "frame": everything[1:], "token": (-1 if self.linear else 1,)}[self.facts["act_granularity_used"]]
        factor = self.values["act_clip"][part] if "act_clip" in self.values else 1.0
        low, high = piece.amin(shared, keepdim=True) * factor, piece.amax(shared, keepdim=True) * factor
        levels = 2 ** self.facts["act_bits"] - 1
        if self.facts["act_symmetric"]:  # the largest magnitude on the outermost positive of 2^b levels around the middle
            scale = (torch.maximum(high, -low) / (levels // 2)).clamp_min(self.facts["scale_floor"])
            return scale, torch.full_like(scale, (levels + 1) // 2)
        scale = ((high - low) / levels).clamp_min(self.facts["scale_floor"])
        return scale, torch.round(-low / scale)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.linear:
            return x @ weight.T
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
        module: Any = self.module
        return convolve(x, weight, None, module.stride, module.padding, module.dilation)

    def _at_outputs(self, scale: Tensor) -> Tensor:
        """Scales of pixels, which only 1x1 kernels have, at the pixels that a stride leaves."""
        if self.linear or scale.dim() == 0 or scale[0].numel() == 1:
            return scale
        module: Any = self.module
        return scale[(..., *(slice(None, None, step) for step in module.stride))]

    @staticmethod
    def _along(values: Tensor, axis: int, dims: int) -> Tensor:
        shape = [1] * dims
        shape[axis] = -1
        return values.view(shape)


def references_of(file: Path, original: nn.Module) -> dict[str, Reference]:
    """The layers of a checkpoint by name; a layer with forms by timestep has one a form."""
    tensors, facts = load_file(file), checkpoint.read_header(file)["layers"]
    states: dict[str, dict[str, Tensor]] = {name: {} for name in facts}
    for key, tensor in tensors.items():
        name = max((one for one in facts if key.startswith(one + ".")), key=len)
        states[name][key.removeprefix(name + ".")] = tensor
    return {name: Reference(name, original.get_submodule(name.split(".rows.")[0]), facts[name], states[name]) for name in facts}


def _seen(net: nn.Module, call: tiny.Call) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of the quantized layers in one call, each layer's first."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            found.setdefault(name, (args[0].clone(), out.double()))

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in apply.quant_layers(net).items()]
    try:
        tiny.run(net, call)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _saved(name: str, net: nn.Module, folder: Path) -> Path:
    checkpoint.save(net, folder / "checkpoint.safetensors", {"method": name, "bits": f"W{BITS}A{BITS}", "backbone": "tiny"})
    return folder / "checkpoint.safetensors"


def _bytes(name: str, net: nn.Module) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return _saved(name, net, Path(folder)).read_bytes()


def main(name: str, settings: str = "{}") -> None:
    """Print each check with what it found; exit 1 if one fails."""
    import baselines  # noqa: F401  (fills the registry)

    try:
        load_plugin(name)
        BASELINES[name], resolved(name, json.loads(settings))
    except ValueError as error:
        sys.exit(f"error: {error}")
    failed = 0
    for one in CHECKS:
        try:
            one(name, json.loads(settings))
            print(f"passed  {one.__name__}")
        except AssertionError as error:
            failed += 1
            print(f"FAILED  {one.__name__}: {error}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("error: python -m tests.baselines.conformance NAME ['{\"key\": value}']")
    main(*sys.argv[1:])
