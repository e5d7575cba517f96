"""EleutherAI's lm-eval, through its own library, on any model of the kit or behind an endpoint.

`pip install "lm-eval>=0.4.12"` installs it. Its tasks, prompts, few-shot examples and metrics are used as they are:
`KitLM` only computes what they ask a model for.
"""

import hashlib
import json
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks.manager import TaskManager

from falcon_kit.catalogue.hub import is_cut_off
from falcon_kit.display.errors import require, unknown_name
from falcon_kit.display.warning import warn
from falcon_kit.evaluation.models import Model
from falcon_kit.evaluation.progress import Progress
from falcon_kit.evaluation.task_results import TaskResult

_TASKS = Path(lm_eval.__file__).parent / "tasks"


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-eval with its data."""

    name: str
    """The name in the results."""
    parts: Sequence[Any]
    """lm-eval's tasks: one, or those of a group."""
    manager: TaskManager
    """The index that they are from; without one, lm-eval reads all of its 14,000 tasks again."""


def load(name: str, task: str, folder: str | None = None) -> HarnessTask:
    """A task with its data, before anything is computed.

    task: lm-eval's name of it, or the path of a YAML file. folder: that of lm-eval's tasks that it is in; None reads
    all of them, or only the YAML file.
    Raises LookupError for an unknown task, with the nearest names, FileNotFoundError for a missing file, and
    ConnectionError that names the data set that is neither in the cache nor can be reached.
    """
    is_file = task.endswith((".yaml", ".yml"))
    if is_file and not Path(task).is_file():
        raise FileNotFoundError(f"there is no file {task}")
    with _unnoticed(), _cache_alone_where_cut_off():
        path = None if folder is None else str(_TASKS / folder)
        manager = TaskManager(include_path=path, include_defaults=path is None and not is_file)
        if not is_file and task not in manager.all_tasks:
            raise LookupError(unknown_name("task of lm-eval", task, manager.all_tasks))
        try:
            return HarnessTask(name, list(manager.load([task])["tasks"].values()), manager)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the data of {name} is not there: {error}. Correct the path, or the data set's name, in the "
                "task's YAML file"
            ) from error
        except ConnectionError as error:
            raise ConnectionError(
                f"the data of {name} is not here: {error}. Run the same call once with access to huggingface.co: "
                "the data then stays in the cache"
            ) from error


def check_examples(task: HarnessTask, num_fewshot: int | None) -> None:
    """Raises ValueError for examples that lm-eval would leave out: some tasks have none by their own config."""
    fixed = [part for part in task.parts if part.get_config("num_fewshot") == 0]
    require(
        not (num_fewshot and fixed),
        f"num_fewshot={num_fewshot} has no effect on {task.name}, which has 0 examples by its own config: "
        "leave num_fewshot out for it",
    )


@contextmanager
def _unnoticed() -> Iterator[None]:
    """lm-eval's log at the level of errors; afterwards the caller's random generators are as they were."""
    log = logging.getLogger("lm_eval")
    level, python = log.level, random.getstate()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    arrays = np.random.get_state()  # noqa: NPY002  # it is this global generator that lm-eval uses
    log.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        log.setLevel(level)
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002


