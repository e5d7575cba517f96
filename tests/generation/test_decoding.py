"""A sequence's tokens become text; a call has its own seed, log-probabilities and alternatives.

Python's own string methods, the tokenizer and a forward pass over the whole text are the oracles.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor

from falcon_kit.generation.decoding import SequenceDecoder
from tests.generation.test_generate import PROMPTS, QUESTION, SAMPLED


@st.composite
def texts_with_stops(draw):
    text = draw(st.text(alphabet="ab\n é🦒字\u0301", max_size=30) | st.text(max_size=30))
    stops = draw(st.lists(st.text(alphabet="ab\n é🦒", min_size=1, max_size=3), max_size=3))
    return text, tuple(stops)


def pieces_of(tokenizer, text, stop=(), strip=False):
    """What a row shows token by token, as far as it goes."""
    ids = tokenizer(text)["input_ids"]
    row = SequenceDecoder(tokenizer, stop, limit=len(ids), strip=strip, eos_token_ids=[tokenizer.eos_token_id])
    shown = []
    for token in ids:
        shown.append(row.push(token, 0.0))
        if row.finish_reason:
            break
    return shown, row


@given(st.text(max_size=40))
def test_the_pieces_of_any_text_join_to_the_text(tokenizer, text):
    assert "".join(pieces_of(tokenizer, text)[0]) == tokenizer.decode(
        tokenizer(text)["input_ids"], skip_special_tokens=True
    )


@given(st.text(alphabet="é🦒字한 a", min_size=1, max_size=20))
def test_no_piece_holds_half_a_character(tokenizer, text):
    assert [piece for piece in pieces_of(tokenizer, text)[0] if "\ufffd" in piece] == []


@given(texts_with_stops())
def test_a_row_has_shown_its_whole_text_when_it_ends(tokenizer, case):
    shown, row = pieces_of(tokenizer, *case)
    assert "".join(shown) == row.text


def test_a_text_cut_off_inside_a_character_shows_a_replacement_mark_at_the_end(tokenizer):
    ids = tokenizer("🦒")["input_ids"]
    row = SequenceDecoder(tokenizer, (), limit=len(ids) - 1, strip=False, eos_token_ids=[tokenizer.eos_token_id])
    assert "".join(row.push(token, 0.0) for token in ids[:-1]) == tokenizer.decode(ids[:-1])


def test_an_end_token_inside_a_character_shows_a_replacement_mark_too(tokenizer):
    ids = [*tokenizer("🦒")["input_ids"][:-1], tokenizer.eos_token_id]
    row = SequenceDecoder(tokenizer, (), limit=100, strip=False, eos_token_ids=[tokenizer.eos_token_id])
    assert "".join(row.push(token, 0.0) for token in ids) == tokenizer.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, 2047).filter(lambda token: token != 11), min_size=1, max_size=30))
def test_any_tokens_at_all_give_the_text_that_the_tokenizer_decodes(tokenizer, ids):
    row = SequenceDecoder(tokenizer, (), limit=len(ids), strip=False, eos_token_ids=[tokenizer.eos_token_id])
    assert "".join(row.push(token, 0.0) for token in ids) == tokenizer.decode(ids, skip_special_tokens=True)


# Seeds


def test_a_seed_leaves_the_global_random_state_as_it_was(instruct):
    before = torch.get_rng_state()
    instruct.generate(QUESTION, **SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_is_for_no_other_device(instruct, monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda _: pytest.fail("every device was seeded"))
    assert instruct.generate(QUESTION, **SAMPLED).tokens


class Fails(LogitsProcessor):
    """Breaks a generation off between the logits and the choice."""

    def __call__(self, input_ids, scores):
        raise MemoryError("no room")


def test_an_error_between_two_tokens_gives_the_random_state_back(instruct):
    expected = instruct.generate(QUESTION, **SAMPLED).tokens
    before = torch.get_rng_state()
    with pytest.raises(MemoryError):
        instruct.generate(QUESTION, logits_processor=[Fails()], **SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)
    assert instruct.generate(QUESTION, **SAMPLED).tokens == expected


# Log-probabilities


def test_log_probabilities_are_those_of_one_pass_over_the_whole_text(instruct):
    answer = instruct.generate(QUESTION, **SAMPLED)
    prompt = instruct.tokenizer(QUESTION)["input_ids"]
    with torch.inference_mode():
        logits = instruct.model(torch.tensor([[*prompt, *answer.tokens]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)[range(len(answer.tokens)), list(answer.tokens)].tolist()
    assert answer.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_beam_search_gives_no_log_probabilities(instruct):
    assert instruct.generate(QUESTION, num_beams=2, max_new_tokens=4).logprobs is None


# Alternatives


@pytest.mark.parametrize("rows", [1, 2])
def test_alternatives_are_the_likeliest_tokens_of_the_model_itself(instruct, rows):
    prompts = PROMPTS[:rows]
    written = instruct.generate(prompts, max_new_tokens=4, alternatives=3)
    for prompt, each in zip(prompts, written, strict=True):
        ids = torch.tensor([instruct.tokenizer(prompt)["input_ids"] + list(each.tokens[:-1])])
        with torch.inference_mode():
            logprobs = instruct.model(ids).logits[0, -len(each.tokens) :].log_softmax(-1)
        expected = logprobs.topk(3)
        assert [[other.token_id for other in step] for step in each.alternatives] == expected.indices.tolist()
        values = torch.tensor([[other.logprob for other in step] for step in each.alternatives])
        torch.testing.assert_close(values, expected.values, atol=1e-4, rtol=0)


def test_an_alternative_has_the_text_of_its_token(instruct):
    for step in instruct.generate(QUESTION, max_new_tokens=4, alternatives=5).alternatives:
        assert [each.text for each in step] == [instruct.tokenizer.decode([each.token_id]) for each in step]


def test_no_alternatives_are_computed_unless_asked_for(instruct, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "topk", lambda *_: pytest.fail("topk was called"))
    assert instruct.generate(QUESTION, max_new_tokens=4).alternatives is None


def test_more_alternatives_than_tokens_are_all_tokens(instruct):
    assert len(instruct.generate(QUESTION, max_new_tokens=1, alternatives=10**6).alternatives[0]) == 2048
