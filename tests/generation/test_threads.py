"""Eight threads on one model: encodings and texts are those of one thread, whatever the others set."""

import pytest

import falcon_kit as fk
from benchmarks._threads import ENCODINGS, SLY, TEXTS, by_eight_threads, start_and_stop
from falcon_kit.generation.control_tokens import encoding


def test_the_encodings_of_eight_threads_are_those_of_one(instruct):
    assert by_eight_threads(instruct, ENCODINGS, 60) == []


def test_the_texts_of_eight_threads_are_those_of_one(instruct):
    assert by_eight_threads(instruct, ENCODINGS | TEXTS, 1) == []


def test_a_result_that_differs_in_a_thread_is_found(instruct):
    results = iter(range(100))
    assert len(by_eight_threads(instruct, {"counted": lambda _: next(results)}, 1)) == 8


def test_streams_that_are_stopped_leave_no_thread_and_no_tensor(instruct):
    start_and_stop(instruct, 5)  # what is kept once
    left = start_and_stop(instruct, 40)
    assert (left["threads"], left["tensors"]) == (0, 0)


OURS = [name for name in ENCODINGS if "by transformers" not in name]


@pytest.mark.parametrize("name", [*OURS, "a packed text"])
def test_settings_of_the_shared_backend_neither_change_an_encoding_nor_are_changed(name):
    call = (ENCODINGS | TEXTS)[name]
    falcon = fk.load("falconet-instruct")
    backend, expected = falcon.tokenizer.backend_tokenizer, call(falcon)
    for split in (True, False):
        backend.encode_special_tokens = split
        backend.enable_padding(length=64)
        backend.enable_truncation(3)
        assert call(falcon) == expected
        kept = (backend.encode_special_tokens, backend.padding["length"], backend.truncation["max_length"])
        assert kept == (split, 64, 3)


@pytest.mark.parametrize("split", [None, True, False])
@pytest.mark.parametrize("own", [True, False])
def test_an_encoding_is_that_of_the_tokenizer(split, own):
    tokenizer = fk.load("falconet").tokenizer
    tokenizer.add_tokens(["<|tool|>", "giraffes"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.split_special_tokens = own
    text = SLY + "<|tool|> <|im_end|>\x00é🦒"
    found = encoding(text, tokenizer, split)
    expected = tokenizer(text, split_special_tokens=split, add_special_tokens=False, return_offsets_mapping=True)
    assert (found.ids, found.offsets) == (expected["input_ids"], expected["offset_mapping"])
