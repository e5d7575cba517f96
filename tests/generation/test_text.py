"""Stop strings, statistics and the finished text; Python's own string methods are the oracle."""

import dataclasses
import itertools
import math

from hypothesis import example, given
from hypothesis import strategies as st

from falcon_kit.generation.text import Stats, Text
from tests.generation.test_decoding import pieces_of, texts_with_stops
from tests.generation.test_generate import QUESTION


def before_the_first(text, stop):
    """What stands before the first stop string to be complete, when characters are read one by one."""
    for length in range(1, len(text) + 1):
        if ended := [word for word in stop if text[:length].endswith(word)]:
            return text[: length - max(map(len, ended))]
    return text


@example(("a  ", (" ", "a  ")))
@example(("ab", ("b", "ab")))
@given(texts_with_stops())
def test_what_is_shown_is_the_text_before_the_first_complete_stop_string(tokenizer, case):
    text, stop = case
    assert "".join(pieces_of(tokenizer, text, stop)[0]) == before_the_first(text, stop)


@example(("\nUser: hi", ("\nUser:",)))
@given(texts_with_stops())
def test_white_space_that_an_answer_begins_with_may_begin_a_stop_string(tokenizer, case):
    text, stop = case
    assert "".join(pieces_of(tokenizer, text, stop, strip=True)[0]) == before_the_first(text, stop).lstrip()


@example(("so\nUser: hi", ("\nUser:",)), {3, 6}, False)
@example(("\nUser: hi", ("\nUser:",)), {1, 3}, True)
@given(texts_with_stops(), st.sets(st.integers(0, 30)), st.booleans())
def test_chunks_of_any_lengths_show_the_same_text(case, borders, strip):
    text, stop = case
    grown, shown = Text(stop, strip), ""
    for start, end in itertools.pairwise([0, *sorted(borders), 30]):
        if not grown.stopped:
            grown.add(text[start:end])
            shown += grown.show(ended=grown.stopped)
    expected = before_the_first(text, stop)
    assert shown + grown.show(ended=True) == str(grown) == (expected.lstrip() if strip else expected)


def test_the_speed_of_reading_is_unknown_where_no_token_came():
    assert math.isnan(Stats(1, 5, 0, 0.0, 0.0).prefill_tokens_per_second)


def test_the_speed_of_decoding_is_that_of_the_tokens_after_the_first_of_each_row():
    stats = Stats(rows=2, prompt_tokens=6, new_tokens=10, first_token_seconds=1.0, seconds=3.0)
    assert (stats.prefill_tokens_per_second, stats.decode_tokens_per_second) == (6.0, 4.0)


def test_the_html_of_a_generation_escapes_its_text(instruct):
    answer = dataclasses.replace(
        instruct.generate(QUESTION, max_new_tokens=2), prompt="<script>", text="<img onerror=x>"
    )
    assert [tag for tag in ("<script>", "<img") if tag in answer._repr_html_()] == []


def test_the_html_of_a_generation_runs_as_its_text_and_the_prompt_does_not_turn_the_answer_round(instruct):
    answer = dataclasses.replace(
        instruct.generate(QUESTION, max_new_tokens=2), prompt="\u05e9\u202e", text=" yes"
    )._repr_html_()
    assert 'dir="rtl"' in answer
    assert "<bdi>\u05e9\u202e</bdi>" in answer
    assert "<b><bdi> yes</bdi></b>" in answer
