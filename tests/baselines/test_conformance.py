"""Every registered method through the conformance kit; and the kit finds what it is there to find."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import baselines  # noqa: F401
from qvsr import plan
from qvsr.config import QuantSpec
from qvsr.quant import affine, apply
from qvsr.quant.layer import LayerPlan, QuantLayer
from qvsr.registry import BASELINES
from tests.baselines import conformance
from tests.qvsr.quant import tiny

# Counts so small that a method takes seconds; a method that is not listed has its defaults.
QUICK: dict[str, dict[str, Any]] = {
    "q_diffusion": {
        "samples": 3, "range_samples": 3, "batch": 1, "round_updates": 2, "round_learning_rate": 0.03, "step_updates": 2,
    },
    "quantvsr": {"rank_min": 2, "rank_max": 4, "rank_multiple": 2, "refine_updates": 2, "lba_updates": 2, "accumulate": 1},
    "svdquant": {"rank": 4, "samples": 1, "iterations": 1, "smooth": False},
    "efficientdm": {"rank": 2, "updates": 3, "range_samples": 3},
}  # fmt: skip
BEYOND = {
    "refine": False, "bias": "measured", "bias_by_step": True, "act_clip": True, "weight_ranges": "searched", "residual": "gptq",
}  # fmt: skip
MORE: list[tuple[str, dict[str, Any]]] = [
    ("quantvsr", {**{key: value for key, value in QUICK["quantvsr"].items() if key.startswith("rank")}, **BEYOND}),
    ("maxmin", {"activations": "static", "channel_split": True}),
    ("quarot", {"weights": "gptq", "granularity": "native", "gptq_rows": 50}),
    ("svdquant", {**QUICK["svdquant"], "granularity": "native", "group_size": 24}),
    ("vidit_q", {"granularity": "native", "timestep_bounds": [150, 1000]}),
]
# Ranges that are averaged, learned or narrowed cut off what exceeds them at any bits, and learning rates in units of the scales' own are no
# small steps at 16 bits: both are part of these methods.
CUTTING = {"passionsr", "efficientdm"}
CASES = [(name, QUICK.get(name, {})) for name in BASELINES if name != "full_precision"] + MORE


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    ("name", "settings"), CASES, ids=lambda one: one if isinstance(one, str) else "-".join(map(str, one.values())) or "default"
)
def test_method(name: str, settings: Mapping[str, Any], check: Callable[..., None]) -> None:
    cuts = settings.get("activations") == "static" or name in CUTTING
    if cuts and check is conformance.near_full_precision_at_16_bits:
        with pytest.raises(AssertionError, match="at 16 bits"):
            check(name, settings)
    else:
        check(name, settings)


# ---- the kit itself --------------------------------------------------------------------------------------------------


def nearest(unet: nn.Module, spec: QuantSpec, make: Callable[[str, nn.Module], nn.Module] | None = None) -> nn.Module:
    layer_plan = LayerPlan(spec.weight_bits, spec.act_bits)
    apply.quantize_layers(unet, spec.exclude, make or (lambda name, module: QuantLayer.from_float(module, layer_plan, name)))  # type: ignore[arg-type]
    apply.freeze(unet)
    return unet


def leaves_one_out(unet: nn.Module, _calls: Any, spec: QuantSpec) -> nn.Module:
    first = next(iter(apply.quantizable(unet, spec.exclude)))
    return nearest(unet, spec.model_copy(update={"exclude": (*spec.exclude, first)}))


def stays_open(unet: nn.Module, _calls: Any, spec: QuantSpec) -> nn.Module:
    layer_plan = LayerPlan(spec.weight_bits, spec.act_bits)
    apply.quantize_layers(unet, spec.exclude, lambda name, module: QuantLayer.from_float(module, layer_plan, name))
    return unet


def takes_an_excluded_one(unet: nn.Module, _calls: Any, spec: QuantSpec) -> nn.Module:
    return nearest(unet, spec.model_copy(update={"exclude": spec.exclude[:-1]}))


def cuts_ranges(unet: nn.Module, _calls: Any, spec: QuantSpec) -> nn.Module:
    """A tenth of every weight range is lost at any bits."""

    def make(name: str, module: nn.Module) -> QuantLayer:
        layer = QuantLayer.from_float(module, LayerPlan(spec.weight_bits, spec.act_bits), name)
        low, high = affine.channel_range(module.weight)  # type: ignore[arg-type]
        layer.set_weight_ranges([(0.9 * low, 0.9 * high)])
        return layer

    return nearest(unet, spec, make)


def draws_from_torch(unet: nn.Module, _calls: Any, spec: QuantSpec) -> nn.Module:
    with torch.no_grad():
        for module in apply.quantizable(unet, spec.exclude).values():
            module.weight.mul_(1 + 0.1 * torch.rand(()))  # type: ignore[operator,union-attr]
    return nearest(unet, spec)


def changes_an_excluded_bias(unet: nn.Module, _calls: Any, spec: QuantSpec) -> nn.Module:
    done = nearest(unet, spec)
    done.get_submodule(spec.exclude[0]).bias.data += 1  # type: ignore[operator,union-attr]
    return done


class Louder(QuantLayer):
    """Computes a thousandth more than its integers say, in the file's form too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.001 * super().forward(x)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Adds a method under the name `broken` for one test, as if a file declared it."""
    declared = plan.declared
    monkeypatch.setattr(
        plan, "declared", lambda package, registry: [*declared(package, registry), *(["broken"] if package == "baselines" else [])]
    )
    yield lambda function: BASELINES.add("broken")(function)
    BASELINES.entries.pop("broken", None)
    conformance._kept.cache_clear()


