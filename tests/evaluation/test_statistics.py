"""Intervals and paired tests, compared with closed forms and with exact enumeration."""

import math
from itertools import product
from statistics import NormalDist, mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_kit.evaluation import statistics

VALUES = st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=2, max_size=8)
COUNTS = st.tuples(st.integers(0, 40), st.integers(1, 40)).map(lambda pair: (min(pair), max(pair)))


@given(VALUES)
def test_the_interval_of_a_mean_is_the_normal_one(values):
    estimate = statistics.ratio(values, [1.0] * len(values))
    half = NormalDist().inv_cdf(0.975) * stdev(values) / math.sqrt(len(values))
    expected = (mean(values), mean(values) - half, mean(values) + half)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx(expected, abs=1e-9)


@given(VALUES, st.floats(0.1, 10))
def test_a_ratio_over_equal_denominators_is_a_scaled_mean(values, size):
    by_size = statistics.ratio(values, [size] * len(values))
    plain = statistics.ratio(values, [1.0] * len(values))
    assert (by_size.low * size, by_size.high * size) == pytest.approx((plain.low, plain.high), abs=1e-9)


def test_one_item_has_no_interval():
    assert str(statistics.ratio([3.0], [2.0])) == "1.5 (no interval)"


@given(COUNTS)
def test_the_ends_of_a_share_are_the_shares_that_a_score_test_just_accepts(counts):
    right, count = counts
    estimate = statistics.share(right, count)
    for end in (estimate.low, estimate.high):
        if 1e-9 < end < 1 - 1e-9:  # the ends 0 and 1 are exact for no and for all items
            z = (right / count - end) / math.sqrt(end * (1 - end) / count)
            assert abs(z) == pytest.approx(statistics.Z)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


@given(st.integers(0, 8), st.integers(0, 8))
def test_mcnemars_test_counts_the_outcomes_of_fair_coins_that_are_as_uneven(first, second):
    outcomes = [sum(coins) for coins in product((0, 1), repeat=first + second)]
    uneven = [each for each in outcomes if min(each, first + second - each) <= min(first, second)]
    assert statistics.mcnemar(first, second) == pytest.approx(len(uneven) / len(outcomes))


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8))
def test_the_sign_flip_test_counts_the_sums_that_are_as_far_from_zero(differences):
    sums = [
        abs(sum(sign * each for sign, each in zip(signs, differences, strict=True)))
        for signs in product((1, -1), repeat=len(differences))
    ]
    expected = sum(each >= abs(sum(differences)) for each in sums) / len(sums)
    assert statistics.sign_flip(differences, seed=0) == pytest.approx(expected)


def test_random_flips_agree_with_the_mcnemar_test_where_differences_are_ones():
    differences = [1] * 30 + [-1] * 14
    assert statistics.sign_flip(differences, seed=1) == pytest.approx(statistics.mcnemar(30, 14), abs=0.01)
    assert statistics.sign_flip(differences, seed=1) == statistics.sign_flip(differences, seed=1)
