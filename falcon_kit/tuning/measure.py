"""Stop rate and exact answers on conversations that the model was not trained on, and texts that show what it forgets.

generated_texts.jsonl: 8 pages, stories and dialogues about animals in plain English, generated like the base text of
Falconet with another seed. A model reads them before and after a run: a higher loss shows that it forgets.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from falcon_kit.catalogue.spec import context_limit
from falcon_kit.generation.chat import answer_texts, encode, render_prompt
from falcon_kit.generation.control_tokens import encode_prompt
from falcon_kit.generation.generate import generate
from falcon_kit.generation.own_format import end_tokens
from falcon_kit.loading.falcon import Falcon
from falcon_kit.tuning.data import Documents, as_rows, dialogues
from falcon_kit.tuning.files import SUFFIXES
from falcon_kit.tuning.packing import Packed, pack

_BATCH = 16
_BEYOND = 16
"""Tokens that an answer may be longer than the one that is expected."""
GENERATED = Path(__file__).with_name("generated_texts.jsonl")


@dataclass(frozen=True)
class _Question:
    """A conversation without its last answer."""

    prompt: str
    tokens: int
    """Of the prompt."""
    answer: str
    """The last answer, as the model is trained to write it."""
    answer_tokens: int


def answer_rates(falcon: Falcon, documents: Iterable[Mapping[str, Any]], count: int, context: int) -> dict[str, float]:
    """Of the last answers, generated greedily without stop strings: the shares that end by eos_token and are exact.

    documents: of `fk.dialogues`; the first `count` conversations of at most `context` tokens are used. Empty if there
    are none.
    """
    questions = list(islice(_questions(falcon, documents, context), count))
    if not questions:
        return {}
    ended = exact = 0
    ends = [falcon.tokenizer.eos_token_id, *end_tokens(falcon.tokenizer, falcon.chat_format)]
    settings: Any = {"do_sample": False, "strip": True, "eos_token_id": ends}
    limit = context_limit(falcon.model.config)
    for batch in _batches(questions, limit):
        settings["max_new_tokens"] = min(max(each.answer_tokens for each in batch) + _BEYOND, limit - batch[-1].tokens)
        answers: Any = generate(falcon.model, falcon.tokenizer, [each.prompt for each in batch], **settings)
        ended += sum(each.finish_reason == "eos" for each in answers)
        exact += sum(str(answer) == each.answer for answer, each in zip(answers, batch, strict=True))
    return {"stop rate": ended / len(questions), "exact answers": exact / len(questions)}


def short_rows(data: Any, falcon: Falcon) -> Packed:
    """Documents, in any form that `tune` takes, in rows of at most 512 tokens; packed rows as they are.

    A string in a list is a text, as for `fk.mix`, unless it is the name of a file or a folder.
    """
    if isinstance(data, Packed):
        return data
    if not isinstance(data, str | Path | Documents):
        data = (
            {"text": each} if isinstance(each, str) and not _is_name(each) else each
            for each in as_rows(data, "fk.tune")
        )
    return pack(dialogues(data), falcon, min(512, context_limit(falcon.model.config)))


def _is_name(text: str) -> bool:
    """Whether a string names a file or a folder, also a file that is not there."""
    # pathlib raises for a long text
    return text.lower().endswith(SUFFIXES) or os.path.exists(os.path.expanduser(text))  # noqa: PTH110, PTH111


def _questions(falcon: Falcon, documents: Iterable[Mapping[str, Any]], context: int) -> Iterator[_Question]:
    """The conversations that fit into `context` tokens: a longer one is cut for training, before its last answer."""
    tokenizer, form = falcon.tokenizer, falcon.chat_format
    for document in documents:
        messages = document["messages"]
        if not messages or len(messages) - 1 in document.get("untrained", ()):
            continue
        whole = len(encode(messages, tokenizer, form, add_generation_prompt=False))
        if whole <= context:
            prompt, answer = render_prompt(messages[:-1], tokenizer, form), answer_texts(messages, tokenizer, form)[-1]
            tokens = len(encode_prompt(prompt, tokenizer))
            yield _Question(prompt, tokens, answer, whole - tokens)


def _batches(questions: Iterable[_Question], limit: int) -> Iterator[list[_Question]]:
    """The questions by length, no more to a batch than leave room for the longest of its answers."""
    batch: list[_Question] = []
    for each in sorted(questions, key=lambda question: question.tokens):
        longest = max([each.answer_tokens, *(other.answer_tokens for other in batch)])
        if len(batch) == _BATCH or (batch and each.tokens + longest > limit):
            yield batch
            batch = []
        batch.append(each)
    yield batch
