"""On a GPU the model begins a step before the last one is read. Here it does so on a CPU, and gives the same."""

import pytest
import torch
from transformers import DynamicCache

from falcon_kit.generation.decoding import BatchDecoder
from falcon_kit.generation.generate import GenerateTask

PROMPTS = ["User: What do giraffes eat?\nFalcon:", "User: Hello\nFalcon:", "Animals of Africa: giraffe, lion,"]
SAMPLED = {"temperature": 1.5, "top_k": 20, "seed": 7}
SETTINGS = [
    {"max_new_tokens": 40},
    {"max_new_tokens": 40, "stop": " the"},
    {"max_new_tokens": 24, "alternatives": 3, **SAMPLED},
    {"max_new_tokens": 12, "use_cache": False},
    {"max_new_tokens": 24, "cache_implementation": "static"},
    {"max_new_tokens": 24, "num_return_sequences": 2, **SAMPLED},
    {"max_new_tokens": 24, "repetition_penalty": 1.5},
]


@pytest.fixture
def run_ahead(monkeypatch):
    """From its call on, the loop runs ahead. Nothing is copied: on a CPU, each value is there at once."""

    def begin():
        monkeypatch.setattr(GenerateTask, "_runs_ahead", lambda task: True)
        monkeypatch.setattr(BatchDecoder, "begin_reading", lambda *_: None)

    return begin


def found(generation):
    return (generation.tokens, generation.text, generation.finish_reason, generation.logprobs, generation.alternatives)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: " ".join(each))
def test_texts_are_the_same(instruct, run_ahead, settings):
    expected = instruct.generate(PROMPTS, **settings)
    run_ahead()
    assert [*map(found, instruct.generate(PROMPTS, **settings))] == [*map(found, expected)]


def test_a_step_begins_before_the_last_one_is_read(instruct, run_ahead, forwards):
    run_ahead()
    stream = instruct.stream(PROMPTS[0], max_new_tokens=8)
    next(stream)
    stream.close()
    assert len(forwards) == 2


def test_no_step_begins_after_the_last_token(instruct, run_ahead, forwards):
    run_ahead()
    assert instruct.generate(PROMPTS[0], max_new_tokens=5, suppress_tokens=[11]).finish_reason == "length"
    assert len(forwards) == 5


def test_the_text_until_an_error_is_the_same(instruct, run_ahead):
    expected = instruct.generate(PROMPTS[0], max_new_tokens=8).tokens[:4]
    run_ahead()
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = instruct.model.register_forward_hook(hook)
    try:
        with pytest.raises(MemoryError, match="after 4 of up to 8 new tokens") as error:
            instruct.generate(PROMPTS[0], max_new_tokens=8)
    finally:
        handle.remove()
    assert error.value.generations[0].tokens == expected


@pytest.mark.parametrize(("device", "ahead"), [("cuda", True), ("cpu", False)])
def test_a_gpu_runs_ahead(instruct, monkeypatch, device, ahead):
    monkeypatch.setattr(type(instruct.model), "device", torch.device(device))
    assert _task(instruct)._runs_ahead() == ahead


def test_a_cache_of_the_caller_holds_no_token_more(instruct, monkeypatch):
    monkeypatch.setattr(type(instruct.model), "device", torch.device("cuda"))
    assert not _task(instruct, past_key_values=DynamicCache())._runs_ahead()


def test_offloaded_weights_are_not_copied_in_vain(instruct, monkeypatch):
    monkeypatch.setattr(type(instruct.model), "device", torch.device("cuda"))
    away = [torch.nn.Parameter(torch.empty(1, device="meta"))]
    monkeypatch.setattr(instruct.model, "parameters", lambda: iter(away))
    assert not _task(instruct)._runs_ahead()


def _task(falcon, **settings):
    return GenerateTask(falcon.model, falcon.tokenizer, PROMPTS[0], settings, False)
