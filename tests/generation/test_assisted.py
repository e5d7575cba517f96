"""Assisted generation: a draft model or the prompt proposes tokens; the texts are those without it.

transformers' own greedy and assisted generation are the oracles.
"""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache, StoppingCriteria

import falcon_kit as fk
from falcon_kit.generation.arguments import CACHE
from falcon_kit.generation.generate import generate, stream
from tests.conftest import small_model
from tests.generation.test_generate import PROMPTS, QUESTION

REPEATED = "The giraffe eats leaves. The lion eats meat. The giraffe eats"
MODES = ["assistant_model", "prompt_lookup_num_tokens"]
GREEDY = {"max_new_tokens": 40, "do_sample": False}
DRAWN = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.7}


def assistance(mode, falcon):
    return {mode: falcon.model if mode == "assistant_model" else 3}


@pytest.fixture(scope="module")
def draft():
    return fk.load("falconet")


def by_transformers(falcon, prompt, **settings):
    """The new tokens of transformers' own loop; 11 is the end-of-sequence token and 12 the padding."""
    inputs = falcon.tokenizer(prompt, return_tensors="pt")
    output = falcon.model.generate(**inputs, pad_token_id=12, eos_token_id=11, **settings)
    return tuple(output[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.mark.parametrize("mode", MODES)
def test_assisted_generation_gives_greedy_tokens_in_every_layout(layout, tokenizer, mode):
    model = small_model(layout)
    names = {"assistant_model": small_model("7b") if layout == "40b" else model, "prompt_lookup_num_tokens": 4}
    settings = {"max_new_tokens": 24, mode: names[mode]}
    expected = generate(model, tokenizer, REPEATED, max_new_tokens=24)
    answer = generate(model, tokenizer, REPEATED, **settings)
    assert (answer.tokens, answer.text) == (expected.tokens, expected.text)
    assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert [piece.token_id for piece in stream(model, tokenizer, REPEATED, **settings)] == [*expected.tokens]


@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_are_those_of_transformers_assisted_generation(instruct, draft, mode):
    expected = by_transformers(instruct, QUESTION, **GREEDY, **assistance(mode, draft))
    assert instruct.generate(QUESTION, **GREEDY, **assistance(mode, draft)).tokens == expected


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_draws_what_transformers_draws_with_it(instruct, draft, mode):
    before = torch.get_rng_state()
    answer = instruct.generate(REPEATED, seed=5, **DRAWN, **assistance(mode, draft))
    assert torch.equal(torch.get_rng_state(), before)
    pieces = instruct.stream(REPEATED, seed=5, **DRAWN, **assistance(mode, draft))
    assert [piece.token_id for piece in pieces] == [*answer.tokens]
    torch.manual_seed(5)
    assert answer.tokens == by_transformers(instruct, REPEATED, top_k=0, **DRAWN, **assistance(mode, draft))


@pytest.mark.parametrize("mode", MODES)
def test_each_accepted_token_saves_a_forward_pass(instruct, mode, forwards):
    settings = {**GREEDY, "suppress_tokens": [11], **assistance(mode, instruct)}
    answer = instruct.generate(REPEATED, **settings)
    drafted = len(answer.tokens) if mode == "assistant_model" else 0  # here the model drafts for itself
    assert answer.accepted > 0
    assert len(forwards) - drafted <= len(answer.tokens) - answer.accepted <= len(forwards)
    accepted = [piece.accepted for piece in instruct.stream(REPEATED, **settings)]
    assert (len(accepted), sum(accepted)) == (len(answer.tokens), answer.accepted)


def test_a_model_accepts_all_that_it_drafts_for_itself(instruct, monkeypatch):
    monkeypatch.setattr(instruct.model.generation_config, "assistant_confidence_threshold", 0.0)
    pieces = list(instruct.stream(QUESTION, max_new_tokens=21, suppress_tokens=[11], assistant_model=instruct))
    assert [piece.accepted for piece in pieces] == [True] * 20 + [False]  # transformers drafts 20 tokens by default


def test_jupyter_shows_the_accepted_tokens_of_a_generation(instruct):
    answer = instruct.generate(REPEATED, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert f"; {answer.accepted} tokens accepted from drafts" in answer._repr_html_()


def test_other_generation_has_no_accepted_tokens(instruct):
    answer = instruct.generate(QUESTION, max_new_tokens=4)
    assert answer.accepted is None
    assert "drafts" not in answer._repr_html_()
    assert not any(piece.accepted for piece in instruct.stream(QUESTION, max_new_tokens=4))


def test_a_stop_string_inside_an_accepted_run_is_cut_exactly(instruct):
    settings = {"max_new_tokens": 16, "suppress_tokens": [11]}
    full = instruct.generate(REPEATED, **settings)
    beginnings = [instruct.tokenizer.decode(full.tokens[:count]) for count in range(1, 17)]
    for start in range(0, len(full.text) - 3, 5):
        stop = full.text[start : start + 1 + start % 4]
        stream = instruct.stream(REPEATED, stop=stop, assistant_model=instruct, **settings)
        shown = "".join(piece.text for piece in stream)
        count = next(number for number, text in enumerate(beginnings, 1) if stop in text)
        assert shown == stream.generation.text == full.text[: full.text.index(stop)]
        assert (stream.generation.tokens, stream.generation.finish_reason) == (full.tokens[:count], "stop")


def test_a_stream_closed_inside_an_accepted_run_has_the_tokens_that_were_read(instruct):
    pieces = instruct.stream(QUESTION, max_new_tokens=21, suppress_tokens=[11], assistant_model=instruct)
    read = [next(pieces).token_id for _ in range(5)]
    pieces.close()
    assert ([*pieces.generation.tokens], pieces.generation.finish_reason) == (read, "cancelled")


def test_the_alternatives_are_those_of_greedy_generation(instruct):
    settings = {"max_new_tokens": 12, "alternatives": 3}
    expected = [[each.token_id for each in step] for step in instruct.generate(REPEATED, **settings).alternatives]
    found = instruct.generate(REPEATED, prompt_lookup_num_tokens=3, **settings).alternatives
    assert [[each.token_id for each in step] for step in found] == expected


class AfterFive(StoppingCriteria):
    """Stops once five tokens are new."""

    def __init__(self, prompt):
        self.limit = prompt + 5

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.limit)


def test_a_stopping_criterion_of_the_callers_ends_the_text_as_in_transformers(instruct):
    criterion = AfterFive(len(instruct.tokenizer(REPEATED)["input_ids"]))
    settings = {**GREEDY, "prompt_lookup_num_tokens": 3, "stopping_criteria": [criterion]}
    answer = instruct.generate(REPEATED, **settings)
    assert answer.finish_reason == "stop"
    assert answer.tokens == by_transformers(instruct, REPEATED, **settings)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings",
    [{"use_cache": False}, *({"cache_implementation": kind} for kind in ("static", "quantized", "sliding_window"))],
    ids=str,
)
def test_a_cache_that_cannot_be_taken_back_is_refused(instruct, draft, mode, settings):
    with pytest.raises(ValueError, match="leave use_cache and cache_implementation out"):
        instruct.generate(QUESTION, **assistance(mode, draft), **settings)


def test_a_cache_of_the_callers_has_to_be_one_that_can_be_taken_back(instruct):
    static = StaticCache(config=instruct.model.config, max_cache_len=200)
    with pytest.raises(ValueError, match=f"{CACHE} may be a DynamicCache, got StaticCache"):
        instruct.generate(REPEATED, prompt_lookup_num_tokens=3, past_key_values=static)
    expected = instruct.generate(REPEATED, max_new_tokens=12).tokens
    for settings in ({"past_key_values": DynamicCache()}, {"cache_implementation": "dynamic"}):
        answer = instruct.generate(REPEATED, prompt_lookup_num_tokens=3, max_new_tokens=12, **settings)
        assert answer.tokens == expected


def test_a_static_cache_of_the_checkpoints_is_refused_and_left_out_it_works(instruct, monkeypatch):
    monkeypatch.setattr(instruct.model.generation_config, "cache_implementation", "static")
    with pytest.raises(ValueError, match="here and in the model's generation_config"):
        instruct.generate(REPEATED, prompt_lookup_num_tokens=3)
    instruct.model.generation_config.cache_implementation = None
    assert instruct.generate(REPEATED, prompt_lookup_num_tokens=3, max_new_tokens=3).tokens


def test_a_draft_model_takes_no_kind_of_cache_since_it_keeps_its_own(instruct, draft):
    with pytest.raises(ValueError, match="leave use_cache and cache_implementation out"):
        instruct.generate(QUESTION, assistant_model=draft, cache_implementation="dynamic")


def short(model, context):
    """A copy of the model with another context."""
    model = copy.deepcopy(model)
    model.config.max_position_embeddings = context
    return model


@pytest.mark.parametrize("context", [4, 20, 33])
def test_a_model_goes_on_alone_once_the_text_fills_the_drafts_context(instruct, draft, context):
    settings = {**GREEDY, "suppress_tokens": [11]}
    expected = instruct.generate(QUESTION, **settings).tokens
    model = short(draft.model, context)
    pieces = list(instruct.stream(QUESTION, assistant_model=model, **settings))
    assert tuple(piece.token_id for piece in pieces) == expected
    prompt = len(instruct.tokenizer(QUESTION)["input_ids"])
    accepted = [prompt + number for number, piece in enumerate(pieces, 1) if piece.accepted]
    assert not accepted or max(accepted) <= context
    assert bool(accepted) == (context > prompt)


@pytest.mark.parametrize("context", [4, 20, 33])
def test_a_draft_with_another_tokenizer_keeps_to_its_context_too(instruct, draft, context):
    settings = {**GREEDY, "suppress_tokens": [11]}
    drafting = {"assistant_model": short(draft.model, context), "assistant_tokenizer": draft.tokenizer}
    answer = instruct.generate(QUESTION, **settings, **drafting)
    assert answer.tokens == instruct.generate(QUESTION, **settings).tokens
    assert bool(answer.accepted) == (context > len(instruct.tokenizer(QUESTION)["input_ids"]))


def test_a_draft_model_of_another_architecture_keeps_to_its_context(instruct):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_positions=20, n_embd=32, n_layer=1, n_head=2))
    settings = {**GREEDY, "suppress_tokens": [11]}
    expected = instruct.generate(QUESTION, **settings).tokens
    assert instruct.generate(QUESTION, assistant_model=gpt2.eval(), **settings).tokens == expected


