"""The checks of notebook 02 from both sides: right answers pass, typical mistakes get their hint."""

import pytest

import falcon_kit as fk


def once(text):
    return "again" if text.lower().count("giraffe") > 1 else None


def hint(exercise, *answer):
    outcome = fk.check(exercise, *answer)
    assert not outcome
    return outcome.text


@pytest.fixture(scope="module")
def session(instruct):
    session = fk.playground(instruct).session
    session.preset("creative")
    session.set(seed=1)
    session.generate(fk.CARD.prompt)
    return session


@pytest.fixture(scope="module")
def tokens(session):
    found = [token for span in session.turns[-1].answers[0].spans for token in span.tokens]
    return [token.text for token in sorted(found, key=lambda token: token.logprob)]


def test_the_least_probable_token_passes(session, tokens):
    assert fk.check("02.1", tokens[0], session)


def test_other_tokens_get_their_hint(session, tokens, instruct):
    assert "the space before a word" in hint("02.1", tokens[0].strip(), session)
    assert "most probable" in hint("02.1", tokens[-1], session)
    assert "Tokens with a lower probability: 1." in hint("02.1", tokens[1], session)
    assert "is no token" in hint("02.1", "xyz", session)
    assert "no turn yet" in hint("02.1", " I", fk.playground(instruct).session)


@pytest.mark.parametrize(
    ("preset", "seed", "prompt"),
    [("card", 1, fk.CARD.prompt), ("creative", 2, fk.CARD.prompt), ("creative", 1, "The giraffe")],
)
def test_the_least_probable_token_of_another_answer_gets_a_hint(instruct, preset, seed, prompt):
    other = fk.playground(instruct).session
    other.preset(preset)
    other.set(seed=seed, max_new_tokens=5)
    other.generate(prompt)
    tokens = [token for span in other.turns[-1].answers[0].spans for token in span.tokens]
    assert "creative preset and seed 1" in hint("02.1", min(tokens, key=lambda each: each.logprob).text, other)


def test_a_guardrail_that_counts_passes():
    assert fk.check("02.2", once)


@pytest.mark.parametrize(
    ("guardrail", "text"),
    [
        (lambda text: None, "return a reason for it"),
        (lambda text: "no" if "giraffe" in text else None, "so return None"),
        (lambda text: "no" if text.count("giraffe") > 1 else None, "upper-case"),
        (lambda text: "no" if text.lower().count("giraf") > 1 else None, "a name"),
        (lambda text: True if once(text) else None, "as text"),
    ],
)
def test_a_wrong_guardrail_gets_its_hint(guardrail, text):
    assert text in hint("02.2", guardrail)


def test_the_temperature_is_between_the_same_and_different_tokens(instruct):
    assert fk.check("02.3", 0.64, instruct)
    assert "raise it" in hint("02.3", 0.01, instruct)
    assert "lower it" in hint("02.3", 3.0, instruct)
    assert "above 0" in hint("02.3", 0, instruct)
