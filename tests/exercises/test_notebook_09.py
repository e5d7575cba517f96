"""The checks of notebook 09 from both sides: right answers pass, typical mistakes get their hint."""

import re

import pytest

import falcon_kit as fk
from falcon_kit.evaluation.statistics import share
from falcon_kit.evaluation.task_results import TaskResult

ITEMS = tuple(
    {"relation": relation, "held_out": held_out, "acc": acc}
    for relation, held_out, acc in [
        *[("food", True, 1.0), ("food", True, 0.0), ("food", False, 1.0)],
        *[("home", True, 1.0), ("home", True, 1.0), ("home", False, 0.0)],
    ]
)
RESULT = TaskResult("falconet-choices", "multiple choice", "a", {}, ITEMS, {})
EVALUATION = fk.Evaluation("falconet", {}, (), (RESULT,))


def hint(exercise, *answer):
    outcome = fk.check(exercise, *answer)
    assert not outcome
    return outcome.text


def test_right_answers_pass():
    assert fk.check("09.1", ("food", 0.5), EVALUATION)
    assert fk.check("09.2", 1153, share)
    assert fk.check("09.3", lambda text: "a dose" if re.search(r"\d\s*(mg|ml|µg)\b", text) else None)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (("age", 0.5), "is no relation: there are food, home"),
        (("home", 1.0), "Another relation has a lower share"),
        (("food", 50), "in percent"),
        (("food", 0.67), "the mean of `acc`"),
    ],
)
def test_a_wrong_relation_or_share_gets_its_hint(answer, text):
    assert text in hint("09.1", answer, EVALUATION)


@pytest.mark.parametrize(("count", "text"), [(0, "Give a number"), (50, "more are needed"), (9000, "fewer are enough")])
def test_a_wrong_number_of_items_gets_its_hint(count, text):
    assert text in hint("09.2", count, share)


@pytest.mark.parametrize(
    ("judge", "text"),
    [
        ("a dose", "Give the function itself"),
        (lambda text: None, "has a dose and passes"),
        (lambda text: "a number" if re.search(r"\d|mg|ml", text) else None, "has no dose and is blocked"),
    ],
)
def test_a_wrong_judge_gets_its_hint(judge, text):
    assert text in hint("09.3", judge)