@pytest.mark.parametrize("room", [1, 2, 3, 9, 24])
@pytest.mark.parametrize("mode", [*MODES, "assistant_tokenizer"])
def test_a_draft_ends_before_the_context_of_the_model_does(instruct, draft, mode, room):
    again = [*instruct.tokenizer(REPEATED * 3)["input_ids"]]
    falcon = replace(instruct, model=short(instruct.model, len(again) + room))
    settings = {"suppress_tokens": [11]}
    expected = falcon.generate(again, **settings).tokens
    drafting = {"prompt_lookup_num_tokens": 10} if "lookup" in mode else {"assistant_model": draft}
    if mode == "assistant_tokenizer":
        drafting[mode] = draft.tokenizer
    answer = falcon.generate(again, **settings, **drafting)
    assert (answer.tokens, answer.finish_reason, len(answer.tokens)) == (expected, "length", room)


def test_the_length_of_a_draft_does_not_adapt_to_drafts_that_there_was_no_room_for(instruct, draft):
    model = short(draft.model, 4)
    model.generation_config.num_assistant_tokens_schedule = "heuristic"
    model.generation_config.num_assistant_tokens = 5
    instruct.generate(QUESTION, assistant_model=model, **GREEDY)
    assert model.generation_config.num_assistant_tokens == 5


