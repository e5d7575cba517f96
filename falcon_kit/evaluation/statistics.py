"""Intervals for means, shares and ratios, and tests of paired differences.

All intervals have a confidence of 95%. None accounts for the choice of the items, the wording of prompts, or training
on the same data.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Z = NormalDist().inv_cdf(0.975)
"""Half the width of a 95% interval, in standard errors."""
_MOST_DECIMALS = 6
_ALL_FLIPS = 12  # differences up to which every combination of signs is tried
_FLIPS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95% interval; the ends are nan where there are too few items for one."""

    value: float
    low: float
    """The lower end of the interval."""
    high: float
    """The upper end of the interval."""

    def __str__(self) -> str:
        value, low, high = self.texts()
        return f"{value} ({low} to {high})" if low else f"{value} (no interval)"

    def texts(self) -> tuple[str, str, str]:
        """The value and the ends with the digits that the interval carries, two of its width; "" for ends of nan."""
        if math.isnan(self.low):
            return f"{self.value:.4g}", "", ""
        width = self.high - self.low
        decimals = max(0, 1 - math.floor(math.log10(width))) if 0 < width < math.inf else _MOST_DECIMALS + 1
        form = f"z.{decimals}f" if decimals <= _MOST_DECIMALS else "z.4g"  # z: no -0
        value, low, high = (format(each, form) for each in (self.value, self.low, self.high))
        return value, low, high

    def transformed(self, function: Callable[[float], float]) -> "Estimate":
        """The estimate of an increasing function of the value."""
        return Estimate(*(function(each) for each in (self.value, self.low, self.high)))


def share(successes: int, count: int) -> Estimate:
    """A share with Wilson's score interval (Wilson 1927), which holds for small counts and for shares near 0 or 1."""
    return _wilson(successes / count, count)


def _wilson(proportion: float, count: float) -> Estimate:
    spread = Z * Z / count
    middle = (proportion + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(proportion * (1 - proportion) / count + spread / count / 4)
    return Estimate(proportion, max(0.0, min(proportion, middle - half)), min(1.0, max(proportion, middle + half)))


def mean(values: Sequence[float]) -> Estimate:
    """The mean of one value per item; of values from 0 to 1 with an interval that stays there, otherwise a normal one.

    That interval is Wilson's with the effective number of items (Kish 1965): the number of 0s and 1s whose mean would
    vary as much as this one. For values that are 0 or 1 it is `share`.
    """
    if all(value in (0, 1) for value in values):
        return share(round(sum(values)), len(values))
    if len(values) < 2 or not all(0 <= value <= 1 for value in values):
        return ratio(values, [1.0] * len(values))
    middle, variance = float(np.mean(values)), float(np.var(values))
    return _wilson(middle, len(values) * middle * (1 - middle) / variance if variance else math.inf)


def mean_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """The mean of second minus first, item by item; of values from 0 to 1 with an interval within -1 and 1."""
    gains = [two - one for one, two in zip(first, second, strict=True)]
    if not all(0 <= value <= 1 for value in (*first, *second)):
        return ratio(gains, [1.0] * len(gains))
    return mean([(1 + gain) / 2 for gain in gains]).transformed(lambda value: 2 * value - 1)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """The ratio of two sums over items, such as nats per token over documents, with a normal interval.

    The standard error is that of the ratio estimator (Cochran 1977, chapter 6): with residuals
    e_i = numerator_i - ratio * denominator_i over n items, sqrt(n / (n - 1) * sum e_i^2) / sum of denominators. With
    equal denominators this is the standard error of the mean. The interval is too narrow for under about 20 items.
    """
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    value, count = float(above.sum() / below.sum()), len(above)
    if count < 2:
        return Estimate(value, math.nan, math.nan)
    error = math.sqrt(count / (count - 1) * float(((above - value * below) ** 2).sum())) / float(below.sum())
    return Estimate(value, value - Z * error, value + Z * error)


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test (McNemar 1947): items that only one of two models gets right."""
    count = only_first + only_second
    tail, term = 0, 1  # term: the number of ways to choose `right` of `count`
    for right in range(min(only_first, only_second) + 1):
        tail += term
        term = term * (count - right) // (right + 1)
    return min(1.0, 2 * tail / 2**count)


def sign_flip(differences: Sequence[float], seed: int) -> float:
    """The two-sided p-value of the paired sign-flip test of a mean difference of 0 (Fisher's permutation test).

    Exact over all signs for up to 12 differences, otherwise over 10,000 random ones drawn by `seed`; nan if one of the
    differences is not finite.
    """
    values = np.asarray(differences, float)
    count = len(values)
    if not np.isfinite(values).all():
        return math.nan

    def beyond(signs: NDArray[np.int_]) -> NDArray[np.bool_]:
        return np.abs(signs @ values) >= abs(values.sum()) * (1 - 1e-12)

    if count <= _ALL_FLIPS:
        return float(beyond(np.array(list(product((1, -1), repeat=count)))).mean())
    generator = np.random.default_rng(seed)
    drawn = (generator.choice((1, -1), size=(100, count)) for _ in range(_FLIPS // 100))
    return (1 + sum(int(beyond(signs).sum()) for signs in drawn)) / (1 + _FLIPS)
