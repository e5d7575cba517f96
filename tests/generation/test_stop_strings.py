"""Stop strings end a text where transformers' `stop_strings` ends it, and are cut from it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.stopping_criteria import StopStringCriteria

from falcon_kit.generation.decoding import SequenceDecoder
from tests.generation.test_generate import QUESTION

ANSWER, EYE, END = 5, 12, 11
"""Ids of >>ANSWER<<, of a further special token, and of <|endoftext|>."""


def special(tokenizer, token):
    return tokenizer.decode([token])


def written(tokenizer, ids, stop):
    """What is shown of these tokens, and how many are read."""
    row = SequenceDecoder(tokenizer, stop, limit=len(ids), strip=False, eos_token_ids=[tokenizer.eos_token_id])
    shown = ""
    for token in ids:
        shown += row.push(token, 0.0)
        if row.finish_reason:
            break
    assert shown == row.text
    return shown, len(row.tokens), row.finish_reason


parts = st.lists(st.sampled_from([*range(13), 23, 77, 900, 1500]).filter(lambda id: id != END), min_size=1, max_size=8)


@given(parts, st.data())
def test_a_text_ends_where_stop_strings_of_transformers_ends_it(tokenizer, ids, data):
    whole = tokenizer.decode(ids)
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[start : start + data.draw(st.integers(1, 14))]
    criteria = StopStringCriteria(tokenizer, stop)
    expected = next(n for n in range(1, len(ids) + 1) if criteria(torch.tensor([ids[:n]]), None).item())
    shown, count, reason = written(tokenizer, ids, (stop,))
    assert (count, reason) == (expected, "stop")
    assert tokenizer.decode(ids[:count], skip_special_tokens=True).startswith(shown)


def test_a_special_token_stops_the_text_and_is_not_shown(instruct):
    stop = special(instruct.tokenizer, ANSWER)
    ids = [23, ANSWER, 77]
    assert written(instruct.tokenizer, ids, (stop,)) == (instruct.tokenizer.decode([23]), 2, "stop")


@pytest.mark.parametrize("shape", ["{0}", "a{0}", "{0}b", "{0}{0}"])
def test_a_stop_string_may_go_beyond_its_special_token(instruct, shape):
    tokenizer = instruct.tokenizer
    (a,), (b,) = tokenizer("a")["input_ids"], tokenizer("b")["input_ids"]
    stop = shape.format(special(tokenizer, ANSWER))
    shown, _, reason = written(tokenizer, [b, a, ANSWER, ANSWER, b, a], (stop,))
    assert reason == "stop"
    assert shown == ("b" if shape.startswith("a") else "ba")


def test_generation_stops_at_a_special_token(instruct):
    stop = special(instruct.tokenizer, ANSWER)
    answer = instruct.generate(QUESTION, stop=stop, sequence_bias={(ANSWER,): 1e4}, max_new_tokens=5)
    assert (answer.tokens, answer.text, answer.finish_reason) == ((ANSWER,), "", "stop")


def test_an_end_token_that_is_a_stop_string_too_is_an_end_token(instruct):
    assert written(instruct.tokenizer, [23, END], (special(instruct.tokenizer, END),))[1:] == (2, "eos")
