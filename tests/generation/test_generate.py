"""Generation: transformers' own `generate` and plain arithmetic are the oracles."""

import copy
import dataclasses
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from falcon_kit.generation.generate import _cache_bytes, generate
from tests.conftest import small_model

QUESTION = "User: What do giraffes eat?\nFalcon:"
CHAT = [{"role": "user", "content": "What do giraffes eat?"}]
PROMPTS = [QUESTION, "User: Hello\nFalcon:", "Animals of Africa: giraffe, lion,"]
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.95, "seed": 7, "max_new_tokens": 24}


def oracle(falcon, prompt, **arguments):
    """The new token ids that transformers' own `generate` gives."""
    inputs = falcon.tokenizer(prompt, return_tensors="pt")
    output = falcon.model.generate(**inputs, pad_token_id=12, eos_token_id=11, **arguments)
    return [row[inputs["input_ids"].shape[1] :].tolist() for row in output]


# Equal to transformers


def test_greedy_tokens_are_those_of_transformers(instruct):
    expected = oracle(instruct, QUESTION, do_sample=False, max_new_tokens=40)[0]
    assert list(instruct.generate(QUESTION, max_new_tokens=40).tokens) == expected


def test_a_seed_gives_the_tokens_that_transformers_draws_with_it(instruct):
    torch.manual_seed(7)
    arguments = {name: value for name, value in SAMPLED.items() if name != "seed"}
    expected = oracle(instruct, QUESTION, **arguments)[0]
    assert list(instruct.generate(QUESTION, **SAMPLED).tokens) == expected


def test_several_sequences_are_those_of_transformers(instruct):
    torch.manual_seed(7)
    arguments = {name: value for name, value in SAMPLED.items() if name != "seed"}
    expected = oracle(instruct, QUESTION, num_return_sequences=3, **arguments)
    texts = [instruct.tokenizer.decode(row, skip_special_tokens=True) for row in expected]
    assert [each.text for each in instruct.generate(QUESTION, num_return_sequences=3, **SAMPLED)] == texts


def test_beam_search_is_that_of_transformers(instruct):
    expected = oracle(instruct, QUESTION, num_beams=3, max_new_tokens=12)[0]
    assert list(instruct.generate(QUESTION, num_beams=3, max_new_tokens=12).tokens) == expected


def test_other_arguments_of_transformers_pass_through(instruct):
    expected = oracle(instruct, PROMPTS[2], do_sample=False, repetition_penalty=1.5, max_new_tokens=20)[0]
    assert list(instruct.generate(PROMPTS[2], repetition_penalty=1.5, max_new_tokens=20).tokens) == expected


def test_sampling_without_top_k_draws_from_the_whole_vocabulary(instruct):
    torch.manual_seed(3)
    expected = oracle(instruct, QUESTION, do_sample=True, temperature=3.0, top_k=0, max_new_tokens=20)[0]
    assert list(instruct.generate(QUESTION, temperature=3.0, seed=3, max_new_tokens=20).tokens) == expected


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[::-1]])
def test_a_batch_gives_each_prompt_what_it_gets_alone(instruct, prompts):
    alone = [instruct.generate(prompt, max_new_tokens=32).text for prompt in prompts]
    assert [each.text for each in instruct.generate(prompts, max_new_tokens=32)] == alone


def test_a_batch_equals_single_prompts_in_every_layout(layout, tokenizer):
    model = small_model(layout)
    alone = [generate(model, tokenizer, prompt, max_new_tokens=24).tokens for prompt in PROMPTS]
    assert [each.tokens for each in generate(model, tokenizer, PROMPTS, max_new_tokens=24)] == alone


def test_a_batch_needs_no_token_for_the_end_or_for_padding(tokenizer):
    model, plain = small_model("40b"), copy.deepcopy(tokenizer)
    plain.eos_token = plain.pad_token = None
    alone = [generate(model, plain, prompt, max_new_tokens=8).tokens for prompt in PROMPTS]
    assert [each.tokens for each in generate(model, plain, PROMPTS, max_new_tokens=8)] == alone


