"""Numbers, switches and texts that no function can use: each is refused in words, before any work is done."""

import inspect
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

import falcon_kit as fk
from falcon_kit.display.errors import shown
from falcon_kit.generation.prompts import least_tokens
from falcon_kit.generation.text import overlap
from falcon_kit.planning.plan import plan
from falcon_kit.playground.state import Session

TEXT = "The giraffe eats"
DOCUMENTS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}] * 4
CLOSED = "http://127.0.0.1:9/v1"
HUGE = "giraffes eat leaves. " * 100_000
HALF = "half \ud83e"


def setting(make, name):
    return lambda _, value: make(**{name: value})


SAMPLING = ("max_new_tokens", "max_length", "top_k", "num_return_sequences", "alternatives", "seed")
TUNING = "r max_steps per_device_train_batch_size gradient_accumulation_steps context eval_steps patience answers "
TUNING += "save_steps seed"
SHARES = "lora_alpha lora_dropout learning_rate warmup_ratio num_train_epochs max_grad_norm held_out"
CHECKS = ("secrets", "personal_data", "control_tokens", "injection", "repetition")

DRAFTED = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 1}
WHOLE = {
    **{f"Sampling {name}": setting(fk.Sampling, name) for name in SAMPLING},
    **{f"Tuning {name}": setting(fk.Tuning, name) for name in TUNING.split()},
    "guardrails max_characters": setting(fk.guardrails, "max_characters"),
    **{
        f"plan {name}": lambda _, value, name=name: plan("falconet", **{name: value})
        for name in ("context", "batch", "r", "tensor_parallel")
    },
    **{
        f"requirements {name}": lambda _, value, name=name: fk.requirements("falconet", 1, **{name: value})
        for name in ("context", "batch")
    },
    "requirements minutes": lambda _, value: fk.requirements("falconet", value),
    "load tensor_parallel": lambda _, value: fk.load("falconet", tensor_parallel=value),
    **{
        f"generate {name}": lambda falcon, value, name=name: falcon.generate(TEXT, **DRAFTED | {name: value})
        for name in ("prompt_lookup_num_tokens", "max_matching_ngram_size")
    },
    "generate a token id": lambda falcon, value: falcon.generate([5, value], max_new_tokens=1),
    "ablate layer": lambda falcon, value: fk.ablate(falcon, TEXT, heads=[(value, 0)]),
    "ablate head": lambda falcon, value: fk.ablate(falcon, TEXT, heads=[(0, value)]),
    "ablate top_k": lambda falcon, value: fk.ablate(falcon, TEXT, heads=[(0, 0)], top_k=value),
    "attention layers": lambda falcon, value: fk.attention(falcon, TEXT, layers=value),
    "attention heads": lambda falcon, value: fk.attention(falcon, TEXT, layers=0, heads=value),
    "attention max_bytes": lambda falcon, value: fk.attention(falcon, TEXT, layers=0, max_bytes=value),
    "attention prefill_chunk_size": lambda falcon, value: fk.attention(falcon, TEXT, prefill_chunk_size=value),
    "attention a token id": lambda falcon, value: fk.attention(falcon, [5, value]),
    "attribute steps": lambda falcon, value: fk.attribute(falcon, TEXT, steps=value),
    "attribute target": lambda falcon, value: fk.attribute(falcon, TEXT, target=value, steps=1),
    "lens top_k": lambda falcon, value: fk.lens(falcon, TEXT, top_k=value),
    "lens target": lambda falcon, value: fk.lens(falcon, TEXT, target=value),
    **{
        f"repeated_tokens {name}": lambda falcon, value, name=name: fk.repeated_tokens(falcon, **{name: value})
        for name in ("period", "copies", "seed")
    },
    **{
        f"evaluate {name}": lambda falcon, value, name=name: fk.evaluate(falcon, text=TEXT, **{name: value})
        for name in ("limit", "stride", "batch_size", "num_fewshot", "seed")
    },
    "mix seed": lambda _, value: fk.mix(fk.dialogues(DOCUMENTS), ["Some text."], 0.1, seed=value),
    "split seed": lambda _, value: fk.dialogues(DOCUMENTS).split(0.5, seed=value),
    "pack context": lambda falcon, value: fk.pack(fk.dialogues(DOCUMENTS), falcon, value),
    "AttentionView.map": lambda falcon, value: fk.attention(falcon, TEXT, layers=0).map(0, value),
    "AttentionView.top": lambda falcon, value: fk.attention(falcon, TEXT).top(count=value),
    "LensView.figure": lambda falcon, value: fk.lens(falcon, TEXT).figure(value),
    "LensView.next_tokens": lambda falcon, value: fk.lens(falcon, TEXT).next_tokens(value),
    "Session.edit": lambda falcon, value: Session(falcon).edit(value, "text"),
    "connect context": lambda _, value: fk.connect(CLOSED, context=value, retries=0),
    "connect retries": lambda _, value: fk.connect(CLOSED, retries=value),
}
NUMBERS = {
    **{f"Sampling {name}": setting(fk.Sampling, name) for name in ("temperature", "top_p")},
    **{f"Tuning {name}": setting(fk.Tuning, name) for name in SHARES.split()},
    "load max_memory": lambda _, value: fk.load("falconet", max_memory={"cpu": value}),
    "guardrails threshold": setting(fk.guardrails, "threshold"),
    "mix web_fraction": lambda _, value: fk.mix(fk.dialogues(DOCUMENTS), ["Some text."], value),
    "split share": lambda _, value: fk.dialogues(DOCUMENTS).split(value),
    "attribute tolerance": lambda falcon, value: fk.attribute(falcon, TEXT, tolerance=value),
    "connect timeout": lambda _, value: fk.connect(CLOSED, timeout=value, retries=0),
    "connect deadline": lambda _, value: fk.connect(CLOSED, deadline=value, retries=0),
}
OF_TRANSFORMERS = [
    name for name in re.findall(r"^ +(\w+):? \(`bool`", GenerationConfig.__doc__, re.MULTILINE) if name != "do_sample"
]
SWITCHES = {
    "evaluate chat": lambda falcon, value: fk.evaluate(falcon, text=TEXT, chat=value),
    "Sampling do_sample": setting(fk.Sampling, "do_sample"),
    **{f"Tuning {name}": setting(fk.Tuning, name) for name in ("packing", "gradient_checkpointing", "shard")},
    **{f"guardrails {name}": setting(fk.guardrails, name) for name in CHECKS},
    "load compile": lambda _, value: fk.load("falconet", compile=value),
    "load force": lambda _, value: fk.load("falconet", force=value),
    "load local_files_only": lambda _, value: fk.load("falconet", local_files_only=value),
    "pack together": lambda falcon, value: fk.pack(fk.dialogues(DOCUMENTS), falcon, together=value),
    "plan gradient_checkpointing": lambda _, value: plan("falconet", gradient_checkpointing=value),
    "requirements weights": lambda _, value: fk.requirements("falconet", 1, weights=value),
    "tokens split_special_tokens": lambda falcon, value: fk.tokens(TEXT, falcon, split_special_tokens=value),
    **{
        f"tune {name}": lambda falcon, value, name=name: fk.tune(falcon, DOCUMENTS, **{name: value})
        for name in ("resume", "force", "quiet")
    },
    **{
        f"{method} {name}": lambda falcon, value, name=name, method=method: getattr(falcon, method)(
            TEXT, **{name: value}
        )
        for name in ("do_sample", "strip", *OF_TRANSFORMERS)
        for method in ("generate", "stream")
    },
    "chat do_sample": lambda falcon, value: falcon.chat(DOCUMENTS[0]["messages"][:1], do_sample=value),
}
ARRAYS = (np.array([True, False]), torch.tensor([True, False]), np.array([False]), torch.tensor([[False]]))
CASES = [
    *(
        (name, call, (True, "3", math.nan, math.inf, 10**400, 10**5000, -5000, 1.5, [[3]]))
        for name, call in WHOLE.items()
    ),
    *((name, call, (True, "0.5", math.nan, math.inf, 10**400, 10**5000, -5, [0.5])) for name, call in NUMBERS.items()),
    *((name, call, ("no", 2, "true", math.nan, 10**5000, *ARRAYS)) for name, call in SWITCHES.items()),
]


