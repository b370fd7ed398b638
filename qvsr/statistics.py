"""What a few clips can say: the interval of a mean, a paired test, and the smallest difference that the clips could show.

The unit is the clip. Frames of a clip are not independent; clips are taken to be. Two methods are compared on the same clips, so that what
is tested is one difference a clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95  # of the intervals
BOOTSTRAP_FROM = 20  # clips; with fewer the bootstrap's intervals are too short, and Student's t is used
RESAMPLES = 9999  # of the bootstrap, and of the test where it is not exact
EXACT_UP_TO = 20  # clips; the test then looks at all 2^n signs
ALPHA = 0.05  # a p below it is marked
POWER = 0.8  # with which the smallest detectable difference is detected
FEWEST = 6  # clips, of which the exact test can give a p below ALPHA: 2 / 2^6 = 0.031, 2 / 2^5 = 0.063
NAMES = {"t": "Student-t", "bca": "BCa bootstrap"}


@dataclass(frozen=True)
class Interval:
    """Of a mean over clips.

    Attributes:
        low, high: None where there is no interval: fewer than two values, or an infinite one.
        kind: how it was made, a key of `NAMES`; empty where there is none.
    """

    low: float | None = None
    high: float | None = None
    kind: str = ""


def interval(values: Sequence[float]) -> Interval:
    """95 % interval of a mean: by Student's t below 20 values, from 20 on by the BCa bootstrap with a fixed seed.

    Values of which the bootstrap can make nothing (all are equal) get Student's interval, and `kind` says so. The order of the values does
    not matter.

    >>> one = interval([1.0, 2.0, 3.0])  # 2 -+ 4.3027 / sqrt(3)
    >>> round(one.low, 4), round(one.high, 4), one.kind
    (-0.4841, 4.4841, 't')
    >>> interval([0.5] * 30)
    Interval(low=0.5, high=0.5, kind='t')
    """
    n = len(values)
    if n < 2 or not all(math.isfinite(value) for value in values):
        return Interval()
    if n >= BOOTSTRAP_FROM and min(values) < max(values):
        import numpy as np
        from scipy.stats import bootstrap  # 0.5 s to import

        drawn = bootstrap(
            (sorted(values),), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="BCa", rng=np.random.default_rng(0)
        ).confidence_interval
        if math.isfinite(drawn.low) and math.isfinite(drawn.high):
            return Interval(float(drawn.low), float(drawn.high), "bca")
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return Interval(fmean(values) - half, fmean(values) + half, "t")


def sign_flip(differences: Sequence[float]) -> float | None:
    """Two-sided p of the paired sign-flip test: if two methods were alike, every difference might as well have the other sign.

    Args:
        differences: one a clip.
    Returns:
        The share of sign patterns whose sum is at least as far from 0 as the one observed: over all 2^n up to 20 differences, over 9999 drawn
        with a fixed seed (and the observed one) above. It is never below 2 / 2^n. None without differences or with one that is not finite.

    >>> sign_flip([1.0, 2.0, 4.0]), sign_flip([1.0, 2.0, -4.0])  # 2 of 8 patterns; all whose sum is 1 or more away from 0: 8 of 8
    (0.25, 1.0)
    """
    n = len(differences)
    if n == 0 or not all(math.isfinite(one) for one in differences):
        return None
    import numpy as np

    # sums of one pattern in another order differ in their last digits
    reached = abs(math.fsum(differences)) - 1e-12 * math.fsum(map(abs, differences))
    if n <= EXACT_UP_TO:
        sums = np.zeros(1)
        for one in differences:
            sums = np.concatenate([sums + one, sums - one])
        return float((np.abs(sums) >= reached).mean())
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (RESAMPLES, n))
    return float(((np.abs(signs @ np.array(sorted(differences))) >= reached).sum() + 1) / (RESAMPLES + 1))


def adjusted(p_values: Sequence[float | None]) -> list[float | None]:
    """p values after Benjamini and Hochberg: below 0.05, at most 5 % of the differences called so are expected to be none.

    Args:
        p_values: of one family of tests; None where there was no test.

    >>> [round(p, 3) if p is not None else None for p in adjusted([0.01, 0.04, None, 0.03])]  # 3/1 0.01, 3/3 0.04, 3/2 0.03
    [0.03, 0.04, None, 0.04]
    """
    tested = [p for p in p_values if p is not None]
    if not tested:
        return list(p_values)
    from scipy.stats import false_discovery_control

    corrected = iter(false_discovery_control(tested))
    return [None if p is None else float(next(corrected)) for p in p_values]


def detectable(clips: int, deviation: float) -> float:
    """Smallest true mean difference that so many clips show (two-sided, 5 %) in 80 % of all such comparisons.

    By the power of the paired t-test, which that of the sign-flip test comes close to (76 % for normal differences of 7 clips, 78 % of 8); of 6
    clips by its own, since all must then point the same way. For a single comparison, before any adjustment.

    Args:
        deviation: standard deviation of the paired differences.
    Returns:
        inf below 6 clips: the smallest p that the sign-flip test can then give is 2 / 2^n > 0.05, and no difference is large enough.

    >>> round(detectable(34, 1.0), 3), detectable(4, 1.0)
    (0.495, inf)
    """
    if clips < FEWEST:
        return math.inf
    if deviation == 0:
        return 0.0
    from scipy.optimize import brentq
    from scipy.stats import nct, norm, t

    if clips == FEWEST:
        return float(norm.ppf(POWER ** (1 / clips))) * deviation
    freedom = clips - 1
    critical = float(t.ppf(1 - ALPHA / 2, freedom))

    def lacking(shift: float) -> float:
        """How much the power falls short where the mean is `shift` standard errors; the other tail adds nothing that counts there."""
        return POWER - float(nct.sf(critical, freedom, shift))

    return float(brentq(lacking, 0.1, 20.0)) * deviation / math.sqrt(clips)


@dataclass(frozen=True)
class Paired:
    """Two methods on the same clips.

    Attributes:
        difference: mean of the paired differences; it and what follows are None where one is not finite or a value is missing.
        within: interval of this mean.
        p: of the sign-flip test.
        detectable: smallest difference that the clips could show; inf: none; None also for one clip, which has no spread.
        clips: how many.
    """

    difference: float | None
    within: Interval
    p: float | None
    detectable: float | None
    clips: int


def paired(first: Sequence[float | None], second: Sequence[float | None]) -> Paired:
    """What the differences second - first say, clip by clip.

    >>> paired([1.0, 2.0], [2.0, 4.0]).difference, paired([1.0, 2.0], [2.0, math.inf]).difference
    (1.5, None)
    """
    differences = [b - a for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    clips = len(first)
    if not differences or len(differences) < clips or not all(math.isfinite(one) for one in differences):
        return Paired(None, Interval(), None, None, clips)
    smallest = detectable(clips, stdev(differences)) if clips > 1 else None
    return Paired(fmean(differences), interval(differences), sign_flip(differences), smallest, clips)
