"""Intervals, the sign-flip test and what it could show: by hand, by tables, by another library and by simulation."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from qvsr import statistics
from qvsr.statistics import Interval, adjusted, detectable, interval, paired, sign_flip

T_975 = {1: 12.706, 3: 3.182, 7: 2.365, 18: 2.101}  # two-sided 5 % points of Student's t, as printed in textbooks


@pytest.mark.parametrize("freedom", sorted(T_975))
def test_below_20_clips_the_interval_is_student_s(freedom: int) -> None:
    values = list(np.random.default_rng(freedom).normal(25, 2, freedom + 1))
    found = interval(values)
    half = T_975[freedom] * np.std(values, ddof=1) / math.sqrt(freedom + 1)
    assert found.kind == "t"
    assert (found.low, found.high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), rel=1e-4)  # the table's digits


def test_from_20_clips_on_the_interval_is_bca() -> None:
    """By the definition (Efron 1987), with resamples of our own: the mean of skewed values, where the percentiles alone differ."""
    values = np.random.default_rng(5).lognormal(0, 1, 25)
    found = interval(list(values))
    assert found.kind == "bca"
    means = np.random.default_rng(6).choice(values, (200_000, 25)).mean(1)
    normal = scipy.stats.norm
    z0 = normal.ppf((means < values.mean()).mean())
    without = np.array([np.delete(values, i).mean() for i in range(25)])
    skew = without.mean() - without
    a = (skew**3).sum() / (6 * (skew**2).sum() ** 1.5)
    ends = [normal.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in normal.ppf((0.025, 0.975))]
    assert (found.low, found.high) == pytest.approx(np.quantile(means, ends), abs=0.03)  # the spread of quantiles over 9999 resamples
    plain = np.quantile(means, (0.025, 0.975))
    assert found.low is not None and found.high is not None
    assert found.low - plain[0] > 0.05 and found.high - plain[1] > 0.1, "the case must tell BCa from percentiles"


def test_the_interval_does_not_depend_on_the_order() -> None:
    values = list(np.random.default_rng(0).normal(size=24))
    assert interval(random.Random(1).sample(values, 24)) == interval(values)


def test_no_interval_and_the_fallback() -> None:
    assert interval([]) == interval([24.1]) == interval([24.1, math.inf]) == Interval(None, None, "")
    assert interval([2.0] * 3) == interval([2.0] * 25) == Interval(2.0, 2.0, "t")  # nothing to resample: Student's, and it says so
    assert interval([2.0] * 24 + [3.0]).kind == "bca"


def test_nineteen_of_twenty_intervals_hold_the_mean() -> None:
    generator = np.random.default_rng(11)
    held = [one.low <= 3 <= one.high for one in (interval(list(generator.normal(3, 1, 8))) for _ in range(600))]  # type: ignore[operator]
    assert np.mean(held) == pytest.approx(0.95, abs=0.03)  # three standard errors of 600 draws


def test_sign_flip_by_hand() -> None:
    """All eight patterns of three differences written out."""
    differences = [0.5, 0.3, -0.1]
    sums = [0.5 * a + 0.3 * b - 0.1 * c for a, b, c in itertools.product((1, -1), repeat=3)]
    as_far = [abs(one) >= 0.7 - 1e-9 for one in sums]
    assert sum(as_far) == 4  # ±0.7 and ±0.9
    assert sign_flip(differences) == 0.5
    assert sign_flip([0.1, 0.2, 0.3]) == 0.25 == sign_flip([-0.1, -0.2, -0.3])
    assert sign_flip([0.0, 0.0, 0.0]) == 1.0 == sign_flip([5.0])
    assert sign_flip([]) is None and sign_flip([1.0, math.inf]) is None


@pytest.mark.parametrize("clips", [4, 9, 12])
def test_sign_flip_is_scipy_s_permutation_test(clips: int) -> None:
    differences = np.random.default_rng(clips).normal(0.4, 1, clips)
    expected = scipy.stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip(list(differences)) == pytest.approx(expected, abs=1e-12)


def test_rounded_differences_that_tie_count_as_ties() -> None:
    """0.1 + 0.2 - 0.3 is not 0 in floating point; as whole numbers nothing is rounded."""
    whole = [1, 2, 3, -1, -2, 4]
    assert sign_flip([one / 10 for one in whole]) == sign_flip([float(one) for one in whole])


def test_the_smallest_p_and_the_fewest_clips() -> None:
    for clips in range(1, 21):
        assert sign_flip([1.0 + i for i in range(clips)]) == 2 / 2**clips
    fewest = next(clips for clips in range(1, 21) if 2 / 2**clips < statistics.ALPHA)
    assert fewest == statistics.FEWEST == 6


def test_above_20_clips_the_draws_come_close_to_the_exact_p() -> None:
    differences = list(np.random.default_rng(3).normal(0.3, 1, 20))
    exact = sign_flip(differences)
    drawn = sign_flip([*differences, 0.0])  # a difference of 0 changes no sum: the same p
    assert exact is not None and 0.02 < exact < 0.6
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / statistics.RESAMPLES)) and drawn != exact
    assert drawn == sign_flip([0.0, *reversed(differences)])
    assert sign_flip([1.0] * 30) == 1 / (statistics.RESAMPLES + 1)  # never 0


def test_adjusted_by_hand() -> None:
    """Benjamini and Hochberg's own example (1995, section 4): four of fifteen are below 0.05 after the adjustment."""
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0000]
    found = adjusted(p)
    assert found[:4] == pytest.approx([15 * 0.0001, 15 / 2 * 0.0004, 15 / 3 * 0.0019, 15 / 4 * 0.0095])
    assert sum(one < 0.05 for one in found) == 4  # type: ignore[operator]
    assert adjusted([None, 0.02, None]) == [None, 0.02, None] and adjusted([None]) == [None] and adjusted([]) == []


