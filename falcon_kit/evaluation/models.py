"""What is evaluated: a model in this process, or one behind an endpoint."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from falcon_kit.evaluation.perplexity import Perplexity
from falcon_kit.evaluation.progress import Progress
from falcon_kit.evaluation.tasks import Task
from falcon_kit.evaluation.texts import Corpus
from falcon_kit.generation.text import Generation

Pair = tuple[str, str]
"""A context and a continuation."""
Answerer = Callable[[Sequence[str]], list[Any]]
"""For each prompt the text, and its sureness; see `written`."""
BATCH = 16
"""Prompts that are continued together."""
MARGIN = 16
"""New tokens beyond those of the longest right answer."""


class Model(Protocol):
    """What tasks and lm-eval ask a model for. Inputs and results are JSON values."""

    name: str
    """The model's name."""
    truncated: int
    """Requests of lm-eval whose context lost its beginning, so far."""

    part_size: int
    """Prompts that are continued before their texts are stored."""

    def record(self) -> dict[str, Any]:
        """What identifies the model."""

    def perplexity(self, corpus: Corpus, progress: Progress, stride: int | None) -> Perplexity:
        """The perplexity of a corpus."""

    def prepare(self, pairs: Sequence[Pair], where: Sequence[str], truncate: bool) -> list[Any]:
        """The pairs as inputs of `run`. Raises ValueError for one that is too long, named by `where`, or cuts it."""

    def run(self, inputs: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each pair the log-probability of the continuation, and whether each of its tokens is the likeliest."""

    def prompts(self, task: Task, chat: bool) -> list[str]:
        """The text that each item of a task is asked with."""

    def answerer(self, task: Task, prompts: Sequence[str], chat: bool, truncate: bool) -> Answerer:
        """A function that answers such texts. Raises ValueError for one that is too long, named by file and line."""

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of each text, every token once."""

    def count_cut(self, prompts: Sequence[str], new_tokens: int) -> int:
        """How many prompts lose their beginning in `write`, to leave room for the new tokens."""

    def write(self, prompts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        """The continuation of each prompt; one that is too long loses its beginning, or the server refuses it."""

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """A conversation in the model's chat format; without `add_generation_prompt`, the last message goes on."""


def plain_prompts(task: Task) -> list[str]:
    """The text that each item is asked with outside a chat."""
    return [f"Question: {item.text}\nAnswer:" if task.is_question else item.text for item in task.items]


def going_on(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """A rendered conversation up to the end of its last content, which the model continues."""
    last = str(messages[-1]["content"]).strip()
    return text[: text.rindex(last) + len(last)]


def line_end(task: Task) -> tuple[str, ...]:
    """The end of a line as a stop string, unless an answer has several lines."""
    return () if any("\n" in item.answer.strip() for item in task.items) else ("\n",)


def written(generation: Generation) -> list[Any]:
    """The text, and the geometric mean probability of its tokens; None where they are not known."""
    logprobs = [each for each in generation.logprobs or () if not math.isnan(each)]
    return [generation.text, math.exp(sum(logprobs) / len(logprobs)) if logprobs else None]
