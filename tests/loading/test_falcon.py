"""`Falcon`: what `fk.load` returns, and how it shows itself."""

import falcon_kit as fk
from tests.conftest import small_model


def test_a_falcon_unpacks_into_model_and_tokenizer(instruct):
    model, tokenizer = instruct
    assert (model, tokenizer) == (instruct.model, instruct.tokenizer)


# How a Falcon shows itself


def test_the_repr_gives_size_dtype_and_device(instruct):
    dtype, device = str(instruct.model.dtype).removeprefix("torch."), instruct.model.device
    assert repr(instruct) == f"Falcon(falconet-instruct, 4,856,320 parameters, {dtype} on {device})"


def test_the_html_escapes_the_name_of_a_directory(tokenizer, tmp_path):
    directory = tmp_path / "<img onerror=alert(1)>"
    small_model("7b").save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    assert "<img" not in fk.load(directory)._repr_html_()
