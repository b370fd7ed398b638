"""Which settings make a method a reduced one."""

from __future__ import annotations

import pytest

from qvsr.config import load
from qvsr.method_settings import MethodSettings, QDiffusionSettings, QuantVSRSettings, SVDQuantSettings, reduced
from qvsr.provenance import ROOT
from qvsr.settings import Settings


def test_nothing_is_reduced_by_default() -> None:
    methods = [value for _, value in MethodSettings() if isinstance(value, Settings)]
    assert len(methods) >= 6 and not any(reduced(one) for one in methods)


def test_only_work_counts_and_only_less_of_it() -> None:
    assert reduced(SVDQuantSettings(rank=8, samples=256, iterations=99, group_size=4)) == {"rank": (8, 32), "iterations": (99, 100)}
    assert reduced(QDiffusionSettings(range_values=100, step_updates=0)) == {"range_values": (100, None), "step_updates": (0, 5000)}


@pytest.mark.parametrize(
    ("switches", "found"),
    [
        ({}, {"rank_min", "rank_max", "refine_updates", "lba_updates", "accumulate"}),
        ({"stca": False}, {"rank_min", "refine_updates", "lba_updates", "accumulate"}),
        ({"lba": False}, {"rank_min", "rank_max", "refine_updates", "accumulate"}),
        ({"branch": False}, {"lba_updates", "accumulate"}),
        ({"branch": False, "lba": False}, set()),
    ],
)
def test_what_a_switch_leaves_without_a_reader_does_not_count(switches: dict[str, bool], found: set[str]) -> None:
    less = {"rank_min": 4, "rank_max": 16, "refine_updates": 60, "lba_updates": 40, "accumulate": 1}
    assert set(reduced(QuantVSRSettings(**less, **switches))) == found


def test_the_small_model_runs_reduced_methods() -> None:
    method = load(ROOT / "config" / "default.yaml").method
    found = {name for name, value in method if isinstance(value, Settings) and reduced(value)}
    assert found >= {"efficientdm", "passionsr", "q_diffusion", "quantvsr", "svdquant"} and not found & {"maxmin", "quarot", "vidit_q"}
