"""`Falcon`: what `fk.load` returns, and how it shows itself."""

from dataclasses import replace

import pytest
from transformers import GenerationConfig

import falcon_kit as fk
from tests.conftest import small_model


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


# How a Falcon shows itself


def test_the_repr_gives_size_dtype_and_device(instruct):
    dtype, device = str(instruct.model.dtype).removeprefix("torch."), instruct.model.device
    assert repr(instruct) == f"Falcon(falconet-instruct, 4,856,320 parameters, {dtype} on {device})"


def test_the_html_escapes_the_name_of_a_directory(tokenizer, tmp_path):
    directory = tmp_path / "<img onerror=alert(1)>"
    small_model("7b").save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    assert "<img" not in fk.load(directory)._repr_html_()