@contextmanager
def _cache_alone_where_cut_off() -> Iterator[None]:
    """Data sets come from the cache alone while the hub cannot be reached, instead of after its tries."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or is_cut_off()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def run(
    task: HarnessTask, model: Model, progress: Progress, settings: Mapping[str, Any], leaderboard: bool
) -> TaskResult:
    """The result of a task; the tasks of a group are taken together, each item with the same weight.

    settings: those of `evaluate`; without num_fewshot, the task has its own number of examples. leaderboard: whether it
    is a task of the leaderboard of 2023, with its settings.
    """
    lm, before = KitLM(model, progress, task.name), model.truncated
    with _unnoticed():
        results: Any = lm_eval.simple_evaluate(
            lm,
            tasks=list(task.parts),
            task_manager=task.manager,
            num_fewshot=settings["num_fewshot"],
            limit=settings["limit"],
            bootstrap_iters=0,
            apply_chat_template=settings["chat"],
            fewshot_as_multiturn=settings["chat"],
            fewshot_random_seed=settings["seed"],
        )
    if truncated := model.truncated - before:
        warn(
            f"{truncated} requests of {task.name} exceed the model's context: their beginning is left out, "
            "as lm-eval does"
        )
    facts: dict[str, Any] = {"truncated": truncated} | ({"leaderboard": task.name} if leaderboard else {})
    return _result(task.name, results, facts)


def _result(name: str, results: Mapping[str, Any], facts: Mapping[str, Any]) -> TaskResult:
    samples = [{"subtask": subtask, **each} for subtask, part in results["samples"].items() for each in part]
    metrics, totals = _metrics(results)
    hashes = [[each[kind] for kind in ("doc_hash", "target_hash")] for each in samples]  # models have other prompts
    versions = {
        "lm_eval": version("lm_eval"),
        "num_fewshot": {subtask: config.get("num_fewshot") for subtask, config in results["configs"].items()},
        "versions": dict(results["versions"]),
    }
    digest = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    items = tuple(_item(each, [*metrics]) for each in samples)
    return TaskResult(name, "lm-eval", digest, metrics, items, {**versions, **facts}, totals)


def _metrics(results: Mapping[str, Any]) -> tuple[dict[str, tuple[float, ...]], dict[str, float]]:
    """The values of each metric by item, where their mean is what lm-eval reports; what it reports for all others.

    A total of several subtasks is the mean of theirs, weighted by their items, as of lm-eval's groups.
    """
    found: dict[str, list[tuple[list[Any], float, int]]] = {}  # by name: for each subtask items, lm-eval's value, count
    for subtask, samples in results["samples"].items():
        for name, value in results["results"][subtask].items():
            metric, _, keep = name.partition(",")
            if not metric.endswith("_stderr") and keep and isinstance(value, int | float):
                kept = [each for each in samples if each["filter"] == keep]
                items = [each[metric] for each in kept if metric in each["metrics"]]
                label = metric if keep == "none" else f"{metric}, {keep}"
                found.setdefault(label, []).append((items, float(value), len(kept)))
    metrics: dict[str, tuple[float, ...]] = {}
    totals: dict[str, float] = {}
    for name, parts in found.items():
        if all(_is_mean(items, value) for items, value, _ in parts):
            metrics[name] = tuple(float(each) for items, _, _ in parts for each in items)
        else:
            totals[name] = sum(value * count for _, value, count in parts) / sum(count for _, _, count in parts)
    return metrics, totals


def _is_mean(items: Sequence[Any], value: float) -> bool:
    """Whether a value is the mean of one number per item."""
    numbers = [float(each) for each in items if isinstance(each, int | float)]
    return 0 < len(numbers) == len(items) and math.isclose(sum(numbers) / len(numbers), value, abs_tol=1e-9)


def _item(sample: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """What is stored of an item: where it is, how it was answered, and its hashes."""
    kept = ("subtask", "doc_id", "target", "doc_hash", "prompt_hash", "target_hash")
    item = {name: sample[name] for name in kept}
    item["responses"] = sample["filtered_resps"]
    return json.loads(json.dumps(item | {name: sample[name] for name in metrics if name in sample}, default=str))


class KitLM(LM):  # type: ignore[misc]  # lm-eval brings no types
    """A model of the kit as lm-eval's `LM`: what it computes is stored part by part."""

    def __init__(self, model: Model, progress: Progress, name: str) -> None:
        super().__init__()
        self._model, self._progress, self._name = model, progress, name

    @property
    def tokenizer_name(self) -> str:
        """The model's name, by which lm-eval keeps its caches apart."""
        return self._model.name

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        where = [f"{self._name}, item {request.doc_id}" for request in requests]
        inputs = self._model.prepare([request.args for request in requests], where, truncate=True)
        found = self._progress.map(f"lm-eval {self._name}", inputs, self._model.run, size=1024)
        return [(total, bool(greedy)) for total, greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-likelihood of each text, in windows that do not overlap."""
        texts = [request.args[0] for request in requests]
        return self._progress.map(f"lm-eval {self._name} texts", texts, self._model.rolling, size=16)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        inputs = [[request.args[0], normalize_gen_kwargs(request.args[1])] for request in requests]
        for numbers, settings in _groups(inputs):
            prompts = [inputs[number][0] for number in numbers]
            self._model.truncated += self._model.count_cut(prompts, settings["max_new_tokens"])
        return self._progress.map(f"lm-eval {self._name} answers", inputs, self._write, size=self._model.part_size)

    def _write(self, inputs: Sequence[Any]) -> list[str]:
        """The continuations; those with the same settings are generated together."""
        found: dict[int, str] = {}
        for numbers, settings in _groups(inputs):
            texts = self._model.write([inputs[number][0] for number in numbers], settings)
            found.update(zip(numbers, texts, strict=True))
        return [found[number] for number in range(len(inputs))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._model.render(chat_history, add_generation_prompt)


def _groups(inputs: Sequence[Any]) -> list[tuple[list[int], dict[str, Any]]]:
    """The numbers of the inputs with the same settings, and these settings."""
    groups: dict[str, list[int]] = {}
    for number, (_, arguments) in enumerate(inputs):
        groups.setdefault(repr(sorted(arguments.items())), []).append(number)
    return [(numbers, _settings(inputs[numbers[0]][1])) for numbers in groups.values()]


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The kit's settings of a generation that lm-eval asks for."""
    settings = {name: value for name, value in arguments.items() if value is not None}
    settings["max_new_tokens"] = settings.pop("max_gen_toks")
    settings["stop"] = tuple(each for each in settings.pop("until", ()) if each)
    if not settings.get("do_sample"):
        settings = {name: settings[name] for name in ("max_new_tokens", "stop")} | {"do_sample": False}
    return settings