class Collects:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("assisted", [{}, {"prompt_lookup_num_tokens": 3}])
def test_a_streamer_of_the_callers_gets_what_transformers_gives_it(instruct, assisted):
    ours, theirs = Collects(), Collects()
    instruct.generate(REPEATED, streamer=ours, **GREEDY, **assisted)
    by_transformers(instruct, REPEATED, streamer=theirs, **GREEDY, **assisted)
    assert (ours.tokens, ours.ended) == (theirs.tokens, theirs.ended)


def test_a_draft_length_that_adapts_over_calls_does_so_as_in_transformers(instruct, draft, monkeypatch):
    lengths = []
    config = draft.model.generation_config
    monkeypatch.setattr(config, "num_assistant_tokens_schedule", "heuristic")
    for call in (instruct.generate, lambda *given, **settings: by_transformers(instruct, *given, **settings)):
        monkeypatch.setattr(config, "num_assistant_tokens", 5)
        call(QUESTION, assistant_model=draft.model, **GREEDY)
        lengths.append(config.num_assistant_tokens)
    assert lengths[0] == lengths[1] != 5


def test_a_setting_that_only_the_draft_has_is_refused_and_works_there(instruct, draft, monkeypatch):
    with pytest.raises(ValueError, match=r"set it there, as generation_config\.num_assistant_tokens of the draft"):
        instruct.generate(QUESTION, assistant_model=draft, num_assistant_tokens=1)
    monkeypatch.setattr(draft.model.generation_config, "num_assistant_tokens", 1)
    accepted = [piece.accepted for piece in instruct.stream(QUESTION, assistant_model=draft, **GREEDY)]
    assert (True, True) not in pairwise(accepted)


