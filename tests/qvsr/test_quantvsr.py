"""QuantVSR's stages, each alone and all together."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "quant"))
import tiny

from qvsr.config import ScheduleSettings, load
from qvsr.method_settings import QuantVSRSettings
from qvsr.models.unet import InflatedUNet
from qvsr.quant import apply, checkpoint, low_rank
from qvsr.quant.cost import _fact
from qvsr.quant.layer import LayerPlan, QuantError, QuantLayer
from qvsr.quant.search import weight_range
from qvsr.quantvsr import (
    Build,
    Few,
    align_bias,
    allocate_ranks,
    bias_bounds,
    complexity,
    layer_ranks,
    measure_complexity,
    quantvsr,
    sample_weights,
    search_weight_ranges,
)

SMALL = {"rank_min": 2, "rank_max": 8, "rank_multiple": 2, "refine_updates": 20, "lba_updates": 10, "accumulate": 1}
EXCLUDE = ("time_embed.0", "head", "out")


def test_complexity_in_float64() -> None:
    x = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    array = x.double().numpy()
    spatial, temporal = complexity(x)
    assert spatial.item() == pytest.approx(array.reshape(5, 3, -1).std(-1, ddof=1).mean(), rel=1e-5)
    assert temporal.item() == pytest.approx((np.diff(array, axis=0) ** 2).mean(), rel=1e-5)
    folded = complexity(x.transpose(0, 1)[None], temporal_conv=True)
    assert folded[0].item() == pytest.approx(spatial.item()) and folded[1].item() == pytest.approx(temporal.item())


def test_complexity_of_what_does_not_vary() -> None:
    assert complexity(torch.ones(5, 3, 4, 4)) == (0, 0)
    assert complexity(torch.randn(1, 3))[1] == 0 and complexity(torch.randn(1, 3))[0] == 0


def naive_ranks(spatial: np.ndarray, temporal: np.ndarray, s: QuantVSRSettings) -> list[int]:
    """The rule as the paper's card says it, one layer and sample at a time."""
    low_s, high_s = np.quantile(spatial.ravel(), [s.quantile, 1 - s.quantile])
    low_t, high_t = np.quantile(temporal.ravel(), [s.quantile, 1 - s.quantile])
    ranks = []
    for row_s, row_t in zip(spatial, temporal, strict=True):
        rank = s.rank_min
        for c_s, c_t in zip(row_s, row_t, strict=True):
            rank += 1 if c_s >= high_s and c_t >= high_t else -1 if c_s <= low_s and c_t <= low_t else 0
        rank = min(max(rank, s.rank_min), s.rank_max)
        ranks.append((rank + s.rank_multiple // 2) // s.rank_multiple * s.rank_multiple)
    return ranks


@pytest.mark.parametrize("seed", range(3))
def test_ranks_against_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    level = rng.random((12, 1)) * 2
    spatial, temporal = (rng.random((12, 40)) + level for _ in range(2))
    settings = QuantVSRSettings(rank_min=8, rank_max=32, rank_multiple=4, quantile=0.3)
    found = allocate_ranks(torch.from_numpy(spatial), torch.from_numpy(temporal), settings).tolist()
    assert found == naive_ranks(spatial, temporal, settings) and len(set(found)) > 1


def test_a_rank_above_the_layers_limit_is_refused_or_lowered() -> None:
    net = tiny.network()
    layers = apply.quantizable(net, EXCLUDE)
    ranks, limited = layer_ranks(layers, None, QuantVSRSettings())
    assert limited == 0 and set(ranks.values()) == {16}
    ranks, limited = layer_ranks(layers, None, QuantVSRSettings(rank_min=24, limit_ranks=True))
    assert ranks["body"] == 16 and ranks["tokens"] == 24 and limited == 3
    message = r"time_embed.2: rank 24 is above 16, the limit of its weight \(so it is for 3 layers\): lower method.quantvsr.rank_min 24, or set .*limit_ranks"
    with pytest.raises(QuantError, match=message):
        layer_ranks(layers, None, QuantVSRSettings(rank_min=24))


def test_the_default_configuration_needs_no_limit_of_ranks() -> None:
    """Its largest rank is one that every quantized layer of the small model can have."""
    config = load("config/default.yaml")
    with torch.device("meta"):
        unet = InflatedUNet(config.backbone.unet)
    layers = apply.quantizable(unet, config.method.exclude)
    assert min(low_rank.rank_limit(module.weight) for module in layers.values()) >= config.method.quantvsr.rank_max  # type: ignore[arg-type]


def test_a_rank_that_rounds_to_nothing_is_refused() -> None:
    with pytest.raises(QuantError, match="rank_min 2 rounds to 0 with rank_multiple 8"):
        allocate_ranks(torch.rand(3, 4), torch.rand(3, 4), QuantVSRSettings(rank_min=2))


def test_embedding_layers_are_not_measured() -> None:
    net = tiny.network()
    measured = measure_complexity(net, apply.quantizable(net, EXCLUDE), tiny.calls(net))
    assert "time_embed.2" not in measured.names and measured.spatial_LS.shape == (len(measured.names), 4)
    assert (measured.temporal_LS > 0).all()


@pytest.mark.parametrize(
    "change",
    [{}, {"branch": False}, {"stca": False}, {"refine": False}, {"lba": False}, {"rotation": False}, {"channel_split": False}],
    ids=str,
)
def test_every_part_can_be_switched(change: dict[str, bool], tmp_path: Path) -> None:
    net = tiny.network()
    calls = tiny.calls(net)
    quantized = quantvsr(net, calls, tiny.spec("quantvsr", **{**SMALL, **change}))
    layers, losses = apply.quant_layers(quantized), apply.record(quantized)["losses"]
    assert set(layers) == set(apply.quantizable(tiny.network(), EXCLUDE)) and not any(layer.is_open for layer in layers.values())
    assert any(layer.rank for layer in layers.values()) == change.get("branch", True)
    assert any(any(layer.rotated) for layer in layers.values()) == change.get("rotation", True)
    assert (len(layers["body"].parts) == 2) == change.get("channel_split", True)
    assert (layers["tokens"].bias is not None) == change.get("lba", True), "a layer without bias gets one from the alignment"
    assert set(losses) == {
        *(["refine_branches"] if change.get("refine", True) and change.get("branch", True) else []),
        *(["align_bias"] if change.get("lba", True) else []),
    }
    if not change.get("stca", True):
        assert {layer.rank for layer in layers.values()} == {SMALL["rank_min"]}
    checkpoint.save(quantized, tmp_path / "q", {"method": "quantvsr", "bits": "W4A4", "backbone": "tiny"})
    loaded = checkpoint.load(tmp_path / "q", tiny.network())
    assert torch.equal(tiny.run(loaded, calls[0]), tiny.run(quantized, calls[0]))


def test_stages_lower_the_loss_one_after_the_other() -> None:
    net = tiny.network()
    quantized = quantvsr(net, tiny.calls(net), tiny.spec("quantvsr", **{**SMALL, "refine_updates": 60, "lba_updates": 40}))
    losses = apply.record(quantized)["losses"]
    refine, bias = losses["refine_branches"], losses["align_bias"]
    assert refine["after"] < refine["before"] and bias["after"] < bias["before"] == pytest.approx(refine["after"], rel=1e-4)


def test_better_than_rounding_at_equal_bits_on_other_calls() -> None:
    """On calls that were not calibrated on."""
    import baselines.maxmin

    errors = {}
    for method, settings in ((quantvsr, SMALL), (baselines.maxmin.maxmin, {})):
        net = tiny.network()
        calls, others = tiny.calls(net), tiny.calls(net, seed=9)
        quantized = method(net, calls, tiny.spec(method.__name__, **settings))
        errors[method.__name__] = sum(tiny.relative_error(tiny.run(quantized, call), call.out) for call in others)
    assert errors["quantvsr"] < errors["maxmin"]


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(len(name))
        net = tiny.network()
        checkpoint.save(
            quantvsr(net, tiny.calls(net), tiny.spec("quantvsr", **SMALL)),
            tmp_path / name,
            {"method": "m", "bits": "W4A4", "backbone": "tiny"},
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_empty_calibration_set() -> None:
    with pytest.raises(QuantError, match="quantvsr: the calibration set is empty"):
        quantvsr(tiny.network(), [], tiny.spec("quantvsr", **SMALL))


# ---------------------------------------------------------------- beyond the paper

UNTRAINED = {**SMALL, "refine": False, "lba": False}


def output_error(bits: tuple[int, int] = (4, 4), **settings: object) -> float:
    """Relative squared error on calls that were not calibrated on."""
    net = tiny.network()
    calls, others = tiny.calls(net, 6), tiny.calls(net, 4, seed=9)
    quantized = quantvsr(net, calls, tiny.spec("quantvsr", *bits, **settings))
    return sum(tiny.relative_error(tiny.run(quantized, call), call.out) for call in others)


@pytest.mark.parametrize(
    "change",
    [
        {"act_clip": True},
        {"residual": "gptq"},
        {"mixed": "both"},
        {"lba": True, "bias": "measured"},
        {"act_clip": True, "weight_ranges": "searched", "residual": "gptq", "mixed": "both", "lba": True, "bias": "measured"},
    ],
    ids=lambda change: "+".join(change),
)
def test_a_switch_lowers_the_error(change: dict[str, object]) -> None:
    assert output_error(**{**UNTRAINED, **change}) < 0.97 * output_error(**UNTRAINED)


@pytest.mark.parametrize(
    "change",
    [
        {"act_clip": True, "weight_ranges": "searched", "refresh_ranges": True, "residual": "gptq", "stca_search": True, "mixed": "both"},
        {"bias_by_step": True},
        {"bias_by_step": True, "bias": "measured", "mixed": "weights", "residual": "gptq"},
    ],
    ids=lambda change: "+".join(change),
)
def test_a_checkpoint_keeps_every_switch(change: dict[str, object], tmp_path: Path) -> None:
    net = tiny.network()
    calls = tiny.calls(net)
    quantized = quantvsr(net, calls, tiny.spec("quantvsr", **{**SMALL, **change}))
    checkpoint.save(quantized, tmp_path / "q", {"method": "quantvsr", "bits": "W4A4", "backbone": "tiny"})
    loaded = checkpoint.load(tmp_path / "q", tiny.network())
    for call in calls:
        assert torch.equal(tiny.run(loaded, call), tiny.run(quantized, call))
    layer = apply.quant_layers(loaded)["body"]
    assert (layer.act_clip is not None) == change.get("act_clip", False)
    assert layer.bias is not None and (layer.bias.dim() == 2) == change.get("bias_by_step", False)
    assert apply.record(loaded)["trained_params"] > 0


def test_trained_parameters_are_counted() -> None:
    net = tiny.network()
    quantized = quantvsr(net, tiny.calls(net), tiny.spec("quantvsr", **SMALL))
    layers = apply.quant_layers(quantized).values()
    expected = sum(layer.up.numel() + layer.down.numel() + layer.geometry.out_channels for layer in layers)  # type: ignore[union-attr]
    assert apply.record(quantized)["trained_params"] == expected
    net = tiny.network()
    assert apply.record(quantvsr(net, tiny.calls(net), tiny.spec("quantvsr", **UNTRAINED)))["trained_params"] == 0


@pytest.mark.parametrize(("kind", "budget"), [("weights", "bits"), ("activations", "bits"), ("both", "bits"), ("both", "operations")])
def test_mixed_bits_keep_the_budget(kind: str, budget: str) -> None:
    """Average bits over weights, and over multiply-accumulates; what the factors take is taken off the weights' budget."""
    net = tiny.network()
    calls = tiny.calls(net)
    positions = {}
    handles = [
        module.register_forward_hook(lambda m, _a, y, name=name: positions.update({name: y.numel() // m.weight.shape[0]}))
        for name, module in apply.quantizable(net, EXCLUDE).items()
    ]
    tiny.run(net, calls[0])
    for handle in handles:
        handle.remove()
    plain = quantvsr(tiny.network(), calls, tiny.spec("quantvsr", **UNTRAINED))
    quantized = quantvsr(net, calls, tiny.spec("quantvsr", **{**UNTRAINED, "mixed": kind, "mixed_budget": budget, "act_clip": True}))
    layers = apply.quant_layers(quantized)

    def stored(network: torch.nn.Module) -> int:
        facts = [_fact(name, layer, 1, 1) for name, layer in apply.quant_layers(network).items()]
        return sum(fact.weights * fact.weight_bits + fact.side_bits + 32 * (fact.bias + fact.branch_params) for fact in facts)

    macs = {name: layer.integers().numel() * positions[name] for name, layer in layers.items()}
    assert sum(macs[name] * layer.act_bits for name, layer in layers.items()) <= 4 * sum(macs.values())
    if budget == "operations":
        assert sum(macs[name] * max(layer.weight_bits, layer.act_bits) for name, layer in layers.items()) <= 4 * sum(macs.values())
    if kind != "activations":
        assert stored(quantized) <= stored(plain)
    assert (len({layer.weight_bits for layer in layers.values()}) > 1) == (kind != "activations")
    assert (len({layer.act_bits for layer in layers.values()}) > 1) == (kind != "weights")


def test_layers_without_effect_pay_or_keep_their_bits() -> None:
    for idle, expected in (("free", 2), ("nominal", 4)):
        net = tiny.network()
        net.tokens.weight.zero_()  # its output is 0 whatever its input is; its weight's rounding is none
        net.line.weight[:, :] = 0  # so nothing before it matters
        calls = tiny.calls(net)
        quantized = quantvsr(net, calls, tiny.spec("quantvsr", **{**UNTRAINED, "branch": False, "mixed": "weights", "mixed_idle": idle}))
        assert apply.quant_layers(quantized)["tokens"].weight_bits == expected


def test_refreshed_ranges_cut_nothing_off() -> None:
    """When the branch moves, frozen ranges leave values of the residual outside; ranges that follow it do not."""
    outside = {}
    for refresh in (False, True):
        torch.manual_seed(0)
        layer = QuantLayer.from_float(torch.nn.Linear(16, 8), LayerPlan(4, 8, (8, 8), rotate=True, rank=4))
        layer.refresh_ranges = refresh
        assert layer.up is not None
        layer.up.data *= 0.1  # the residual gets what the branch gives up
        layer.up.requires_grad_(True)
        with torch.enable_grad():
            layer(torch.randn(3, 16)).sum().backward()
        weight, scale, zero = layer.rounding()
        low, high = -(zero + 0.5) * scale, (15 - zero + 0.5) * scale  # what half a step beyond the outermost levels is rounded to them
        outside[refresh] = int(((weight < low - 1e-6) | (weight > high + 1e-6)).sum())
    assert outside[True] == 0 < outside[False]


def test_searched_weight_ranges_are_kept_as_factors() -> None:
    torch.manual_seed(0)
    layer = QuantLayer.from_float(torch.nn.Linear(32, 6), LayerPlan(3, 4, (16, 16), rank=2))
    parts = layer.rounding()[0].split(16, 1)
    search_weight_ranges(layer)
    for part, piece in enumerate(parts):
        low, high = weight_range(piece, 3)
        torch.testing.assert_close(layer.weight_scale[:, part], ((high - low) / 7)[:, 0], rtol=1e-5, atol=1e-7)
    layer.weight, layer.up, layer.down = 2 * layer.rounding()[0], None, None
    layer._rotated_weight, before = None, layer.weight_scale
    layer.refresh_weight_ranges()
    torch.testing.assert_close(layer.weight_scale, 2 * before)


def test_searched_thresholds_keep_the_branch_budget() -> None:
    net = tiny.network()
    calls = tiny.calls(net, 8)
    settings = {**UNTRAINED, "stca_search": True}
    spec = tiny.spec("quantvsr", **settings)
    build = Build(net, calls, spec, QuantVSRSettings.model_validate(spec.settings))
    measured = measure_complexity(net, build.modules, calls)
    published, _ = layer_ranks(build.modules, measured, build.settings)
    found = build.ranks()
    tried = build.facts["stca_thresholds"]["tried"]
    assert "0.25 0.75" in tried and build.branch_params(found) <= build.branch_params(published)
    low, high = build.facts["stca_thresholds"]["chosen"]
    assert tried[f"{low:g} {high:g}"] == min(tried.values())
    assert found == layer_ranks(build.modules, measured, build.settings, (low, high))[0]


def test_weights_of_samples_by_the_schedule() -> None:
    """A perturbed output moves the clean latent, and the next one, by the weights' roots."""
    from qvsr.models.schedule import Schedule

    net = tiny.network()
    calls = tiny.calls(net, 4)
    for call, t in zip(calls, (0, 222, 444, 888), strict=True):
        call.t = torch.tensor([t])
    for kind in ("eps", "v"):
        schedule = ScheduleSettings(parameterization=kind)
        process = Schedule(schedule).for_sampling(10)
        x, noise = torch.randn(2, 1, 4, 4, 4)
        moved = {"x0": [], "latent": []}
        for call in calls:
            at = process.timesteps.index(int(call.t))
            shift = process.predict_x0(x, noise + 1, at) - process.predict_x0(x, noise, at)
            moved["x0"].append(float(shift.square().mean()))
            moved["latent"].append(float((process.posterior_mean(x + shift, x, at) - process.posterior_mean(x, x, at)).square().mean()))
        for name, expected in moved.items():
            weights = sample_weights(calls, name, schedule, 10)
            mean = sum(expected) / 4
            assert weights == pytest.approx([value / mean for value in expected], rel=1e-3)
    assert sample_weights(calls, "equal", None, None) is None
    with pytest.raises(QuantError, match="loss_weight 'x0' needs the noise schedule and the sampling steps"):
        quantvsr(net, calls, tiny.spec("quantvsr", **{**SMALL, "loss_weight": "x0"}))


def test_a_sample_of_weight_zero_is_not_trained_on() -> None:
    """Its output may be anything: neither the loss nor the trained corrections change."""
    corrections = []
    for spoilt in (0.0, 100.0):
        net = tiny.network()
        calls = tiny.calls(net)
        calls[0].out = calls[0].out + spoilt
        apply.quantize_layers(net, EXCLUDE, lambda name, module: QuantLayer.from_float(module, LayerPlan(4, 4), name))
        settings = QuantVSRSettings.model_validate(SMALL)
        layers = apply.quant_layers(net).values()
        curve, _ = align_bias(net, calls, settings, 0, [0.0, 1.0, 1.0, 2.0])
        corrections.append((curve.before, curve.after, torch.cat([layer.bias for layer in layers])))
    assert corrections[0][:2] == corrections[1][:2] and torch.equal(corrections[0][2], corrections[1][2])


def test_evenly_spaced_samples_and_rows() -> None:
    calls = tiny.calls(tiny.network(), 5)  # timesteps 0, 100, … 400
    few = Few(calls, 3, [0.0, 1.0, 2.0, 3.0, 4.0])
    assert [int(few[k].t) for k in range(len(few))] == [0, 200, 400] and few.weights == [0.0, 2.0, 4.0]
    assert bias_bounds(calls) == (50, 150, 250, 350, 400)


def test_a_bias_by_step_needs_the_alignment() -> None:
    with pytest.raises(ValueError, match="bias_by_step is the bias alignment's, and lba is false"):
        QuantVSRSettings(bias_by_step=True, lba=False)
