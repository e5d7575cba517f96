"""`fk.check`: right, or a hint that fits the mistake, and nothing is raised."""

import re

import pytest

import falcon_kit as fk
from falcon_kit.exercises import check as module
from falcon_kit.exercises.check import all_checks
from falcon_kit.exercises.outcome import Outcome


def crash(*_):
    """A number."""
    raise ZeroDivisionError("by the reader")


@pytest.mark.parametrize("exercise", list(all_checks()))
@pytest.mark.parametrize("answer", [None, ..., [1, ...], {"share": ...}, (None, 2)], ids=repr)
def test_no_answer_gets_the_form_of_the_answer(exercise, answer):
    outcome = fk.check(exercise, answer)
    assert not outcome
    assert outcome.text.startswith("There is no answer yet. Expected: ")
    assert len(outcome.text) > 60


@pytest.mark.parametrize("exercise", list(all_checks()))
@pytest.mark.parametrize("answer", ["text", -1, [], {}, object(), lambda *_: None, crash, float("nan")])
def test_no_answer_raises(exercise, answer):
    outcome = fk.check(exercise, answer)
    assert isinstance(outcome, Outcome)
    assert not outcome
    assert outcome.text


@pytest.mark.parametrize("given", ["00.1", 0.1, " 0.1 "])
def test_an_exercise_is_named_by_its_number(given):
    assert fk.check(given).exercise == "00.1"


@pytest.mark.parametrize(("given", "nearest"), [("00.9", "00.1"), ("notebook", "00.1"), ("zz", "00.1"), (99.1, "09.1")])
def test_an_unknown_number_names_the_nearest(given, nearest):
    outcome = fk.check(given, 1)
    assert not outcome
    assert repr(outcome).startswith(f"{given}: not yet. Unknown exercise '{given}'.")
    assert nearest in outcome.text


def test_an_error_in_the_readers_function_becomes_a_hint(monkeypatch):
    monkeypatch.setattr(module, "all_checks", lambda: {"00.1": crash})
    assert fk.check("00.1", 1).text == (
        "The check stopped at this answer (ZeroDivisionError: by the reader). Expected: A number."
    )


def test_an_outcome_is_a_sentence_and_a_line_of_html():
    wrong = Outcome("06.1", False, "a <b> is missing")
    assert repr(wrong) == "06.1: not yet. a <b> is missing"
    assert "06.1: not yet." in wrong._repr_html_()
    assert "a &lt;b&gt; is missing" in wrong._repr_html_()
    assert repr(Outcome("06.1", True, "Yes.")) == "06.1: right. Yes."
    assert Outcome("06.1", True, "Yes.")
    assert not wrong


def test_what_stands_between_backticks_is_code_in_html():
    html = Outcome("05.2", False, "Take `after<1>`, not `before`, and one ` more.")._repr_html_()
    assert re.findall("<code>(.*?)</code>", html) == ["<bdi>after&lt;1&gt;</bdi>", "<bdi>before</bdi>"]
    assert ", and one ` more." in html
