"""Bits layer by layer under a budget: the one choice a layer that makes the summed error least (mixed precision).

Errors of different layers are taken to add up, so the choice is a multiple-choice knapsack problem: a binary variable for each layer and choice,
one choice a layer, the cost of all choices at most the budget. :func:`scipy.optimize.milp` solves it to the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qvsr.quant.layer import QuantError

GAP = 1e-4  # relative distance to the optimum at which the solver may stop
SECONDS = 60.0  # after which the best found so far is taken


def allocate(errors_LB: NDArray[np.float64], costs_CLB: NDArray[np.float64], budgets_C: Sequence[float]) -> list[int]:
    """Choices of least summed error within budgets.

    Args:
        errors_LB: error of each of L layers with each of B choices.
        costs_CLB: C kinds of cost of the same.
        budgets_C: most that the costs of all layers may sum up to, a kind each.
    Returns:
        a choice for each layer.
    Raises:
        QuantError: errors that are not finite, or budgets below the cheapest choices.

    >>> errors, costs = np.array([[9.0, 1.0], [4.0, 2.0]]), np.array([[[3.0, 4.0], [3.0, 4.0]]])
    >>> allocate(errors, costs, [7]), allocate(errors, costs, [8])
    ([1, 0], [1, 1])
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix, kron, vstack

    layers, choices = errors_LB.shape
    if not np.isfinite(errors_LB).all():
        raise QuantError("allocation of bits: an error is not finite; are the calibration samples?")
    one_each = kron(np.eye(layers), np.ones((1, choices)))
    # costs and errors in units of their own size: the solver's tolerances are absolute
    budgets = np.asarray(budgets_C, dtype=np.float64)
    spent = csr_matrix(costs_CLB.reshape(len(budgets), -1) / budgets[:, None])
    found = milp(
        errors_LB.reshape(-1) / max(float(errors_LB.min(1).sum()), float(errors_LB.max()) * 1e-9, 1e-300),
        constraints=LinearConstraint(
            vstack([one_each, spent]), np.r_[np.ones(layers), np.zeros(len(budgets))], np.r_[np.ones(layers), np.ones(len(budgets))]
        ),
        integrality=np.ones(layers * choices),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if found.x is None:
        cheapest = costs_CLB.min(2).sum(1)
        raise QuantError(f"allocation of bits: the budgets {budgets.tolist()} cannot be met, the cheapest choices cost {cheapest.tolist()}")
    chosen: list[int] = found.x.reshape(layers, choices).argmax(1).tolist()
    return within(chosen, errors_LB, costs_CLB, budgets)


def within(chosen: list[int], errors_LB: NDArray[np.float64], costs_CLB: NDArray[np.float64], budgets: NDArray[np.float64]) -> list[int]:
    """The choices themselves if they keep the budgets to the last unit; the solver may exceed them by its tolerance of 1e-6."""
    layers = np.arange(len(chosen))
    while (costs_CLB[:, layers, chosen].sum(1) > budgets).any():
        over = int(np.argmax(costs_CLB[:, layers, chosen].sum(1) / budgets))
        lower = costs_CLB[over] < costs_CLB[over][layers, chosen][:, None]
        loss = np.where(lower, errors_LB - errors_LB[layers, chosen][:, None], np.inf)
        layer, choice = np.unravel_index(int(loss.argmin()), loss.shape)
        chosen[int(layer)] = int(choice)
    return chosen