@pytest.mark.parametrize(("case", "call", "values"), CASES, ids=[case[0] for case in CASES])
def test_what_is_no_number_in_the_range_is_refused_with_the_range(instruct, case, call, values):
    for value in values:
        if "target" in case and value == "3":  # a text, and one token
            continue
        with pytest.raises((ValueError, IndexError)) as refused:
            call(instruct, value)
        message = str(refused.value)
        assert len(message) < 300
        assert "not supported between" not in message
        assert "int string conversion" not in message
        assert "ambiguous" not in message


def test_every_switch_of_a_public_function_is_in_this_table():
    functions = {name: each for name in fk.__all__ if inspect.isfunction(each := getattr(fk, name))}
    assert SWITCHES.keys() >= {
        f"{name} {each.name}"
        for name, function in functions.items()
        for each in inspect.signature(function).parameters.values()
        if re.match(r"(<class ')?bool\b", str(each.annotation))
    }


@pytest.mark.parametrize("temperature", [1e-40, 1e-31, 1e31])
def test_a_temperature_that_float32_cannot_divide_by_is_refused_with_the_range(temperature):
    with pytest.raises(ValueError, match="temperature must be 0, or from 1e-30 to 1e"):
        fk.Sampling(temperature=temperature)


@pytest.mark.parametrize("temperature", [0, 1e-30, 1e-7, 1, 1e30])
def test_any_other_temperature_generates(instruct, temperature):
    assert instruct.generate("Hello", temperature=temperature, max_new_tokens=2, seed=0).text


