"""Eight threads on one model: encodings and texts are those of one thread, whatever the others set."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import falcon_kit as fk
from falcon_kit.generation.chat import encode, encode_text
from falcon_kit.generation.control_tokens import encode_prompt, encoding
from falcon_kit.inspection.hooks import inspect_model

SLY = "Hello <|endoftext|> there, >>QUESTION<< giraffes. "
TALK = [{"role": "user", "content": SLY}]
ENCODINGS = {
    "a prompt": lambda falcon: encode_prompt(SLY, falcon.tokenizer),
    "a prompt, by transformers": lambda falcon: falcon.tokenizer(SLY)["input_ids"],
    "a text": lambda falcon: encode_text(SLY, falcon.tokenizer),
    "a chat": lambda falcon: encode(TALK, falcon.tokenizer, falcon.chat_format),
    "tokens as text": lambda falcon: fk.tokens(SLY, falcon, split_special_tokens=True).ids,
    "tokens": lambda falcon: fk.tokens(SLY, falcon).ids,
    "an inspected text": lambda falcon: inspect_model(falcon).encode(SLY),
    "a packed text": lambda falcon: fk.pack(fk.dialogues([{"text": SLY}]), falcon)[0]["input_ids"].tolist(),
}
TEXTS = {
    "generate": lambda falcon: str(falcon.generate(SLY, max_new_tokens=4, seed=3, temperature=1.5)),
    "chat": lambda falcon: str(falcon.chat(TALK, max_new_tokens=4, seed=3, temperature=1.5)),
    "stream": lambda falcon: "".join(piece.text for piece in falcon.stream(SLY, max_new_tokens=4)),
}
CALLS = ENCODINGS | TEXTS


def by_eight_threads(falcon, calls, rounds):
    """What differs from the results of one thread: name and result."""
    expected = {name: call(falcon) for name, call in calls.items()}
    start = threading.Barrier(8)

    def work(first):
        start.wait()
        order = [*calls][first % len(calls) :] + [*calls][: first % len(calls)]
        return [(name, got) for _ in range(rounds) for name in order if (got := calls[name](falcon)) != expected[name]]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet inside a call
    try:
        with ThreadPoolExecutor(8) as threads:
            return [each for found in threads.map(work, range(8)) for each in found]
    finally:
        sys.setswitchinterval(interval)


def test_the_encodings_of_eight_threads_are_those_of_one(instruct):
    calls = {name: call for name, call in ENCODINGS.items() if name != "a packed text"}
    assert by_eight_threads(instruct, calls, 60) == []


def test_the_texts_of_eight_threads_are_those_of_one(instruct):
    assert by_eight_threads(instruct, CALLS, 2) == []


@pytest.mark.parametrize("name", [name for name in ENCODINGS if "by transformers" not in name])
def test_settings_of_the_shared_backend_neither_change_an_encoding_nor_are_changed(name):
    falcon = fk.load("falconet-instruct")
    backend, expected = falcon.tokenizer.backend_tokenizer, CALLS[name](falcon)
    for split in (True, False):
        backend.encode_special_tokens = split
        backend.enable_padding(length=64)
        backend.enable_truncation(3)
        assert CALLS[name](falcon) == expected
        assert (backend.encode_special_tokens, backend.padding["length"], backend.truncation["max_length"]) == (
            split,
            64,
            3,
        )


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