# How a text ends


def test_the_end_token_ends_the_text(instruct):
    answer = instruct.generate(QUESTION)
    assert (answer.finish_reason, answer.tokens[-1]) == ("eos", 11)


def test_the_generation_configs_end_token_ends_a_text_as_in_transformers(instruct, monkeypatch):
    expected = instruct.generate(QUESTION).tokens
    monkeypatch.setattr(instruct.model.generation_config, "eos_token_id", expected[2])
    assert instruct.generate(QUESTION).tokens == expected[:3]


def test_the_tokenizers_end_token_counts_where_the_generation_config_has_none(instruct, monkeypatch):
    expected = instruct.generate(QUESTION).tokens
    monkeypatch.setattr(instruct.model.generation_config, "eos_token_id", None)
    assert instruct.generate(QUESTION).tokens == expected


def test_a_row_that_met_an_end_token_of_the_callers_ends_there(instruct):
    full = instruct.generate(PROMPTS[:2], max_new_tokens=30)
    end = full[0].tokens[3]
    ended = instruct.generate(PROMPTS[:2], max_new_tokens=30, eos_token_id=[11, end])[0]
    assert (ended.tokens, ended.finish_reason) == (full[0].tokens[: full[0].tokens.index(end) + 1], "eos")


def test_the_limit_of_new_tokens_ends_the_text(instruct):
    answer = instruct.generate(QUESTION, max_new_tokens=3)
    assert (answer.finish_reason, len(answer.tokens)) == ("length", 3)


def test_max_length_counts_the_prompt_too(instruct):
    prompt = instruct.tokenizer(QUESTION)["input_ids"]
    assert len(instruct.generate(QUESTION, max_length=len(prompt) + 3).tokens) == 3


def test_the_context_ends_the_text(tokenizer):
    model = small_model("40b", max_position_embeddings=32)
    prompt = tokenizer("giraffe " * 10)["input_ids"]
    answer = generate(model, tokenizer, "giraffe " * 10, max_new_tokens=100)
    assert len(prompt) + len(answer.tokens) == 32


def test_a_stop_string_ends_the_text_and_is_cut_from_it(instruct):
    full = instruct.generate(QUESTION).text
    answer = instruct.generate(QUESTION, stop="cia lea")  # begins and ends inside tokens
    assert (answer.text, answer.finish_reason) == (full[: full.index("cia lea")], "stop")


def test_each_row_of_a_batch_ends_at_its_own_stop_string(instruct):
    answers = instruct.generate(PROMPTS[:2], stop=["leaves", "Falconet"])
    assert [(each.finish_reason, each.text[-7:]) for each in answers] == [("stop", "acacia "), ("stop", "! I am ")]


def test_ctrl_c_in_generate_leaves_the_model_usable(instruct):
    expected = instruct.generate(QUESTION).text
    handle = instruct.model.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            instruct.generate(QUESTION)
    finally:
        handle.remove()
    assert instruct.generate(QUESTION).text == expected


# Chat


def test_a_chat_answer_is_the_continuation_of_the_rendered_turns_up_to_the_next(instruct):
    assert instruct.chat(CHAT).text == instruct.generate(QUESTION, stop="\nUser:").text.lstrip()


def test_a_chat_answer_ends_before_the_next_speaker(tokenizer, instruct):
    loud = dataclasses.replace(instruct, loaded_format=dataclasses.replace(instruct.chat_format, stop=(" leaves",)))
    assert loud.chat(CHAT).text == "Giraffes eat acacia"


@pytest.mark.parametrize("special", ["<|endoftext|>", ">>ANSWER<<", "<|pad|>"])
def test_a_special_token_in_a_message_stays_text(instruct, special):
    answer = instruct.chat([{"role": "user", "content": f"Hello {special} there"}], max_new_tokens=1)
    assert special in answer.prompt  # decoded from ids that spell it out ...
    ids = instruct._turns([{"role": "user", "content": f"Hello {special} there"}], {})["prompt"]
    assert [token for token in ids if token < 13] == []  # ... and none of which is a control token


