"""What a Falcon answers to conversations that it was not trained on: does it end by itself, is it right to the word?"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from falcon_kit.generation.chat import encode, render
from falcon_kit.generation.generate import generate
from falcon_kit.generation.text import Generation
from falcon_kit.loading.falcon import Falcon

_AT_ONCE = 16
_LONGEST = 256  # tokens of an answer

Messages = Sequence[Mapping[str, Any]]


def answer_rates(falcon: Falcon, documents: Iterable[Mapping[str, Any]], count: int, context: int) -> dict[str, float]:
    """Shares of the last answers, written greedily without stop strings, that end by themselves and that are exact.

    documents: of `fk.dialogues`; up to `count` conversations that fit into `context` tokens are asked. Empty if none
    does.
    """
    asked = list(islice(_fitting(falcon, documents, context), count))
    if not asked:
        return {}
    expected = [messages[-1]["content"].strip() for messages in asked]
    longest = max(len(ids) for ids in falcon.tokenizer(expected)["input_ids"])
    written = _write(falcon, asked, min(_LONGEST, longest + 16))
    exact = [str(each) == wanted for each, wanted in zip(written, expected, strict=True)]
    return {
        "stop rate": sum(each.finish_reason == "eos" for each in written) / len(written),
        "exact answers": sum(exact) / len(written),
    }


def _fitting(falcon: Falcon, documents: Iterable[Mapping[str, Any]], context: int) -> Iterator[Messages]:
    """Conversations that fit whole: of one that was cut for training, the last answer was never read."""
    for document in documents:
        messages = document["messages"]
        if not messages:
            continue
        if len(encode(messages, falcon.tokenizer, falcon.chat_format, add_generation_prompt=False)) <= context:
            yield messages


def _write(falcon: Falcon, asked: Sequence[Messages], most: int) -> list[Generation]:
    written: list[Generation] = []
    for start in range(0, len(asked), _AT_ONCE):
        prompts = [render(messages[:-1], falcon.chat_format) for messages in asked[start : start + _AT_ONCE]]
        settings: Any = {"max_new_tokens": most, "do_sample": False, "strip": True}
        written += generate(falcon.model, falcon.tokenizer, prompts, **settings)  # type: ignore[arg-type]  # a list for a list
    return written