@pytest.mark.parametrize("port", [99999, 0, -1, "x"])
def test_a_port_that_does_not_exist_is_no_url(port):
    with pytest.raises(ValueError, match="is no endpoint URL"):
        fk.connect(f"http://127.0.0.1:{port}/v1", retries=0)


HALVES = {
    "generate": lambda falcon: falcon.generate(HALF),
    "one of several": lambda falcon: falcon.generate(["a", HALF]),
    "stream": lambda falcon: falcon.stream(HALF),
    "chat": lambda falcon: falcon.chat([{"role": "user", "content": HALF}]),
    "stream a chat": lambda falcon: falcon.stream([{"role": "user", "content": HALF}]),
    **{
        name: lambda falcon, name=name: getattr(fk, name)(falcon, HALF)
        for name in ("lens", "attention", "explain", "attribute")
    },
    "lens target": lambda falcon: fk.lens(falcon, TEXT, target="\ud83e"),
    "stop": lambda falcon: falcon.generate("a", stop=HALF),
    "stop_strings": lambda falcon: falcon.generate("a", stop_strings=[HALF]),
    "stop in a list": lambda falcon: falcon.generate("a", stop=[HALF]),
}


@pytest.mark.parametrize("call", HALVES.values(), ids=HALVES)
def test_half_a_surrogate_pair_is_refused(instruct, call):
    with pytest.raises(ValueError, match="has a lone surrogate"):
        call(instruct)


NAMES = {
    "chat_format": lambda falcon: fk.chat_format(3),
    "load": lambda falcon: fk.load("falconet", chat=3),
    "statistic": lambda falcon: fk.attention(falcon, TEXT).top(3),
    "replacement": lambda falcon: fk.ablate(falcon, TEXT, heads=[(0, 0)], replace=3),
    "method": lambda falcon: fk.attribute(falcon, TEXT, method=3),
    "api": lambda falcon: fk.connect(CLOSED, api=3),
}


@pytest.mark.parametrize("call", NAMES.values(), ids=NAMES)
def test_what_is_no_text_is_no_name(instruct, call):
    with pytest.raises((ValueError, LookupError), match=r"Unknown .* '?3'?\. Known: "):
        call(instruct)


# Limits first, work after


