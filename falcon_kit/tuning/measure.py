"""Stop rate and exact answers on conversations that the model was not trained on, and texts that show what it forgets.

generated_texts.jsonl: 8 pages, stories and dialogues about animals in plain English, generated like the base text of
Falconet with another seed. A model reads them before and after a run: a higher loss shows that it forgets.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from falcon_kit.catalogue.spec import context_limit
from falcon_kit.generation.chat import encode, render_prompt
from falcon_kit.generation.control_tokens import encode_prompt
from falcon_kit.generation.generate import generate
from falcon_kit.generation.own_format import end_tokens
from falcon_kit.generation.text import Generation
from falcon_kit.loading.falcon import Falcon
from falcon_kit.tuning.data import dialogues
from falcon_kit.tuning.packing import Packed, pack

_BATCH = 16
_MAX_NEW_TOKENS = 256
GENERATED = Path(__file__).with_name("generated_texts.jsonl")

Messages = Sequence[Mapping[str, Any]]


def answer_rates(falcon: Falcon, documents: Iterable[Mapping[str, Any]], count: int, context: int) -> dict[str, float]:
    """Of the last answers, generated greedily without stop strings: the shares that end by eos_token and are exact.

    documents: of `fk.dialogues`; the first `count` conversations of at most `context` tokens are used. Empty if there
    are none.
    """
    conversations = list(islice(_fitting(falcon, documents, context), count))
    if not conversations:
        return {}
    expected = [messages[-1]["content"].strip() for messages in conversations]
    longest = max(len(encode_prompt(text, falcon.tokenizer)) for text in expected)
    answers = _answers(falcon, conversations, min(_MAX_NEW_TOKENS, longest + 16))
    exact = [str(answer) == text for answer, text in zip(answers, expected, strict=True)]
    return {
        "stop rate": sum(each.finish_reason == "eos" for each in answers) / len(answers),
        "exact answers": sum(exact) / len(answers),
    }


def short_rows(data: Any, falcon: Falcon) -> Packed:
    """Documents, in any form that `tune` takes, in rows of at most 512 tokens; packed rows as they are."""
    return (
        data
        if isinstance(data, Packed)
        else pack(dialogues(data), falcon, min(512, context_limit(falcon.model.config)))
    )


def _fitting(falcon: Falcon, documents: Iterable[Mapping[str, Any]], context: int) -> Iterator[Messages]:
    """The conversations that fit into `context` tokens: a longer one is cut for training, before its last answer."""
    for document in documents:
        messages = document["messages"]
        if not messages or len(messages) - 1 in document.get("untrained", ()):
            continue
        if len(encode(messages, falcon.tokenizer, falcon.chat_format, add_generation_prompt=False)) <= context:
            yield messages


def _answers(falcon: Falcon, conversations: Sequence[Messages], max_new_tokens: int) -> list[Generation]:
    """The generated last answer of each conversation."""
    answers: list[Generation] = []
    for start in range(0, len(conversations), _BATCH):
        batch = conversations[start : start + _BATCH]
        prompts = [render_prompt(messages[:-1], falcon.tokenizer, falcon.chat_format) for messages in batch]
        ends = [falcon.tokenizer.eos_token_id, *end_tokens(falcon.tokenizer, falcon.chat_format)]
        settings: Any = {"max_new_tokens": max_new_tokens, "do_sample": False, "strip": True, "eos_token_id": ends}
        answers += generate(falcon.model, falcon.tokenizer, prompts, **settings)  # type: ignore[arg-type]  # a list for a list
    return answers