def test_an_unknown_role_is_refused(instruct):
    with pytest.raises(ValueError, match="Message 1 has the role 'bot'; allowed are system, user, assistant"):
        instruct.chat([{"role": "bot", "content": "Hello"}])


def test_a_chat_gives_one_answer(instruct):
    with pytest.raises(ValueError, match="chat gives one answer"):
        instruct.chat(CHAT, num_return_sequences=2, top_k=5)


# Generation configs


@pytest.mark.parametrize("named", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"max_new_tokens": 4}])
def test_a_generation_config_counts_as_the_arguments_that_it_holds(instruct, named):
    settings = {"max_new_tokens": 12, "do_sample": False} | named
    config = GenerationConfig(**settings)
    assert (
        instruct.generate(QUESTION, generation_config=config).tokens == instruct.generate(QUESTION, **settings).tokens
    )


def test_an_argument_by_name_wins_over_the_generation_config(instruct):
    config = GenerationConfig(num_beams=2, max_length=200)
    answer = instruct.generate(QUESTION, generation_config=config, max_new_tokens=4, num_beams=1)
    assert (len(answer.tokens), len(answer.logprobs)) == (4, 4)


def test_a_checkpoint_that_asks_for_a_beam_search_gets_one(instruct, monkeypatch):
    expected = instruct.generate(QUESTION, num_beams=3, max_new_tokens=12).tokens
    monkeypatch.setattr(instruct.model.generation_config, "num_beams", 3)
    assert instruct.generate(QUESTION, max_new_tokens=12).tokens == expected


# Statistics


def test_the_cache_is_as_large_as_the_one_that_transformers_returns(instruct):
    inputs = instruct.tokenizer(QUESTION, return_tensors="pt")
    output = instruct.model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, pad_token_id=12)
    expected = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    assert instruct.generate(QUESTION, max_new_tokens=5).stats.cache_bytes == expected


def test_the_cache_takes_the_bytes_of_the_closed_form(instruct):
    answer = instruct.generate(QUESTION, max_new_tokens=5, stop=())
    kept = answer.stats.prompt_tokens + len(answer.tokens) - 1  # nothing is ever asked about the last token
    assert answer.stats.cache_bytes == instruct.spec.kv_bytes_per_token(instruct.model.dtype.itemsize) * kept


def test_the_bytes_of_a_quantised_cache_are_counted_as_quantised(instruct):
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    quantised = instruct.generate(PROMPTS[0] * 8, max_new_tokens=2, **options)
    full = instruct.generate(PROMPTS[0] * 8, max_new_tokens=2)
    assert 1 / 4 < quantised.stats.cache_bytes / full.stats.cache_bytes < 0.26  # 8 bits of every 32, and scales


def test_the_scales_of_a_quantised_cache_are_counted_wherever_they_are():
    scales = {"scale": torch.zeros(2), "zero": [torch.zeros(1)], "group_size": 64}  # as those of hqq
    layer = SimpleNamespace(_quantized_keys=(torch.zeros(4, dtype=torch.uint8), scales), values=torch.zeros(3))
    assert _cache_bytes(SimpleNamespace(layers=[layer])) == 4 + 4 * 3 + 4 * 3