def test_the_smallest_detectable_difference_of_the_tables() -> None:
    """Cohen's tables (1988) in the form of G*Power: a paired t-test finds d = 0.5 with 34 pairs, d = 0.8 with 15, two-sided 5 %, power 80 %."""
    for effect, pairs in ((0.5, 34), (0.8, 15)):
        assert detectable(pairs, 1.0) <= effect < detectable(pairs - 1, 1.0)
    assert detectable(34, 3.0) == pytest.approx(3 * detectable(34, 1.0))
    assert detectable(8, 0.0) == 0.0
    assert [detectable(clips, 1.0) for clips in (1, 4, 5)] == [math.inf] * 3 and detectable(6, 1.0) < 2


@pytest.mark.parametrize("clips", [6, 7, 8, 12])
def test_the_sign_flip_test_finds_that_difference_about_as_often(clips: int) -> None:
    generator = np.random.default_rng(2)
    shift = detectable(clips, 1.0)
    found = [sign_flip(list(generator.normal(shift, 1, clips))) < 0.05 for _ in range(1000)]  # type: ignore[operator]
    assert 0.72 < np.mean(found) < 0.84  # 0.76 of 7 clips, 0.80 of 6; 0.013 is the standard error


def test_a_paired_comparison_is_of_the_differences() -> None:
    first, second = [20.0, 30.0, 25.0, 22.0], [20.5, 30.4, 25.7, 22.4]
    found = paired(first, second)
    expected = scipy.stats.ttest_rel(second, first).confidence_interval(0.95)
    assert found.difference == pytest.approx(0.5) and found.clips == 4
    assert (found.within.low, found.within.high) == pytest.approx((expected.low, expected.high))
    assert found.p == 0.125 and found.detectable == math.inf
    reverse = paired(second, first)
    assert reverse.difference == pytest.approx(-0.5) and reverse.p == 0.125


def test_a_missing_or_infinite_value_leaves_nothing_to_compare() -> None:
    for second in ([1.0, None], [1.0, math.inf]):
        assert paired([1.0, 2.0], second) == statistics.Paired(None, Interval(), None, None, 2)
    assert paired([math.inf], [math.inf]).difference is None
    one = paired([1.0], [3.0])
    assert (one.difference, one.within.low, one.detectable, one.p) == (2.0, None, None, 1.0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=9), st.floats(0.001, 1000))
def test_a_test_knows_neither_order_nor_unit_nor_direction(differences: list[float], unit: float) -> None:
    p = sign_flip(differences)
    assert p == sign_flip(differences[::-1]) == sign_flip([-one for one in differences])
    if all(one == 0 or abs(one) > 1e-6 for one in differences):
        assert p == sign_flip([unit * one for one in differences])
