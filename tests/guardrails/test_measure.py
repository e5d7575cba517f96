"""The shipped lines, what the checks do on them, and what a stream costs."""

from collections import Counter
from pathlib import Path

import pytest

from falcon_kit.guardrails.measure import (
    CHECKS,
    TOKENS_PER_SECOND,
    lines,
    measured_guardrails,
    report,
    sample_tokens,
    scores,
    seconds_per_token,
)

SCORES = list(scores(measured_guardrails()))


def test_half_of_the_lines_is_held_out():
    assert Counter(line.half for line in lines()) == {"tuning": 100, "held out": 100}
    assert len({line.text for line in lines()}) == 200


def test_the_lines_are_labelled_with_checks_and_languages():
    assert {check for line in lines() for check in line.checks} == set(CHECKS)
    assert {line.language for line in lines()} == {"en", "de", "zh", "ar"}
    assert all(sum(not line.checks for line in lines() if line.half == half) >= 35 for half in ("tuning", "held out"))


@pytest.mark.parametrize("score", SCORES, ids=lambda score: f"{score.check}, {score.half}")
def test_a_check_catches_its_lines_and_few_others(score):
    assert score.labelled >= 8
    assert score.caught / score.labelled >= (1.0 if score.half == "tuning" else 0.85)
    assert score.false_alarms / score.others <= (0.0 if score.half == "tuning" else 0.03)


def test_the_report_has_a_row_for_each_check_and_half():
    assert all(report().count(check) == 2 for check in CHECKS)
    assert "tokens/s" in report().splitlines()[-1]


def test_the_page_of_features_gives_the_result_on_the_held_out_half():
    held_out = [score for score in SCORES if score.half == "held out"]
    caught, labelled, alarms = (
        sum(getattr(each, n) for each in held_out) for n in ("caught", "labelled", "false_alarms")
    )
    page = " ".join((Path(__file__).parents[2] / "docs/features.md").read_text(encoding="utf-8").split())
    assert f"the checks catch {caught} of {labelled} and raise {alarms} false alarms" in page


def test_the_checks_take_less_than_two_percent_of_a_stream():
    guard, tokens = measured_guardrails(), sample_tokens(500)
    assert min(seconds_per_token(guard, tokens) for _ in range(3)) * TOKENS_PER_SECOND < 0.02


def test_a_token_costs_the_same_however_long_the_text():
    guard = measured_guardrails()
    short, long = (min(seconds_per_token(guard, sample_tokens(count)) for _ in range(3)) for count in (200, 2000))
    assert long < 2 * short
