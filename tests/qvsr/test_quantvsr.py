"""QuantVSR's stages, each alone and all together."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "quant"))
import tiny

from qvsr.method_settings import QuantVSRSettings
from qvsr.quant import apply, checkpoint
from qvsr.quant.layer import QuantError
from qvsr.quantvsr import allocate_ranks, complexity, layer_ranks, measure_complexity, quantvsr

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


def test_ranks_are_limited_by_the_layer() -> None:
    net = tiny.network()
    layers = apply.quantizable(net, EXCLUDE)
    ranks, limited = layer_ranks(layers, None, QuantVSRSettings())
    assert limited == 0 and set(ranks.values()) == {16}
    ranks, limited = layer_ranks(layers, None, QuantVSRSettings(rank_min=24))
    assert ranks["body"] == 16 and ranks["tokens"] == 24 and limited == 3


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