class Unread:
    """A tokenizer that fails the test when it encodes a text."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        assert name not in ("backend_tokenizer", "encode")
        return getattr(self._tokenizer, name)

    def __call__(self, *_, **__):
        raise AssertionError("the text was encoded")


LONG = {
    "generate": lambda falcon: falcon.generate(HUGE),
    "one of several": lambda falcon: falcon.generate(["a", HUGE]),
    "stream": lambda falcon: falcon.stream(HUGE),
    "chat": lambda falcon: falcon.chat([{"role": "user", "content": HUGE}]),
    "stream a chat": lambda falcon: falcon.stream([{"role": "user", "content": HUGE}]),
}


@pytest.mark.parametrize("call", LONG.values(), ids=LONG)
def test_a_text_far_over_the_context_is_refused_without_encoding_it(instruct, call):
    falcon = replace(instruct, tokenizer=Unread(instruct.tokenizer))
    with pytest.raises(ValueError, match=r"has 2,100,000 characters, which are at least .* context is 2048: shorten"):
        call(falcon)


@pytest.mark.parametrize("inspect", [fk.attention, fk.lens, fk.attribute])
def test_an_inspected_text_far_over_the_context_is_refused_without_encoding_it(instruct, inspect):
    with pytest.raises(ValueError, match="the text has 2,100,000 characters, which are at least"):
        inspect((instruct.model, Unread(instruct.tokenizer)), HUGE)


@pytest.mark.parametrize("mode", ["prompt", "chat"])
def test_the_playground_does_not_encode_a_draft_far_over_the_context(instruct, mode):
    session = Session(replace(instruct, tokenizer=Unread(instruct.tokenizer)))
    session.switch(mode)
    session.draft = HUGE
    assert session.meter().used > 2048
    assert "characters, which are at least" in session.generate().answers[0].reason


def test_the_playground_counts_the_tokens_of_a_draft_once(instruct):
    session = Session(instruct)
    session.draft = TEXT
    used = session.meter().used
    session.columns[0].falcon = replace(instruct, tokenizer=Unread(instruct.tokenizer))
    assert session.meter().used == used == len(instruct.tokenizer(TEXT)["input_ids"])


@given(st.text(max_size=40), st.integers(1, 5000))
def test_a_text_has_at_least_the_tokens_of_its_lower_bound(tokenizer, text, copies):
    text *= copies
    assert least_tokens(text, tokenizer) <= len(tokenizer(text, verbose=False)["input_ids"])


@pytest.mark.parametrize("settings", [{"stop": "a" * 10**6}, {"stop": ["abc"] * 10**5}, {"stop_strings": "a" * 10**6}])
def test_stop_strings_have_a_limit(instruct, settings):
    with pytest.raises(ValueError, match="the limit for all stop strings together is 10000"):
        instruct.generate("Hello", max_new_tokens=5, **settings)


def test_a_call_gives_a_limited_number_of_texts(instruct):
    with pytest.raises(ValueError, match="num_return_sequences must be at most 1024, got 1000000: call again"):
        instruct.generate("Hello", num_return_sequences=10**6, do_sample=True)


def test_guardrails_do_not_read_a_text_far_over_their_limit():
    judged = []
    verdict = fk.guardrails(custom=judged.append).check(HUGE)
    assert str(verdict) == "prompt blocked by length: more than 8000 characters (characters 8000 to 2100000)"
    assert judged == []


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), max_size=3))
def test_the_overlap_with_a_stop_string_is_the_longest_suffix_that_begins_one(text, stop):
    expected = max(
        (length for word in stop for length in range(min(len(word), len(text) + 1)) if text.endswith(word[:length])),
        default=0,
    )
    assert overlap(text, tuple(stop)) == expected


@given(st.integers() | st.floats() | st.text() | st.lists(st.integers()) | st.just(10**5000))
def test_what_an_error_quotes_is_short(value):
    assert len(shown(value)) <= 60


WRITERS = {
    "evaluate": lambda falcon, path: fk.evaluate(falcon, text=TEXT, output_dir=path),
    "tune": lambda falcon, path: fk.tune(falcon, DOCUMENTS, output_dir=path, max_steps=1, quiet=True),
    "export_gguf": lambda falcon, path: fk.export_gguf(falcon, path),
    "explain": lambda falcon, path: fk.explain(falcon, TEXT).to_html(path),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_path_in_a_file_is_refused_and_the_file_named(instruct, write, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"below'? cannot be made: .*file is a file; give a path in a folder"):
        write(instruct, tmp_path / "file" / "below")


@pytest.mark.parametrize("place", ["/sys", "/proc"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("below", ["x", "x/y"])
def test_a_place_where_nothing_can_be_written_is_refused_and_named_whoever_asks(instruct, write, place, below):
    with pytest.raises(PermissionError, match=rf"{place}/{below}.* cannot be written: no file can be made in {place} "):
        write(instruct, Path(place, below))
