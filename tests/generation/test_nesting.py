"""A generation inside another one or beside it, and a stream that is closed before its first piece."""

import threading

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from falcon_kit.generation.decoding import SamplingRNG

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


@pytest.mark.parametrize("beams", [1, 2])
def test_another_thread_samples_while_a_search_without_sampling_runs(instruct, beams):
    texts = []

    def beside(input_ids, scores):
        thread = threading.Thread(target=lambda: texts.append(instruct.generate(PROMPT, **SAMPLED)), daemon=True)
        thread.start()
        thread.join(20)
        return scores

    instruct.generate(PROMPT, num_beams=beams, max_new_tokens=1, logits_processor=LogitsProcessorList([beside]))
    assert len(texts) == 1


@pytest.mark.parametrize("write", [1, 2], ids=["entering", "leaving"])
def test_ctrl_c_while_random_states_are_swapped_leaves_the_global_one_and_no_lock(instruct, monkeypatch, write):
    before, writes, texts = torch.get_rng_state(), [], []
    set_state = torch.set_rng_state

    def interrupted(state):
        set_state(state)
        writes.append(state)
        if len(writes) == write:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "set_rng_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        instruct.generate(PROMPT, seed=7, **SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)
    thread = threading.Thread(target=lambda: texts.append(instruct.generate(PROMPT, **SAMPLED)), daemon=True)
    thread.start()
    thread.join(20)
    assert len(texts) == 1


@pytest.mark.parametrize("step", ["append", "pop"])
def test_ctrl_c_between_two_statements_of_a_swap_leaves_no_lock(instruct, monkeypatch, step):
    left, texts = [KeyboardInterrupt()], []

    def interrupted(self, *each):
        getattr(list, step)(self, *each)
        if left:
            raise left.pop()

    monkeypatch.setattr(SamplingRNG, "_sampling", type("Requests", (list,), {step: interrupted})())
    with pytest.raises(KeyboardInterrupt):
        instruct.generate(PROMPT, seed=7, **SAMPLED)
    thread = threading.Thread(target=lambda: texts.append(instruct.generate(PROMPT, **SAMPLED)), daemon=True)
    thread.start()
    thread.join(20)
    assert len(texts) == 1
