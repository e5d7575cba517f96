"""A model's answers to a task: the likeliest choice, or the generated text."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from falcon_kit.evaluation.models import Model
from falcon_kit.evaluation.progress import Progress
from falcon_kit.evaluation.task_results import TaskResult
from falcon_kit.evaluation.tasks import Item, Task


def answer(task: Task, model: Model, progress: Progress, *, chat: bool, truncate: bool) -> TaskResult:
    """The result of a task."""
    prompts = model.prompts(task, chat)
    if task.is_choice:
        return choose(task, prompts, model, progress, truncate)
    return write(task, prompts, model, progress, chat, truncate)


def choose(task: Task, prompts: Sequence[str], model: Model, progress: Progress, truncate: bool) -> TaskResult:
    """Answers a multiple-choice task by the log-likelihood of each choice after its prompt, summed over its tokens.

    `acc`: the likeliest choice is the right one. `acc_norm`: the same, with each log-likelihood divided by the length
    of the choice in characters. Both as lm-eval defines them; among equal ones the first counts.
    """
    pairs, where = [], []
    for item, prompt in zip(task.items, prompts, strict=True):
        space = "" if prompt[-1:].isspace() else " "  # as a choice follows its prompt
        pairs += [(prompt, f"{space}{choice}") for choice in item.choices]
        where += [item.where] * len(item.choices)
    inputs = iter(model.prepare(pairs, where, truncate))
    by_item = [list(islice(inputs, len(item.choices))) for item in task.items]
    found = progress.map(f"task {task.name}", by_item, lambda part: _totals(part, model))
    rows = [_chosen(item, totals) for item, totals in zip(task.items, found, strict=True)]
    metrics = {name: tuple(float(row[name]) for row in rows) for name in ("acc", "acc_norm")}
    chance = float(np.mean([1 / len(item.choices) for item in task.items]))
    return TaskResult(task.name, "multiple choice", task.sha256, metrics, tuple(rows), {"chance": chance})


def _totals(part: Sequence[list[Any]], model: Model) -> list[list[float]]:
    """The log-likelihood of each choice of each item."""
    totals = iter(model.run([each for item in part for each in item]))
    return [[next(totals)[0] for _ in item] for item in part]


def _chosen(item: Item, totals: Sequence[float]) -> dict[str, Any]:
    lengths = [len(choice) for choice in item.choices]
    likeliest, by_length = int(np.argmax(totals)), int(np.argmax(np.array(totals) / lengths))
    right = item.choices.index(item.answer)
    return {
        **_asked(item),
        "choices": list(item.choices),
        "loglikelihoods": list(totals),
        "chosen": item.choices[likeliest],
        "acc": float(likeliest == right),
        "acc_norm": float(by_length == right),
    }


def write(
    task: Task, prompts: Sequence[str], model: Model, progress: Progress, chat: bool, truncate: bool
) -> TaskResult:
    """Answers a generation task greedily.

    `exact_match`: the text is the answer, without white space around either. `sureness`: the probability that the model
    gave to the tokens it wrote, their geometric mean; it measures how sure a model sounds, not whether it is right.
    """
    answerer = model.answerer(task, prompts, chat, truncate)
    found = progress.map(f"task {task.name}", prompts, answerer, size=model.part_size)
    rows = [
        {**_asked(item), "text": text, "sureness": sureness, "exact_match": float(text.strip() == item.answer.strip())}
        for item, (text, sureness) in zip(task.items, found, strict=True)
    ]
    metrics = {"exact_match": tuple(row["exact_match"] for row in rows)}
    if all(row["sureness"] is not None for row in rows):
        metrics["sureness"] = tuple(row["sureness"] for row in rows)
    return TaskResult(task.name, "generation", task.sha256, metrics, tuple(rows), {})


def _asked(item: Item) -> dict[str, Any]:
    return {**item.labels, "where": item.where, "text asked": item.text, "answer": item.answer}
