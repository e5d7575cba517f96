"""A generation inside another one, and a stream that is closed before its first piece."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

PROMPT = "The giraffe"
SAMPLED = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 6}


class Nested(LogitsProcessor):
    """Generates another text at each step, and changes nothing."""

    def __init__(self, falcon, **settings):
        self.falcon, self.settings, self.texts = falcon, settings, []

    def __call__(self, input_ids, scores):
        self.texts.append(self.falcon.generate("A lion", **SAMPLED, **self.settings).tokens)
        return scores


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_logits_processor_may_generate_and_both_texts_are_those_without_the_other(instruct, seed, beams):
    outer = {**SAMPLED, "num_beams": beams}
    settings = {} if seed is None else {"seed": seed}
    alone = instruct.generate(PROMPT, seed=7, **outer).tokens
    torch.manual_seed(3)
    expected = [instruct.generate("A lion", **SAMPLED, **settings).tokens for _ in range(2)]
    torch.manual_seed(3)
    nested = Nested(instruct, **settings)
    text = instruct.generate(PROMPT, seed=7, logits_processor=LogitsProcessorList([nested]), **outer)
    assert text.tokens == alone
    assert nested.texts[:2] == expected


@pytest.mark.parametrize("seed", [None, 5])
def test_a_logits_processor_may_read_a_stream_and_both_texts_are_those_without_the_other(instruct, seed):
    alone = instruct.generate(PROMPT, seed=7, **SAMPLED).tokens
    torch.manual_seed(3)
    expected = [piece.token_id for piece in instruct.stream("A lion", seed=seed, **SAMPLED)]
    torch.manual_seed(3)
    stream, read = instruct.stream("A lion", seed=seed, **SAMPLED), []

    def reading(input_ids, scores):
        read.append(next(stream).token_id)
        return scores

    text = instruct.generate(PROMPT, seed=7, logits_processor=LogitsProcessorList([reading]), **SAMPLED)
    assert (text.tokens, read) == (alone, expected)


def test_a_stream_closed_before_its_first_piece_has_an_empty_text(instruct):
    stream = instruct.stream(PROMPT)
    stream.close()
    assert (stream.generation.text, stream.generation.tokens) == ("", ())
    assert stream.generation.finish_reason == "cancelled"
    assert stream.generation.prompt == PROMPT
    stream.close()
    assert list(stream) == []
