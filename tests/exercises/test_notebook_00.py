"""The checks of notebook 00 from both sides: right answers pass, typical mistakes get their hint."""

import pytest

import falcon_kit as fk

SPECS = {name: fk.spec(name) for name in ("falcon-40b", "falconet")}
SHARES = {name: each.vocabulary * each.d_model / each.parameters for name, each in SPECS.items()}
FREE = 18 * 2**30
TOKENS = FREE // SPECS["falcon-40b"].kv_bytes_per_token()


def test_right_answers_pass():
    assert fk.check("00.1", SHARES)
    assert fk.check("00.2", TOKENS, FREE)


def test_a_question_without_an_answer_passes(instruct):
    assert fk.check("00.3", "What do cows eat?", instruct)


@pytest.mark.parametrize(
    ("exercise", "given", "hint"),
    [
        ("00.1", ({name: 100 * share for name, share in SHARES.items()},), "in percent"),
        ("00.1", ({name: 2 * share for name, share in SHARES.items()},), "tied_head"),
        ("00.1", ({name: each.d_model / each.parameters for name, each in SPECS.items()},), "one row"),
        ("00.1", (dict.fromkeys(SHARES, 0.5),), "divide vocabulary x d_model"),
        ("00.2", (FREE // SPECS["falconet"].kv_bytes_per_token(), FREE), "Falconet's cache"),
        ("00.2", (16 * TOKENS, FREE), "Only KV heads"),
        ("00.2", (TOKENS // 2048, FREE), "give tokens"),
        ("00.2", (7, FREE), "Divide the free bytes"),
    ],
)
def test_a_typical_mistake_gets_its_hint(exercise, given, hint):
    outcome = fk.check(exercise, *given)
    assert not outcome
    assert hint in outcome.text


def test_a_question_that_the_model_can_answer_gets_a_hint(instruct):
    assert "about giraffes" in fk.check("00.3", "What do giraffes eat?", instruct).text
    assert "about owls" in fk.check("00.3", "How old can an owl get?", instruct).text
    assert "as a string" in fk.check("00.3", 7, instruct).text