@pytest.mark.parametrize(
    ("method", "check", "message"),
    [
        (leaves_one_out, "every_layer_is_decided", "broken: time_embed.2 is a Linear, not quantized; it is not excluded"),
        (stays_open, "every_layer_is_decided", "broken: time_embed.2 still holds its floating-point weight"),
        (takes_an_excluded_one, "every_layer_is_decided", "broken: out is excluded and became a QuantLayer"),
        (changes_an_excluded_bias, "every_layer_is_decided", "broken: time_embed.0.bias is excluded and has changed"),
        (cuts_ranges, "near_full_precision_at_16_bits", r"broken: at 16 bits call 0 of net is \d\d.\d dB from full precision, 60 are needed"),
        (draws_from_torch, "deterministic", "broken: two runs give different checkpoints"),
        (changes_an_excluded_bias, "survives_the_checkpoint", "broken: the network from the file gives another output"),
    ],
)  # fmt: skip
def test_the_kit_finds(register: Callable[[Any], None], method: Any, check: str, message: str) -> None:
    register(method)
    with pytest.raises(AssertionError, match=message):
        getattr(conformance, check)("broken", {})


def test_the_kit_finds_an_execution_that_differs(register: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    register(lambda unet, _calls, spec: nearest(unet, spec))
    conformance.executions_agree("broken", {})
    monkeypatch.setattr("qvsr.quant.checkpoint.QuantLayer", Louder)
    with pytest.raises(AssertionError, match=r"broken: time_embed.2 \(simulated\) is .* off what its integers say"):
        conformance.executions_agree("broken", {})


def test_the_kit_finds_a_wrong_integer(tmp_path: Path) -> None:
    """One integer of one weight a level higher than in the file."""
    net = conformance.quantized("maxmin", {})
    references = conformance.references_of(conformance._saved("maxmin", net, tmp_path), conformance.network("net"))
    x, y = conformance._seen(net, conformance.calls("net")[0])["tokens"]
    expected, unsure = references["tokens"](x, 0)
    assert ((y - expected).abs() <= unsure + 2e-5 * expected.abs().max()).all()
    references["tokens"].weight[3, 5] += 1
    off, _ = references["tokens"](x, 0)
    assert ((y - off).abs() > unsure + 2e-5 * off.abs().max()).any()


def test_the_kit_finds_settings_that_take_anything(register: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    register(lambda unet, _calls, spec: nearest(unet, spec))
    conformance.bad_settings_are_refused("broken", {})
    monkeypatch.setattr(conformance, "resolved", lambda name, settings: dict(settings))
    with pytest.raises(AssertionError, match="broken: the setting no_such_setting takes"):
        conformance.bad_settings_are_refused("broken", {})


def test_the_networks_have_every_kind_of_layer() -> None:
    kinds = {type(module).__name__ for module in apply.quantizable(tiny.network(), conformance.EXCLUDE["net"]).values()}
    assert kinds == {"Linear", "Conv1d", "Conv2d", "Conv3d"}
    layers = apply.quantizable(conformance.network("unet"), conformance.EXCLUDE["unet"])
    assert any("skip_connection" in name for name in layers) and any("temporal" in name for name in layers)
