"""Arguments of transformers' generate: those with an effect work, also in a config and with an adapter; the others are
refused."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import CompileConfig, DynamicCache, GenerationConfig, StoppingCriteriaList

import falcon_kit as fk
from falcon_kit.generation import generate
from falcon_kit.generation.arguments import CACHE
from falcon_kit.generation.sampling import OTHER_NAMES
from tests.generation.test_generate import CHAT, PROMPTS, QUESTION


def test_a_generation_config_may_be_a_dict(instruct):
    assert len(instruct.generate(QUESTION, generation_config={"max_new_tokens": 3}).tokens) == 3


def test_settings_of_the_kit_in_a_generation_config_count(instruct):
    config = GenerationConfig(stop=["acacia"], max_new_tokens=9)
    assert instruct.generate(QUESTION, generation_config=config).finish_reason == "stop"


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ("no such thing", "generation_config must be a transformers.GenerationConfig or a dict, got 'no such thing'"),
        ({"max_tokens": 3}, "Unknown setting 'max_tokens'"),
        (GenerationConfig(max_tokens=3), "Unknown setting 'max_tokens'"),
    ],
)
def test_a_generation_config_that_cannot_count_is_refused(instruct, config, error):
    with pytest.raises(ValueError, match=error):
        instruct.generate(QUESTION, generation_config=config)


def test_the_end_token_of_a_generation_config_ends_an_answer(instruct):
    end = instruct.chat(CHAT).tokens[2]
    config = GenerationConfig(eos_token_id=end)
    assert instruct.chat(CHAT, generation_config=config).tokens == instruct.chat(CHAT, eos_token_id=end).tokens
    *_, last = instruct.stream(CHAT, generation_config=config)
    assert last.token_id == end


def test_several_answers_in_a_generation_config_are_refused_in_a_chat(instruct):
    config = GenerationConfig(num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match="chat gives one answer"):
        instruct.chat(CHAT, generation_config=config)
    with pytest.raises(ValueError, match="a stream carries one text"):
        instruct.stream(CHAT, generation_config=config)


@pytest.mark.parametrize("name", ["inputs", "input_ids", "inputs_embeds"])
def test_a_second_prompt_is_refused(instruct, name):
    with pytest.raises(ValueError, match=f"{name} would replace the prompt: give token ids as the prompt"):
        instruct.generate("Hello", guardrails=fk.guardrails(), **{name: torch.tensor([[77, 78]])})


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"output_scores": True}, r"output_scores has no effect here: a Generation has .logprobs"),
        ({"output_logits": True}, r"with alternatives=N the most probable tokens"),
        ({"output_attentions": True}, r"fk.attention\(falcon, text\)"),
        ({"output_hidden_states": True}, r"fk.lens\(falcon, text\)"),
        ({"assistant_early_exit": 2}, "Falcon has no early exit. Give assistant_model or prompt_lookup_num_tokens"),
        ({"token_healing": True}, "leave a space at the end of the prompt out"),
        ({"min_p": 0.5}, "min_p has no effect without sampling: give do_sample=True too"),
        ({"typical_p": 0.5, "temperature": 0}, "typical_p has no effect without sampling"),
        ({"alternatives": 2, "num_beams": 2}, "beam search reports no alternatives: leave alternatives out"),
    ],
)
def test_what_would_have_no_effect_is_refused_with_what_has_one(instruct, settings, error):
    with pytest.raises(ValueError, match=error):
        instruct.generate(QUESTION, **settings)


OF_ANOTHER_KIND = {
    "num_beams": (-1, 0, 0.5, True, "2", [2]),
    "prefill_chunk_size": (0, -1, 2.5, True, "", [3]),
    "min_new_tokens": (-1, 1.5, True, "3", []),
    "no_repeat_ngram_size": (-1, 0.5, True, "3"),
    "repetition_penalty": (True, "", "1.5", float("nan"), 10**400, [1.0], np.ones(2), torch.ones(2)),
    "max_time": (True, "1", [], float("nan")),
    "use_cache": ("False", 0, 1.5, [], np.ones(2)),
    "early_stopping": ("always", 1, np.ones(2)),
    "assistant_early_exit": ("1", np.ones(2)),
    "assistant_ensemble_weight": ("0.5", np.ones(2)),
    "num_return_sequences": ("2", np.ones(2)),
    "max_new_tokens": ("2", np.ones(2)),
    "logits_processor": (print, 5, [None], "x", {"a": 1}),
    "stopping_criteria": (print, True, [3], {"a": 1}),
    "streamer": (print, True, []),
    CACHE: (True, {}, "x"),
    "eos_token_id": (True, "<|endoftext|>", 1.5, ["a"], [[1]], {1}),
}


@pytest.mark.parametrize("name", OF_ANOTHER_KIND)
def test_an_argument_of_another_kind_is_refused_before_the_model_runs(instruct, forwards, name):
    for value in OF_ANOTHER_KIND[name]:
        settings = {"generation_config": {"max_length": 40}, "max_new_tokens": 2, name: value}
        with pytest.raises(ValueError, match=f"^{name} must be "):
            instruct.generate(QUESTION, **settings)
        with pytest.raises(ValueError, match=f"^{name} must be "):
            instruct.chat([{"role": "user", "content": "Hi"}], **settings)
    assert not forwards


NUMBERS = {
    "temperature": (2, {"seed": 3}),
    "repetition_penalty": (2, {}),
    "length_penalty": (3, {"num_beams": 2}),
    "max_time": (100, {}),
    "num_beams": (2, {}),
    "prefill_chunk_size": (2, {}),
    "min_new_tokens": (3, {}),
    "no_repeat_ngram_size": (1, {}),
}


@pytest.mark.parametrize("kind", [int, np.int64, np.float32, torch.tensor], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_counts_whatever_type_it_has(instruct, name, kind):
    number, others = NUMBERS[name]
    whole = name in ("num_beams", "prefill_chunk_size", "min_new_tokens", "no_repeat_ngram_size")
    if whole and kind is np.float32:
        kind = np.int32
    others = {"max_new_tokens": 6} | others
    expected = instruct.generate(QUESTION, **others | {name: number if whole else float(number)})
    assert instruct.generate(QUESTION, **others | {name: kind(number)}).tokens == expected.tokens


@pytest.mark.parametrize("name", ["encoder_repetition_penalty", *NUMBERS])
def test_a_whole_number_in_a_checkpoint_counts_as_the_same_number_given(instruct, name, monkeypatch):
    number, others = NUMBERS.get(name, (2, {}))
    others = {"max_new_tokens": 6} | others
    expected = instruct.generate(QUESTION, **others | {name: number})
    monkeypatch.setattr(instruct.model.generation_config, name, number)
    monkeypatch.setattr(instruct.model.generation_config, "do_sample", "seed" in others)
    assert instruct.generate(QUESTION, **others).tokens == expected.tokens


@pytest.mark.parametrize("settings", [{}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}])
def test_an_early_exit_in_a_checkpoint_has_no_effect_and_leaves_the_model_whole(instruct, settings, monkeypatch):
    settings = {"max_new_tokens": 8} | settings
    expected = instruct.generate(QUESTION, **settings)
    monkeypatch.setattr(instruct.model.generation_config, "assistant_early_exit", 2)
    answer = instruct.generate(QUESTION, **settings)
    assert (answer.tokens, answer.accepted) == (expected.tokens, expected.accepted)
    assert instruct.model.config.num_hidden_layers == len(instruct.model.transformer.h)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("settings", [{"return_dict_in_generate": False}, {"pad_token_id": None}])
def test_settings_that_the_kit_chooses_itself_may_be_given(instruct, settings, beams):
    settings = {"num_beams": beams, "max_new_tokens": 4} | settings
    expected = instruct.generate(PROMPTS, num_beams=beams, max_new_tokens=4)
    assert [each.tokens for each in instruct.generate(PROMPTS, **settings)] == [each.tokens for each in expected]


@pytest.mark.parametrize(
    "name", ["custom_generate", "num_beams", "num_return_sequences", "alternatives", "logits_to_keep"]
)
def test_an_argument_that_is_none_counts_as_not_given(instruct, name):
    expected = instruct.generate(QUESTION, max_new_tokens=4).tokens
    assert instruct.generate(QUESTION, max_new_tokens=4, **{name: None}).tokens == expected
    assert instruct.chat(CHAT, max_new_tokens=4, **{name: None}).tokens == instruct.chat(CHAT, max_new_tokens=4).tokens
    assert len(list(instruct.stream(QUESTION, max_new_tokens=4, **{name: None}))) == 4


def test_without_a_mask_padding_stays_masked_even_where_it_is_the_end_token(instruct):
    expected = [instruct.generate(each, max_new_tokens=6).tokens for each in PROMPTS]
    batch = instruct.generate(PROMPTS, max_new_tokens=6, attention_mask=None, pad_token_id=11)
    assert [each.tokens for each in batch] == expected


def test_a_cache_that_is_none_leaves_decoding_compiled(instruct):
    compiled = dataclasses.replace(instruct, decoding={"cache_implementation": "static"})
    assert compiled._with_decoding({"cache_implementation": None, "num_beams": None}) == compiled.decoding


def test_the_falcons_own_tokenizer_may_stand_beside_stop_strings_as_in_transformers(instruct):
    settings = {"stop_strings": ["acacia"], "tokenizer": instruct.tokenizer}
    assert instruct.generate(QUESTION, **settings).finish_reason == "stop"
    assert instruct.chat(CHAT, **settings).finish_reason == "stop"
    stream = instruct.stream(QUESTION, **settings)
    assert "acacia" not in "".join(piece.text for piece in stream)


def test_another_tokenizer_is_refused(instruct):
    other = copy.copy(instruct.tokenizer)
    with pytest.raises(ValueError, match=r"another one than the Falcon's own, falcon\.tokenizer: leave it out"):
        instruct.generate(QUESTION, stop_strings=["acacia"], tokenizer=other)


def test_a_cache_for_batches_of_transformers_is_refused(instruct):
    with pytest.raises(ValueError, match=r"^cache_implementation='paged' is for transformers' generate_batch: leave"):
        instruct.generate(QUESTION, cache_implementation="paged")


def test_a_batch_is_padded_with_a_token_that_the_model_has(instruct):
    falcon = dataclasses.replace(instruct, tokenizer=copy.deepcopy(instruct.tokenizer))
    falcon.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert falcon.tokenizer.pad_token_id == 2048
    expected = [instruct.generate(each, max_new_tokens=4).tokens for each in PROMPTS]
    assert [each.tokens for each in falcon.generate(PROMPTS, max_new_tokens=4)] == expected


@pytest.mark.parametrize("token", [2048, -1])
def test_a_padding_of_the_callers_that_the_model_does_not_have_is_refused(instruct, token):
    with pytest.raises(ValueError, match=f"pad_token_id must be a whole number from 0 to 2047, got {token}"):
        instruct.generate(PROMPTS, pad_token_id=token)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_seed_counts_for_what_a_processor_of_the_callers_draws(instruct, beams):
    before = torch.get_rng_state()
    settings = {"logits_processor": [lambda ids, logits: logits + 5 * torch.randn_like(logits)], "num_beams": beams}
    texts = [instruct.generate(QUESTION, seed=seed, max_new_tokens=6, **settings).text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cache_that_a_compiled_model_keeps_works_after_inference_mode(instruct):
    decoding = {"cache_implementation": "static", "compile_config": CompileConfig()}
    falcon = dataclasses.replace(instruct, decoding=decoding)
    with torch.inference_mode():
        expected = falcon.generate(QUESTION, max_new_tokens=3).tokens
    assert falcon.generate(QUESTION, max_new_tokens=3).tokens == expected


def test_a_number_is_no_conversation(instruct):
    with pytest.raises(ValueError, match=r"A conversation is a list of messages, such as .*; got a int\."):
        instruct.chat(5)


def test_a_cache_has_the_name_of_any_transformers_but_not_two(instruct):
    for name in ("cache", "past_key_values"):
        given = DynamicCache(config=instruct.model.config)
        instruct.generate(QUESTION, max_new_tokens=3, **{name: given})
        assert given.get_seq_length() > 2
    with pytest.raises(ValueError, match=r"^past_key_values is the former name of cache: give cache alone$"):
        instruct.generate(QUESTION, max_new_tokens=3, cache=given, past_key_values=given)


# Other loops


@pytest.mark.parametrize("as_output", [False, True])
def test_a_loop_of_the_caller_may_return_tokens_or_an_output(instruct, as_output):
    def loop(model, input_ids, **_):
        sequences = torch.cat([input_ids, torch.full((len(input_ids), 3), 77)], 1)
        return SimpleNamespace(sequences=sequences, past_key_values=None) if as_output else sequences

    answer = instruct.generate(QUESTION, custom_generate=loop, max_new_tokens=3)
    assert (answer.tokens, answer.finish_reason, answer.logprobs) == ((77, 77, 77), "length", None)
    with pytest.raises(ValueError, match=r"^custom_generate cannot stream token by token: use generate\(\)$"):
        instruct.stream(QUESTION, custom_generate=loop)


HUB_LOOPS = {
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "high"},
    "num_beam_groups": {"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 1.0},
    "force_words_ids": {"force_words_ids": [[77]], "num_beams": 2},
    "constraints": {"constraints": [object()], "num_beams": 2},
}


@pytest.mark.parametrize("name", HUB_LOOPS)
def test_a_loop_whose_code_is_on_the_hub_is_refused_and_no_remote_code_is_advised(instruct, name, monkeypatch):
    error = rf"^{name}=.* needs code that transformers fetches from the hub and runs, .*: leave it out"
    with pytest.raises(ValueError, match=f"{error}$"):
        instruct.generate(QUESTION, **HUB_LOOPS[name])
    for each, value in HUB_LOOPS[name].items():
        monkeypatch.setattr(instruct.model.generation_config, each, value, raising=False)
    with pytest.raises(ValueError, match=rf"{error}, with falcon\.model\.generation_config\.{name} = None$"):
        instruct.generate(QUESTION)
    setattr(instruct.model.generation_config, name, None)
    assert instruct.generate(QUESTION, max_new_tokens=2).tokens


def test_a_loop_is_named_by_no_repository_and_no_folder(instruct, tmp_path):
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text("raise SystemExit('remote code ran')")
    for source in ("someone/loop", str(tmp_path)):
        with pytest.raises(ValueError, match=r"^custom_generate=.* names code that would be fetched and run"):
            instruct.generate(QUESTION, custom_generate=source)


# Models with an adapter of PEFT


def adapted(falcon, config):
    return get_peft_model(copy.deepcopy(falcon.model), config)


def test_a_model_with_an_adapter_takes_all_arguments_of_transformers(instruct):
    model = adapted(instruct, LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM"))
    ends = StoppingCriteriaList([lambda ids, *_, **__: torch.full((len(ids),), True)])
    answer = generate.generate(model, instruct.tokenizer, QUESTION, stopping_criteria=ends)
    assert (len(answer.tokens), answer.finish_reason) == (1, "stop")


def test_a_model_with_a_learned_prompt_generates_at_once(instruct):
    model = adapted(instruct, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert len(generate.generate(model, instruct.tokenizer, QUESTION, max_new_tokens=3).tokens) == 3
    with pytest.raises(ValueError, match=r"^a model with a learned prompt of PEFT cannot stream token by token"):
        generate.stream(model, instruct.tokenizer, QUESTION)


# Names of other libraries


@pytest.mark.parametrize("other", [*OTHER_NAMES])
def test_a_name_of_another_library_is_answered_with_the_one_here(instruct, other):
    name = OTHER_NAMES[other]
    with pytest.raises(ValueError, match=f"Unknown setting '{other}'. It is called {name} here."):
        instruct.generate(QUESTION, **{other: 1})
    usable = {"stop": ".", "temperature": 0.5, "num_return_sequences": 2, "repetition_penalty": 1.5}.get(name, 3)
    assert instruct.generate(QUESTION, **{"max_new_tokens": 3, "do_sample": True, name: usable})


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ({"system_prompt": "You are brief."}, "Begin the messages with"),
        ({"history": []}, "the whole conversation"),
        ({"logprobs": True}, "has .logprobs"),
        ({"truncation": True}, 'truncate="left"'),
        ({"batch_size": 4}, "generate_each takes any number of them, and on a Falcon batch_size"),
        ({"use_tqdm": True}, r"for text in tqdm\(falcon.generate_each\(prompts\), total=len\(prompts\)\)"),
        ({"callback": print}, "for piece in falcon.stream"),
        ({"return_full_text": False}, "has .prompt and .text"),
        (
            {"streamer": print},
            "streamer must be an object with put and end.*got <built-in function print>.*each piece of falcon.stream",
        ),
    ],
)
def test_what_is_done_in_another_way_here_is_said(instruct, given, instead):
    with pytest.raises(ValueError, match=instead):
        instruct.chat(CHAT, **given)
