"""`Falcon`: what `fk.load` returns, and how it shows itself."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import falcon_kit as fk
from falcon_kit.generation.chat import encode, render_prompt
from tests.conftest import logits, small_model


def test_a_falcon_unpacks_into_model_and_tokenizer(instruct):
    model, tokenizer = instruct
    assert (model, tokenizer) == (instruct.model, instruct.tokenizer)


def test_a_falcon_is_equal_to_itself_alone_and_can_be_a_key(instruct):
    other = replace(instruct)
    assert {instruct: 1, other: 2} == {instruct: 1, other: 2}
    assert instruct != other


@pytest.mark.parametrize(
    ("settings", "compiled"),
    [
        ({}, True),
        ({"num_beams": 1, "use_cache": True, "assistant_model": None, "past_key_values": None}, True),
        ({"num_beams": 2}, False),
        ({"use_cache": False}, False),
        ({"cache_implementation": "dynamic"}, False),
        ({"prompt_lookup_num_tokens": 3}, False),
    ],
)
def test_decoding_stays_compiled_unless_a_setting_needs_another_way(instruct, settings, compiled):
    falcon = replace(instruct, decoding={"cache_implementation": "static"})
    assert (falcon._with_decoding(settings).get("cache_implementation") == "static") == compiled


@pytest.mark.parametrize("own", [{"num_beams": 2}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}])
def test_decoding_is_not_compiled_where_the_checkpoint_needs_another_way(instruct, monkeypatch, own):
    falcon = replace(instruct, decoding={"cache_implementation": "static"})
    monkeypatch.setattr(instruct.model, "generation_config", GenerationConfig(eos_token_id=11, pad_token_id=11, **own))
    assert falcon._with_decoding({}) == {}
    assert falcon._with_decoding({"num_beams": 1, "use_cache": True}).get("cache_implementation") == (
        None if "prompt_lookup_num_tokens" in own else "static"
    )
    assert falcon.generate("Hi", max_new_tokens=3, do_sample=False).tokens


# Conversations longer than the context

SYSTEM = {"role": "system", "content": "Answer briefly."}
LONG = [
    message
    for number in range(90)
    for message in (
        {"role": "user", "content": f"Question {number}: what do giraffes eat?"},
        {"role": "assistant", "content": "Giraffes eat acacia leaves. " * (number % 4 + 1)},
    )
]
LAST = {"role": "user", "content": "What do owls eat?"}


@pytest.mark.parametrize(
    ("settings", "room"),
    [
        ({}, 2048 - 200),
        ({"max_new_tokens": 20}, 2048 - 20),
        ({"max_new_tokens": 1500}, 2048 - 1024),  # new tokens get at most half the context
        ({"max_length": 100}, 100 - 1),
    ],
)
@pytest.mark.parametrize("system", [[SYSTEM], []])
def test_of_a_long_chat_the_oldest_turns_are_dropped_and_never_the_system_message(instruct, settings, room, system):
    fitting = [[*system, *LONG[begin:], LAST] for begin in range(0, len(LONG), 2)]
    lengths = [len(encode(each, instruct.tokenizer, instruct.chat_format)) for each in fitting]
    longest = next(each for each, length in zip(fitting, lengths, strict=True) if length <= room)
    long = [*system, *LONG, LAST]
    answer = instruct.chat(long, truncate="left", do_sample=False, **settings)
    assert answer.prompt == render_prompt(longest, instruct.tokenizer, instruct.chat_format)
    stream = instruct.stream(long, truncate="left", do_sample=False, **settings)
    assert (*(piece.token_id for piece in stream),) == answer.tokens


def test_a_single_message_that_is_too_long_loses_its_beginning(instruct):
    answer = instruct.chat([SYSTEM, {"role": "user", "content": "word " * 3000}], truncate="left", max_new_tokens=8)
    assert answer.prompt.endswith("word word\nFalcon:")
    assert answer.stats.prompt_tokens == 2040


# Saved


@pytest.mark.parametrize("dtype", ["auto", "float32", "int4", "nf4"])
def test_a_saved_falcon_loads_as_it_was(dtype, tmp_path):
    falcon = fk.load("falconet-instruct", dtype=dtype, chat="hub")
    falcon.model.generation_config.repetition_penalty = 1.1
    expected = logits(falcon.model)
    again = fk.load(falcon.save(tmp_path / "a" / "mine"))
    assert torch.equal(logits(again.model), expected)
    assert (again.dtype, again.generation_settings) == (falcon.dtype, falcon.generation_settings)
    assert (again.chat_format.name, again.tokenizer.chat_template) == ("hub", falcon.tokenizer.chat_template)
    assert falcon.name == "falconet-instruct"


def test_transformers_reads_a_saved_falcon(instruct, tmp_path):
    folder = instruct.save(str(tmp_path / "mine"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=instruct.model.dtype)
    assert sorted(model.state_dict()) == sorted(instruct.model.state_dict())
    talk = [{"role": "user", "content": "Hi"}]
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(talk, tokenize=False)
    assert rendered == instruct.tokenizer.apply_chat_template(talk, tokenize=False)


def test_a_checkpoint_stays_whole_where_saving_over_it_fails(instruct, tmp_path, monkeypatch):
    folder = instruct.save(tmp_path / "mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(type(instruct.tokenizer), "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):  # noqa: PT011  # the one above
        instruct.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_saving_removes_no_file_of_the_user(instruct, tmp_path):
    (tmp_path / "notes.md").write_text("a week of work")
    with pytest.raises(FileExistsError, match=r"directory='.*' holds notes\.md, which saving a model there would"):
        instruct.save(tmp_path)
    assert (tmp_path / "notes.md").read_text() == "a week of work"


def test_a_falcon_that_is_not_whole_is_not_saved(tokenizer, tmp_path):
    small_model("7b").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    falcon = fk.load(tmp_path / "base")
    falcon.model.add_adapter(LoraConfig(target_modules=["query_key_value"]))
    with pytest.raises(ValueError, match=r"the model has adapters attached.*fk\.merge\(adapter, base, output_dir="):
        falcon.save(tmp_path / "adapted")
    offloaded = replace(falcon, model=small_model("7b").to("meta"))
    with pytest.raises(ValueError, match="a part of the model is offloaded to host memory or disk: load it completely"):
        offloaded.save(tmp_path / "offloaded")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# How a Falcon shows itself


def test_the_repr_gives_size_dtype_and_device(instruct):
    dtype, device = str(instruct.model.dtype).removeprefix("torch."), instruct.model.device
    assert repr(instruct) == f"Falcon(falconet-instruct, 4,856,320 parameters, {dtype} on {device})"


def test_the_html_escapes_the_name_of_a_directory(tokenizer, tmp_path):
    directory = tmp_path / "<img onerror=alert(1)>"
    small_model("7b").save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    page = fk.load(directory)._repr_html_()
    assert ("<img" in page, "&lt;img onerror=alert(1)&gt;" in page) == (False, True)
