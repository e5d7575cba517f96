"""The checks of notebook 10 from both sides: right answers pass, typical mistakes get their hint."""

import pytest

import falcon_kit as fk

COUNTS = {"falcon-7b": [1], "falcon-40b": [1, 2, 4, 8], "falcon-rw-7b": [1, 2, 4, 8]}


def test_right_answers_pass(instruct):
    assert fk.check("10.1", 0.27, instruct)
    assert fk.check("10.2", COUNTS)
    assert fk.check("10.3", "broken")


@pytest.mark.parametrize(
    ("share", "hint"), [(3.7, "how many times smaller"), (0.25, "8 bits per value"), (0.9, "Divide")]
)
def test_a_wrong_share_gets_its_hint(instruct, share, hint):
    outcome = fk.check("10.1", share, instruct)
    assert not outcome
    assert hint in outcome.text


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (("10.2", COUNTS | {"falcon-7b": [1, 2]}), "one head cannot be divided"),
        (("10.2", COUNTS | {"falcon-40b": [2, 4, 8]}), "One GPU counts too"),
        (("10.2", COUNTS | {"falcon-40b": [3]}), "out of 1, 2, 4 and 8"),
        (("10.3", "stop"), "ended by itself"),
        (("10.3", "length"), "max_new_tokens"),
        (("10.3", "killed"), "after the exception"),
    ],
)
def test_a_typical_mistake_gets_its_hint(given, hint):
    outcome = fk.check(*given)
    assert not outcome
    assert hint in outcome.text
