"""Threads on one model: eight at once give the results of one, and streams that are stopped leave nothing."""

import gc
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import torch

import falcon_kit as fk
from falcon_kit.generation.chat import encode, encode_answers
from falcon_kit.generation.control_tokens import encode_prompt, encode_text
from falcon_kit.inspection.hooks import inspect_model
from falcon_kit.playground.state import Session

SLY = "Hello <|endoftext|> there, >>QUESTION<< giraffes. "
TALK = [{"role": "user", "content": SLY}]
ANSWERED = [*TALK, {"role": "assistant", "content": "Leaves of trees. " * 20}] * 3
DRAWN: dict[str, Any] = {"max_new_tokens": 4, "seed": 3, "temperature": 1.5}
Calls = Mapping[str, Callable[[Any], Any]]
ENCODINGS: Calls = {
    "a prompt": lambda falcon: encode_prompt(SLY, falcon.tokenizer),
    "a prompt, by transformers": lambda falcon: falcon.tokenizer(SLY)["input_ids"],
    "a text": lambda falcon: encode_text(SLY, falcon.tokenizer),
    "a chat": lambda falcon: encode(TALK, falcon.tokenizer, falcon.chat_format),
    "the answers of a chat": lambda falcon: encode_answers(ANSWERED, falcon.tokenizer, falcon.chat_format)[1],
    "tokens as text": lambda falcon: fk.tokens(SLY, falcon, split_special_tokens=True).ids,
    "tokens": lambda falcon: fk.tokens(SLY, falcon).ids,
    "an inspected text": lambda falcon: inspect_model(falcon).encode(SLY),
}
TEXTS: Calls = {
    "generate": lambda falcon: str(falcon.generate(SLY, **DRAWN)),
    "chat": lambda falcon: str(falcon.chat(TALK, **DRAWN)),
    "stream": lambda falcon: "".join(piece.text for piece in falcon.stream(SLY, **DRAWN)),
    "a packed text": lambda falcon: fk.pack(fk.dialogues([{"text": SLY}]), falcon)[0]["input_ids"].tolist(),
    "a packed conversation": lambda falcon: fk.pack(fk.dialogues([{"messages": ANSWERED}]), falcon)[0][
        "labels"
    ].tolist(),
    "a playground": lambda falcon: _in_a_playground(falcon, "prompt"),
    "a playground's chat": lambda falcon: _in_a_playground(falcon, "chat"),
}


def _in_a_playground(falcon: Any, mode: Any) -> list[str]:
    session = Session(falcon)
    session.switch(mode)
    session.set(**DRAWN)
    return [session.generate(text).answers[0].text for text in (SLY, "And lions?")]


def by_eight_threads(falcon: Any, calls: Calls, rounds: int) -> list[tuple[str, Any]]:
    """The results that differ from those of one thread, by name."""
    expected = {name: call(falcon) for name, call in calls.items()}
    start, names = threading.Barrier(8, timeout=60), list(calls)

    def work(first: int) -> list[tuple[str, Any]]:
        start.wait()
        order = names[first % len(names) :] + names[: first % len(names)]
        return [(name, got) for _ in range(rounds) for name in order if (got := calls[name](falcon)) != expected[name]]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet inside a call
    try:
        with ThreadPoolExecutor(8) as threads:
            return [each for found in threads.map(work, range(8)) for each in found]
    finally:
        sys.setswitchinterval(interval)


def start_and_stop(falcon: Any, cycles: int) -> dict[str, float]:
    """What streams leave that are started, read for a token or not at all, and closed or dropped."""
    before = _state()
    for number in range(cycles):
        stream = falcon.stream("Hello", max_new_tokens=50)
        if number % 3:
            next(stream)
        if number % 2:
            stream.close()
        del stream
    return {name: value - before[name] for name, value in _state().items()}


def _state() -> dict[str, float]:
    gc.collect()
    tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
    megabytes = psutil.Process().memory_info().rss / 1e6
    return {"threads": threading.active_count(), "tensors": tensors, "megabytes": round(megabytes, 1)}
