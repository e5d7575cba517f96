"""Any number of texts: tasks run in batches of similar lengths, and give their texts in the order of the tasks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from typing import Any

from falcon_kit.generation.generate import GenerateTask
from falcon_kit.generation.text import Generation

AHEAD = 8
"""Batches whose tasks are sorted by length together."""


def texts_in_order(tasks: Iterable[GenerateTask], batch_size: int) -> Iterator[Callable[[], Generation]]:
    """For each task a function that returns its text. It runs the task's batch, unless another one has.

    The tasks, of one text each, differ only in their prompts and in what ends their texts.
    """
    remaining = iter(tasks)
    while window := list(islice(remaining, AHEAD * batch_size)):
        batch_of = {task: batch for batch in _batches(window, batch_size) for task in batch}
        for task in window:
            yield partial(_text, task, batch_of[task])


def _batches(tasks: Sequence[GenerateTask], batch_size: int) -> Iterator[Sequence[GenerateTask]]:
    """Batches of tasks that end alike. A longer prompt in a batch would leave the others fewer new tokens."""
    by_length = sorted(tasks, key=lambda task: (*_ends(task), len(task.prompts[0])))
    size = 1 if tasks[0].assisted else batch_size
    for _, group in groupby(by_length, _ends):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _ends(task: GenerateTask) -> tuple[Any, ...]:
    return task.strip, task.stop, tuple(task.ends), task.new_tokens


def _text(task: GenerateTask, batch: Sequence[GenerateTask]) -> Generation:
    if not task.generations:
        batch[0].prompts = [ids for each in batch for ids in each.prompts]
        for each, generation in zip(batch, batch[0].run(), strict=True):
            each.generations = [generation]
    return task.generations[0]
