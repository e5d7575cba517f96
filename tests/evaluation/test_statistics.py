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


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        (statistics.share(1, 3), "0.33 (0.06 to 0.79)"),
        (statistics.share(0, 3), "0.00 (0.00 to 0.56)"),
        (statistics.share(333, 1000), "0.333 (0.304 to 0.363)"),
        (statistics.Estimate(1234.5678, 1100.2, 1400.9), "1235 (1100 to 1401)"),
        (statistics.Estimate(-0.001, -0.5, 0.5), "0.0 (-0.5 to 0.5)"),
        (statistics.Estimate(2.0, 2.0, 2.0), "2 (2 to 2)"),
        (statistics.Estimate(2.0, 1.0, math.inf), "2 (1 to inf)"),
    ],
)
def test_an_estimate_is_shown_with_the_digits_that_its_interval_carries(estimate, shown):
    assert str(estimate) == shown


@given(st.floats(-100, 100), st.floats(1e-4, 100))
def test_what_is_shown_is_off_by_at_most_a_tenth_of_the_interval(value, half):
    estimate = statistics.Estimate(value, value - half, value + half)
    for text, number in zip(estimate.texts(), (value, value - half, value + half), strict=True):
        assert abs(float(text) - number) <= 2 * half / 10


@given(COUNTS)
def test_the_ends_of_a_share_are_the_shares_that_a_score_test_just_accepts(counts):
    right, count = counts
    estimate = statistics.share(right, count)
    for end in (estimate.low, estimate.high):
        if 1e-9 < end < 1 - 1e-9:  # the ends 0 and 1 are exact for no and for all items
            z = (right / count - end) / math.sqrt(end * (1 - end) / count)
            assert abs(z) == pytest.approx(statistics.Z)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


SHARES = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=8)


@given(SHARES)
def test_the_interval_of_values_from_0_to_1_stays_there(values):
    estimate = statistics.mean(values)
    assert math.isnan(estimate.low) or 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_a_value_that_is_almost_0_changes_the_interval_of_a_share_little():
    nearly, whole = statistics.mean([1e-9, 0.0, 1.0, 1.0]), statistics.share(2, 4)
    assert (nearly.low, nearly.high) == pytest.approx((whole.low, whole.high))


def test_in_the_middle_the_interval_of_values_from_0_to_1_is_nearly_the_normal_one():
    values = [0.4, 0.5, 0.6] * 100
    bounded, normal = statistics.mean(values), statistics.ratio(values, [1.0] * len(values))
    assert (bounded.low, bounded.high) == pytest.approx((normal.low, normal.high), abs=1e-4)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_a_difference_of_such_values_is_at_most_1(pairs):
    estimate = statistics.mean_difference(*zip(*pairs, strict=True))
    assert math.isnan(estimate.low) or -1 <= estimate.low <= estimate.high <= 1


def test_a_difference_of_other_values_has_the_normal_interval():
    found = statistics.mean_difference([10.0, 20.0, 30.0], [11.0, 20.0, 31.0])
    assert found == statistics.ratio([1.0, 0.0, 1.0], [1.0] * 3)


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


def test_differences_that_are_not_finite_have_no_p_value():
    assert math.isnan(statistics.sign_flip([1.0, math.nan], 0))


def test_random_flips_agree_with_the_mcnemar_test_where_differences_are_ones():
    differences = [1] * 30 + [-1] * 14
    assert statistics.sign_flip(differences, seed=1) == pytest.approx(statistics.mcnemar(30, 14), abs=0.01)
    assert statistics.sign_flip(differences, seed=1) == statistics.sign_flip(differences, seed=1)
