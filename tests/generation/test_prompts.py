"""Prompts: as token ids, and the room they leave, without a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_kit.generation.prompts import check_prompt, check_tokens, new_token_limit, token_ids
from falcon_kit.generation.sampling import Sampling

CONTEXT = 64
lengths = st.lists(st.integers(1, 3 * CONTEXT), min_size=1, max_size=4)


@given(lengths, st.integers(1, 3 * CONTEXT))
def test_prompt_and_answer_fit_into_the_context_or_are_refused(lengths, wanted):
    prompts = [[13] * length for length in lengths]
    if max(lengths) >= CONTEXT:
        with pytest.raises(ValueError, match=rf"has {max(lengths)} tokens, the model's context is {CONTEXT}"):
            new_token_limit(prompts, CONTEXT, Sampling(max_new_tokens=wanted))
    else:
        assert new_token_limit(prompts, CONTEXT, Sampling(max_new_tokens=wanted)) == min(wanted, CONTEXT - max(lengths))


@given(lengths, st.integers(1, 3 * CONTEXT))
def test_of_a_prompt_that_is_cut_on_the_left_half_the_context_stays(lengths, wanted):
    left = CONTEXT - new_token_limit(
        [[13] * each for each in lengths], CONTEXT, Sampling(max_new_tokens=wanted, truncate="left")
    )
    assert left >= min(max(lengths), CONTEXT // 2)


@pytest.mark.parametrize("text", ["Hello", "two\nlines 🦒"])
def test_texts_become_the_ids_that_the_tokenizer_gives(tokenizer, text):
    assert token_ids(tokenizer, [text, [7, 8]]) == [tokenizer(text)["input_ids"], [7, 8]]


def test_an_empty_prompt_is_named_by_its_number():
    with pytest.raises(ValueError, match="prompt 2 of 3 is empty"):
        check_prompt(["Hello", "", "Hello"])


@pytest.mark.parametrize(
    ("prompt", "prompts", "single"),
    [("a", ["a"], True), (["a"], ["a"], False), (["a", "b"], ["a", "b"], False), ([7, 8], [[7, 8]], True)],
)
def test_a_prompt_is_one_text_several_or_token_ids(prompt, prompts, single):
    assert check_prompt(prompt) == (prompts, single)


@pytest.mark.parametrize("wrong", [-1, 100])
def test_a_token_id_that_there_is_not_is_named_with_those_there_are(wrong):
    with pytest.raises(ValueError, match=f"{wrong} is no token id of this model, whose ids are 0 to 99"):
        check_tokens([[5, 99], [0, wrong]], 100)