def test_several_texts_at_once_are_refused(instruct):
    with pytest.raises(ValueError, match="assisted generation is of one text, and this call asks for 3"):
        instruct.generate(PROMPTS, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens must be a whole number from 1 to .*, got 0"),
        ({"prompt_lookup_num_tokens": "3"}, "prompt_lookup_num_tokens must be a whole number from 1 to .*, got '3'"),
        (
            {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": -1},
            "max_matching_ngram_size must be a whole number from 1 to .*, got -1",
        ),
        ({"assistant_model": "falconet"}, r"a loaded model, such as fk\.load\('falconet'\); got 'falconet'"),
    ],
)
def test_a_draft_of_another_type_is_refused(instruct, settings, message):
    with pytest.raises(ValueError, match=message):
        instruct.generate(QUESTION, **settings)


def test_two_drafts_at_once_are_refused(instruct, draft):
    with pytest.raises(ValueError, match=r"assistant_model and prompt_lookup_num_tokens are two ways .*: give one"):
        instruct.generate(QUESTION, assistant_model=draft, prompt_lookup_num_tokens=3)


def test_a_draft_model_of_another_vocabulary_is_refused(instruct):
    other = small_model("40b", vocab_size=4096)
    with pytest.raises(ValueError, match="a vocabulary of 4096 tokens and the model one of 2048: choose"):
        instruct.stream(QUESTION, assistant_model=other)


def test_a_draft_with_another_tokenizer_gives_the_models_own_text(instruct):
    other = replace(instruct, model=small_model("7b", vocab_size=4096))
    expected = instruct.generate(QUESTION, max_new_tokens=12)
    for settings in (
        {"assistant_model": other},
        {"assistant_model": other.model, "assistant_tokenizer": other.tokenizer},
    ):
        assert instruct.generate(QUESTION, max_new_tokens=12, **settings).tokens == expected.tokens


@pytest.mark.parametrize("named", [{}, {"assistant_tokenizer": True}])
def test_a_draft_with_another_tokenizer_is_refused_for_sampling_and_stays_whole(instruct, draft, named):
    other = draft if named else replace(instruct, model=small_model("7b", vocab_size=4096))
    settings, head = dict.fromkeys(named, other.tokenizer), other.model.lm_head
    for sampling in ({"temperature": 0.7}, {"do_sample": True}):
        with pytest.raises(ValueError, match=r"a draft with another tokenizer is for do_sample=False, .*: give that"):
            instruct.generate(QUESTION, assistant_model=other, **settings, **sampling)
    assert other.model.lm_head is head
    assert instruct.generate(QUESTION, assistant_model=other, do_sample=False, max_new_tokens=3, **settings).tokens


def test_settings_about_tokens_do_not_reach_a_draft_that_has_other_tokens(instruct):
    other = replace(instruct, model=small_model("7b", vocab_size=4096))
    settings = {"logits_processor": [lambda ids, logits: logits + torch.zeros(2048)]}
    settings = {**GREEDY, "max_new_tokens": 12, **settings}
    expected = instruct.generate(QUESTION, **settings).tokens
    assert instruct.generate(QUESTION, assistant_model=other, **settings).tokens == expected


@pytest.mark.parametrize("mode", MODES)
def test_a_guidance_scale_that_would_count_rejected_tokens_is_refused(instruct, draft, mode, monkeypatch):
    error = (
        "^with a draft, guidance_scale gives other text, since transformers counts rejected tokens as text: "
        "give guidance_scale=1, or neither assistant_model nor prompt_lookup_num_tokens$"
    )
    with pytest.raises(ValueError, match=error):
        instruct.generate(QUESTION, guidance_scale=1.5, **assistance(mode, draft))
    monkeypatch.setattr(instruct.model.generation_config, "guidance_scale", 1.5)
    with pytest.raises(ValueError, match=error):
        instruct.generate(QUESTION, **assistance(mode, draft))
    answer = instruct.generate(QUESTION, guidance_scale=1, **GREEDY, **assistance(mode, draft))
    assert answer.tokens == instruct.generate(QUESTION, guidance_scale=1, **GREEDY).tokens
