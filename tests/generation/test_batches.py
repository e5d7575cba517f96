"""`Falcon.generate_each`: any number of prompts, in batches, each with the text that it has alone."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest

import falcon_kit as fk

CONTEXT = 2048
CHATS = [[{"role": "user", "content": f"What do {animal} eat?"}] for animal in ("owls", "giraffes", "lions", "otters")]
TEXTS = ["The giraffe", "Animals of Africa: " * 20, "Owls", "Counting: 7, 8,", "The lion is " * 60]
SETTINGS = {"max_new_tokens": 12, "do_sample": False}


def alone(falcon, prompt, **settings):
    call = falcon.chat if isinstance(prompt[0], dict) else falcon.generate
    return call(prompt, **settings)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_each_text_is_what_its_prompt_gives_alone(instruct, batch_size):
    ids = np.array(instruct.tokenizer("Zebras and")["input_ids"])
    prompts = [CHATS[0], TEXTS[0], TEXTS[1], CHATS[1], ids, *TEXTS[2:], *CHATS[2:]]
    found = list(instruct.generate_each(prompts, batch_size=batch_size, stop="\n", **SETTINGS))
    expected = [alone(instruct, each, stop="\n", **SETTINGS) for each in prompts]
    assert [each.prompt for each in found] == [each.prompt for each in expected]
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    assert [each.text for each in found] == [each.text for each in expected]
    assert [each.finish_reason for each in found] == [each.finish_reason for each in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)
    assert max(each.stats.rows for each in found) <= batch_size


@pytest.mark.parametrize("settings", [{}, {"truncate": "left"}])
def test_a_prompt_that_nearly_fills_the_context_leaves_the_others_their_new_tokens(instruct, settings):
    long = [[15] * (CONTEXT - 3), [15] * (CONTEXT + (100 if settings else -5))]
    prompts = [TEXTS[0], long[0], TEXTS[2], long[1]]
    settings |= {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 0}
    lengths = [len(each.tokens) for each in instruct.generate_each(prompts, **settings)]
    assert lengths == [len(instruct.generate(each, **settings).tokens) for each in prompts]
    assert lengths[0] == lengths[2] == 8


def test_prompts_of_similar_lengths_share_a_batch(instruct):
    prompts = [[15] * length for length in (90, 3, 80, 2, 4, 85)]
    found = instruct.generate_each(prompts, batch_size=3, max_new_tokens=1)
    assert [each.stats.prompt_tokens for each in found] == [255, 9, 255, 9, 9, 255]


def test_prompts_are_read_as_they_are_needed(instruct):
    read = []
    prompts = (read.append(number) or f"Number {number} is" for number in count())
    texts = instruct.generate_each(prompts, batch_size=2, max_new_tokens=1)
    assert not read
    next(texts)
    assert len(read) == 16


def test_a_prompt_that_cannot_be_used_is_named_by_its_number(instruct):
    texts = instruct.generate_each([*TEXTS[:2], "", TEXTS[2]], batch_size=1, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"^prompt 3: the prompt is empty: give the model something to continue$"):
        list(texts)
    with pytest.raises(ValueError, match=r"^prompt 2: the prompt has 3001 tokens, the model's context is 2048"):
        list(instruct.generate_each(["The", [15] * 3001]))
    with pytest.raises(ValueError, match=r"^prompt 1: Message 1 has the role 'tool'"):
        list(instruct.generate_each([[{"role": "tool", "content": "Hi"}]]))


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        ("Hi", r"give a list of prompts, also for one: \[prompt\]"),
        ({"prompt": ["Hi"]}, "give a list of prompts, such as one column, not a dict"),
        (CHATS[0], r"give a list of conversations, also for one: \[messages\]"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused_at_once(instruct, prompts, text):
    with pytest.raises(ValueError, match=text):
        instruct.generate_each(prompts)


def test_a_table_is_refused_and_a_column_of_it_taken(instruct):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"prompt": TEXTS[:2]})
    with pytest.raises(ValueError, match="such as one column, not a DataFrame"):
        instruct.generate_each(table)
    assert len(list(instruct.generate_each(table["prompt"], max_new_tokens=1))) == 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_return_sequences": 2, "do_sample": True}, "each prompt gives one text"),
        ({"past_key_values": object()}, "past_key_values belongs to one prompt: leave it out"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1"),
        ({"tempreature": 1}, "Unknown setting 'tempreature'. Nearest: temperature"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(instruct, settings, text):
    with pytest.raises(ValueError, match=text):
        list(instruct.generate_each(TEXTS, **settings))


def test_a_seed_gives_the_same_texts_again(instruct):
    settings = {"batch_size": 2, "seed": 3, "do_sample": True, "max_new_tokens": 8}
    first, again = ([each.text for each in instruct.generate_each(TEXTS, **settings)] for _ in range(2))
    assert first == again != [each.text for each in instruct.generate_each(TEXTS, **{**settings, "seed": 4})]


def test_a_draft_model_reads_one_prompt_at_a_time(instruct):
    settings = {**SETTINGS, "assistant_model": fk.load("falconet")}
    found = list(instruct.generate_each(TEXTS[:3], **settings))
    assert [each.tokens for each in found] == [instruct.generate(each, **settings).tokens for each in TEXTS[:3]]
    assert {each.stats.rows for each in found} == {1}


def test_only_batches_of_one_run_a_compiled_step(instruct, monkeypatch):
    falcon, given = replace(instruct, decoding={"cache_implementation": "static"}), []
    generate = instruct.model.generate
    monkeypatch.setattr(
        instruct.model,
        "generate",
        lambda **options: given.append(options.get("cache_implementation")) or generate(**options),
    )
    for size in (1, 2):
        list(falcon.generate_each(TEXTS[:2], batch_size=size, max_new_tokens=1))
    assert given == ["static", "static", None]


def test_guardrails_check_each_prompt_and_each_text(instruct):
    guard = fk.guardrails(custom=lambda text: "it is about lions" if "ions" in text else None)
    texts = instruct.generate_each([CHATS[0], CHATS[1], CHATS[2]], guardrails=guard)
    with pytest.raises(fk.Blocked, match="message blocked"):
        list(texts)
    texts = instruct.generate_each([CHATS[0], "The animals of Africa are the"], guardrails=fk.guardrails(custom=bool))
    with pytest.raises(fk.Blocked):
        next(texts)
    meals = fk.guardrails(custom=lambda text: "no leaves" if "leaves" in text else None)
    texts = instruct.generate_each([CHATS[0], CHATS[1]], guardrails=meals)
    assert next(texts).text == "Owls eat mice and moths."
    with pytest.raises(fk.Blocked, match="output blocked"):
        next(texts)
