"""Medians over seeds with bootstrap intervals, computed exactly instead of by drawing, so that they need no seed.

The median of a resample of n values is one of them (n odd) or the mean of two (n even), whose probabilities are binomial sums
(Efron 1979; Hutson & Ernst 2000). Nothing is interpolated, so that values may be infinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class Interval:
    """A median and the percentile interval of its bootstrap distribution; ends may be infinite."""

    middle: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is a median at all."""
        return not math.isnan(self.middle)


UNKNOWN = Interval(math.nan, math.nan, math.nan)


def median_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The median with its interval; misses are infinite values, and :data:`UNKNOWN` stands for no values.

    Args:
        values: one for each seed; infinite ones take part.
        level: of the interval.

    Raises:
        ValueError: where a value is NaN; a miss is infinite.
    """
    if any(math.isnan(value) for value in values):
        raise ValueError(f"values must not be NaN, got {list(values)}; a miss is math.inf")
    if not values:
        return UNKNOWN
    ordered = sorted(values)
    outcomes = sorted((_mean(ordered[i], ordered[j]), mass) for (i, j), mass in _masses(len(ordered)).items())
    below = list(accumulate(mass for _, mass in outcomes))
    tail = (1 - level) / 2
    low = next(value for (value, _), share in zip(outcomes, below, strict=True) if share >= tail)
    high = next(
        (value for (value, _), share in zip(outcomes, below, strict=True) if share >= 1 - tail), outcomes[-1][0]
    )
    return Interval(_mean(ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]), low, high)


def _mean(first: float, second: float) -> float:
    return (first + second) / 2


@cache
def _masses(n: int) -> dict[tuple[int, int], float]:
    """(i, j) -> the probability that the two middle values of a resample of n are the i-th and j-th of the sample."""
    middle = (n + 1) // 2
    # At least `middle` of n draws fall on the first i + 1 values.
    within = [
        sum(math.comb(n, k) * (i + 1) ** k * (n - i - 1) ** (n - k) for k in range(middle, n + 1)) for i in range(n)
    ]
    single = [within[0], *(after - before for before, after in pairwise(within))]
    if n % 2:
        return {(i, i): single[i] / n**n for i in range(n)}
    # The lower half falls on the first i + 1 values and reaches i, the upper half on those from j, and reaches j.
    pairs = {
        (i, j): math.comb(n, middle) * ((i + 1) ** middle - i**middle) * ((n - j) ** middle - (n - j - 1) ** middle)
        for i in range(n)
        for j in range(i + 1, n)
    }
    equal = {(i, i): single[i] - sum(pairs[i, j] for j in range(i + 1, n)) for i in range(n)}
    return {place: count / n**n for place, count in {**pairs, **equal}.items()}
