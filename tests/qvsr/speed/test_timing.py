"""Rounds, medians and means, against numpy and a clock of our own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qvsr.speed.timing import Times, alternate, decibels, weighted_geometric_mean


class Clock:
    """A clock that only the work moves."""

    def __init__(self) -> None:
        self.now, self.called = 0.0, ""

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """Takes so long the first, second, … time and ever after."""
        left = list(seconds)

        def run() -> None:
            self.called += name
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_rounds_alternate_and_the_first_is_not_counted() -> None:
    clock = Clock()
    times = alternate({"a": clock.work("a", 100, 1, 2, 3), "b": clock.work("b", 50, 10)}, seconds=0, least=3, clock=clock)
    assert clock.called == "ab" + "ab" + "ba" + "ab"
    assert times == {"a": Times(2, 1.5, 2.5, 3), "b": Times(10, 10, 10, 3)}


@pytest.mark.parametrize(("seconds", "least", "most", "rounds"), [(0, 2, 9, 2), (35, 1, 9, 4), (1000, 1, 6, 6)])
def test_how_many_rounds(seconds: float, least: int, most: int, rounds: int) -> None:
    """A round takes 10 s: they begin until the seconds are over, but not fewer than `least` and not more than `most`."""
    clock = Clock()
    times = alternate({"a": clock.work("a", 10)}, seconds, least, most, clock)
    assert times["a"].rounds == rounds and clock.called == "a" * (rounds + 1)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_quartiles_are_numpy_s(count: int) -> None:
    values = np.random.default_rng(count).uniform(1, 2, count)
    found = Times.of(list(values))
    assert (found.q1, found.median, found.q3) == pytest.approx(tuple(np.percentile(values, [25, 50, 75])), rel=1e-12)
    assert found.rounds == count


def test_the_mean_is_geometric_and_weighted() -> None:
    ratios, weights = np.array([0.5, 4.0, 3.0]), np.array([1, 2, 5])
    expected = float(np.prod(ratios ** (weights / weights.sum())))
    assert weighted_geometric_mean(zip(ratios, weights, strict=True)) == pytest.approx(expected, rel=1e-12)
    assert weighted_geometric_mean([(0.5, 7), (2.0, 7)]) == pytest.approx(1)  # twice as slow and twice as fast


def test_no_error_has_no_decibels() -> None:
    assert decibels(None) is None and decibels(0.0) is None and decibels(10**-0.5) == pytest.approx(10)
