"""Bits under a budget against trying every choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qvsr.quant.allocate import allocate, within
from qvsr.quant.layer import QuantError


def brute_force(errors: np.ndarray, costs: np.ndarray, budgets: list[float]) -> float:
    """Least summed error of all choices that keep the budgets."""
    rows = np.arange(len(errors))
    every = itertools.product(range(errors.shape[1]), repeat=len(errors))
    return min(errors[rows, list(c)].sum() for c in every if (costs[:, rows, list(c)].sum(1) <= budgets).all())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kinds", [1, 2])
def test_the_best_of_all_choices(seed: int, kinds: int) -> None:
    rng = np.random.default_rng(seed)
    errors = rng.random((4, 1)) * 4.0 ** -np.array([3, 4, 5]) * rng.uniform(0.5, 2, (4, 3))
    costs = rng.integers(1, 1000, (kinds, 4, 1)) * np.array([3.0, 4.0, 5.0])
    budgets = [float(cost[:, 1].sum()) for cost in costs]  # all layers at the middle choice
    chosen = allocate(errors, costs, budgets)
    rows = np.arange(4)
    assert (costs[:, rows, chosen].sum(1) <= budgets).all()
    assert errors[rows, chosen].sum() == pytest.approx(brute_force(errors, costs, budgets), rel=1e-4)  # the solver's gap


def test_the_budget_is_kept_to_the_last_unit() -> None:
    """Layers of a million weights: the solver's tolerance of 1e-6 would be a weight's bits."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(10**5, 10**7, 60).astype(float)
    bits = np.array([2.0, 3.0, 4.0, 5.0, 6.0])
    errors = rng.lognormal(0, 3, (60, 1)) * 4.0**-bits
    budget = float(sizes.sum() * 4)
    chosen = allocate(errors, (sizes[:, None] * bits)[None], [budget])
    spent = float((sizes * bits[chosen]).sum())
    assert 0.999 * budget < spent <= budget
    assert errors[np.arange(60), chosen].sum() < 0.7 * errors[:, 2].sum(), "no better than the same bits everywhere"


def test_choices_beyond_a_budget_are_lowered_where_it_costs_least() -> None:
    errors, costs = np.array([[2.0, 1.0], [9.0, 1.0]]), np.array([[[3.0, 4.0], [3.0, 4.0]]])
    assert within([1, 1], errors, costs, np.array([7.0])) == [0, 1]
    assert within([1, 1], errors, costs, np.array([8.0])) == [1, 1]


def test_what_cannot_be_allocated() -> None:
    costs = np.array([[[3.0, 4.0], [3.0, 4.0]]])
    with pytest.raises(QuantError, match=r"the budgets \[5.0\] cannot be met, the cheapest choices cost \[6.0\]"):
        allocate(np.ones((2, 2)), costs, [5])
    with pytest.raises(QuantError, match="an error is not finite"):
        allocate(np.full((2, 2), np.nan), costs, [8])