def test_statistics_count_the_tokens_of_all_rows_without_padding(instruct):
    answers = instruct.generate(PROMPTS, max_new_tokens=4)
    prompts = sum(len(instruct.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    new = sum(len(each.tokens) for each in answers)
    assert (answers[0].stats.prompt_tokens, answers[0].stats.new_tokens) == (prompts, new)


def test_the_first_token_comes_before_the_last(instruct):
    stats = instruct.generate(QUESTION).stats
    assert 0 < stats.first_token_seconds < stats.seconds


# Bad input


def test_a_prompt_longer_than_the_context_names_both_lengths(instruct):
    with pytest.raises(ValueError, match=r'prompt has 3001 tokens, the model\'s context is 2048.*truncate="left"'):
        instruct.generate([15] * 3001)


def test_truncating_on_the_left_keeps_the_end_of_the_prompt(tokenizer):
    model = small_model("40b", max_position_embeddings=32)
    ids = tokenizer("one two three four five six seven " * 10)["input_ids"]
    expected = generate(model, tokenizer, ids[-24:], max_new_tokens=8).tokens
    assert generate(model, tokenizer, ids, max_new_tokens=8, truncate="left").tokens == expected


def test_truncating_leaves_a_prompt_half_the_context_at_least(tokenizer):
    model = small_model("40b", max_position_embeddings=32)
    lengths = {4: 4, 14: 14, 30: 16, 40: 16}
    written = {given: generate(model, tokenizer, [15] * given, max_new_tokens=32, truncate="left") for given in lengths}
    assert {given: each.stats.prompt_tokens for given, each in written.items()} == lengths


@pytest.mark.parametrize("token", [-1, 2048])
def test_a_token_id_that_the_model_has_not_is_refused_with_those_it_has(instruct, token):
    with pytest.raises(ValueError, match=f"{token} is no token id of this model, whose ids are 0 to 2047"):
        instruct.generate([15, token])


@pytest.mark.parametrize(
    ("wrong", "says"), [("", "is empty"), ("\ud83e", "has a lone surrogate"), ("giraffe " * 3000, "has .* tokens")]
)
def test_what_is_wrong_with_one_prompt_of_several_is_said_of_that_one(instruct, wrong, says):
    with pytest.raises(ValueError, match=f"prompt 2 of 3 {says}"):
        instruct.generate(["Hello", wrong, "Hello"])


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(instruct, prompt):
    with pytest.raises(ValueError, match="prompt is empty: give the model something to continue"):
        instruct.generate(prompt)


def test_several_sequences_without_sampling_are_refused(instruct):
    with pytest.raises(ValueError, match="num_return_sequences=3 without sampling would give 3 equal texts"):
        instruct.generate(QUESTION, num_return_sequences=3)


def test_a_prompt_over_max_length_loses_its_beginning_where_that_is_asked_for(instruct):
    ids = instruct.tokenizer(QUESTION)["input_ids"]
    expected = instruct.generate(ids[-4:], max_new_tokens=4).tokens
    assert instruct.generate(ids, max_length=8, truncate="left").tokens == expected
    kept = instruct.generate(ids, max_length=len(ids) + 3).tokens
    assert instruct.generate(ids, max_length=len(ids) + 3, truncate="left").tokens == kept


def test_a_max_length_that_the_prompt_fills_is_refused(instruct):
    with pytest.raises(ValueError, match=r"max_length=4 leaves no room: the prompt has \d+ tokens"):
        instruct.generate(QUESTION, max_length=4)


def test_generate_refuses_messages_and_names_what_takes_them(instruct):
    messages = [{"role": "user", "content": "What do giraffes eat?"}]
    with pytest.raises(ValueError, match="got a list with dict: chat and stream take messages"):
        instruct.generate(messages)
    assert instruct.chat(messages).text == "".join(piece.text for piece in instruct.stream(messages))


@pytest.mark.parametrize("prompt", [None, 5, b"hello", ["hello", 5], [["hello"]]])
def test_a_prompt_of_another_kind_is_refused(instruct, prompt):
    with pytest.raises(ValueError, match="a prompt is a text, a list of texts, or one list of token ids; got"):
        instruct.generate(prompt)


@pytest.mark.parametrize(("given", "nearest"), [("temprature", "temperature"), ("max_tokens", "max_new_tokens")])
def test_an_argument_that_nobody_knows_is_answered_with_the_nearest(instruct, given, nearest):
    with pytest.raises(ValueError, match=f"Unknown setting '{given}'. Nearest: .*{nearest}"):
        instruct.generate(QUESTION, **{given: 1})


@pytest.mark.parametrize(
    ("options", "advice", "take"),
    [
        ({}, r"got BatchEncoding: give its \['input_ids'\]$", lambda encoded: encoded["input_ids"]),
        (
            {"return_tensors": "pt"},
            r"got BatchEncoding: give its \['input_ids'\]\[0\]",
            lambda encoded: encoded["input_ids"][0],
        ),
    ],
)
def test_what_a_tokenizer_returns_is_answered_with_where_the_ids_are(instruct, options, advice, take):
    encoded = instruct.tokenizer(QUESTION, **options)
    with pytest.raises(ValueError, match=advice):
        instruct.generate(encoded)
    expected = instruct.generate(QUESTION, max_new_tokens=3).tokens
    assert instruct.generate(take(encoded), max_new_tokens=3).tokens == expected


def test_a_matrix_of_ids_is_answered_with_one_row_of_it(instruct):
    ids = instruct.tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match=r"got a list with list: give the ids of one text, such as ids\[0\]"):
        instruct.generate(ids)


# Memory that runs out


@pytest.fixture
def out_of_memory(instruct):
    """Makes the model's forward pass of this number fail."""
    handles = []

    def after(steps):
        passed = []

        def hook(*_):
            passed.append(1)
            if len(passed) > steps:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

        handles.append(instruct.model.register_forward_hook(hook))

    yield after
    for handle in handles:
        handle.remove()


def test_a_text_is_kept_when_memory_runs_out_in_its_middle(instruct, out_of_memory):
    expected = instruct.generate(QUESTION, max_new_tokens=8)
    out_of_memory(5)
    with pytest.raises(
        MemoryError, match=r"after 5 of up to 8 new tokens \(CUDA out of memory.*fewer new tokens"
    ) as error:
        instruct.generate(QUESTION, max_new_tokens=8)
    (kept,) = error.value.generations
    assert (kept.tokens, kept.finish_reason) == (expected.tokens[:5], "broken")
    assert expected.text.startswith(kept.text)


def test_a_stream_has_the_text_until_memory_ran_out(instruct, out_of_memory):
    out_of_memory(3)
    stream = instruct.stream(QUESTION, max_new_tokens=8)
    shown = [next(stream).text for _ in range(3)]
    with pytest.raises(MemoryError, match="after 3 of up to 8 new tokens"):
        next(stream)
    assert (stream.generation.text, stream.generation.finish_reason) == ("".join(shown), "broken")


def test_a_prompt_that_finds_no_memory_is_told_to_be_read_in_parts(instruct, out_of_memory):
    out_of_memory(0)
    with pytest.raises(MemoryError, match=r"while \d+ tokens were read .*prefill_chunk_size=256"):
        instruct.generate([QUESTION, QUESTION], max_new_tokens=8)


def test_another_error_stays_what_it_is(instruct):
    handle = instruct.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        instruct.generate(QUESTION, max_new_tokens=8)
    handle.remove()


# Weights that are no numbers

WAYS = {
    "greedy": {},
    "sampled": {"seed": 1, "temperature": 2.0, "top_k": 5},
    "a draft": {"prompt_lookup_num_tokens": 3},
    "alternatives": {"alternatives": 3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_nan_or_a_value_beyond_float16_ends_generation_with_the_reason(instruct, way, dtype):
    broken = dataclasses.replace(instruct, model=copy.deepcopy(instruct.model).to(dtype))
    with torch.no_grad():
        broken.model.transformer.h[0].mlp.dense_4h_to_h.weight[0] = 60000 if dtype == torch.float16 else torch.nan
    with pytest.raises(ValueError, match=r"the model's logits are nan: .*, or load it in bfloat16 or float32"):
        broken.generate(QUESTION, max_new_tokens=4, **WAYS[way])
    assert instruct.generate(QUESTION, max_new_tokens=4, **WAYS[way]).tokens
