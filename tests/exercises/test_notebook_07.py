"""The checks of notebook 07 from both sides: right answers pass, typical mistakes get their hint."""

import re

import pytest

import falcon_kit as fk
from falcon_kit.exercises.notebook_07 import _error, _first_weight

BLOCKS = (16, 64, 256, 1024)
CONTEXT = 5620


@pytest.fixture(scope="module")
def errors():
    weight, levels = _first_weight()
    return {block: _error(weight, levels, block) for block in BLOCKS}


def test_right_answers_pass(errors):
    assert fk.check("07.1", errors)
    assert fk.check("07.3", CONTEXT)


def test_the_kind_with_the_largest_divergence_passes_and_others_get_their_hint():
    assert re.search(r"0\.000\d nats per token, \d\.\d times that", fk.check("07.2", "query_key_value").text)
    assert "least" in fk.check("07.2", "dense_4h_to_h").text
    assert "times the divergence" in fk.check("07.2", "dense").text


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda right: {block: 100 * value for block, value in right.items()}, "in percent"),
        (lambda right: {block: value**2 for block, value in right.items()}, "the square"),
        (lambda right: dict.fromkeys(BLOCKS, right[64]), "are the scales computed again"),
        (lambda right: dict.fromkeys(BLOCKS, 0.5), "the largest absolute value"),
    ],
)
def test_a_typical_mistake_with_blocks_gets_its_hint(errors, change, hint):
    outcome = fk.check("07.1", change(errors))
    assert not outcome
    assert hint in outcome.text


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (("07.2", "attention"), "Give one of"),
        (("07.3", 32 * CONTEXT), "of one text"),
        (("07.3", CONTEXT / 2), "count them once"),
        (("07.3", 21005), "in bfloat16"),
        (("07.3", 100), "Divide plan.weight_bytes"),
    ],
)
def test_a_typical_mistake_gets_its_hint(given, hint):
    outcome = fk.check(*given)
    assert not outcome
    assert hint in outcome.text
