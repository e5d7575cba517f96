"""`evaluate`: perplexity and tasks for any Falcon of the kit, or behind an endpoint."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from falcon_kit.display.errors import check_flag, check_whole, plain_scalar, require, shown, unknown_name
from falcon_kit.evaluation.answering import answer
from falcon_kit.evaluation.local import LocalModel
from falcon_kit.evaluation.models import Model
from falcon_kit.evaluation.progress import Progress
from falcon_kit.evaluation.remote import RemoteModel
from falcon_kit.evaluation.results import PUBLISHED, Evaluation
from falcon_kit.evaluation.task_results import TaskResult
from falcon_kit.evaluation.tasks import SHIPPED, Task, read_task, shipped_task, split_names
from falcon_kit.evaluation.texts import read_corpora
from falcon_kit.serving.endpoint import Endpoint
from falcon_kit.tuning.files import TABLES

LEADERBOARD: dict[str, dict[str, Any]] = {each["name"]: each for each in PUBLISHED["tasks"]}
_PREFIX = "lm_eval/"


def evaluate(
    falcon: Any,
    tasks: Any = (),
    *,
    text: Any = None,
    chat: bool = False,
    num_fewshot: int | None = None,
    limit: int | None = None,
    stride: int | None = None,
    truncate: str | None = None,
    batch_size: int | None = None,
    output_dir: str | Path | None = None,
    seed: int = 1234,
) -> Evaluation:
    """Measures a model: the perplexity of a text, tasks, or both. Every mean has a 95% interval.

    falcon: what `fk.load` returns (quantised, tuned, its layers on several devices; not a model in several processes),
    a pair (model, tokenizer), or what `fk.connect` returns. tasks: one or several of "falconet-choices",
    "falconet-answers" and "falconet-unknown", about Falconet's world; the path of a file (.jsonl, .json, .csv, .tsv)
    with rows {"question" or "prompt": ..., "answer": ...}, for multiple choice with "choices": [...], where the answer
    is the index or the text of one; such rows by name, {"mine": rows}, in a list, a `datasets.Dataset` or a pandas
    DataFrame; "leaderboard", the Open LLM Leaderboard of 2023, or one of its tasks "arc" (25-shot), "hellaswag"
    (10-shot), "mmlu" (5-shot) and "truthfulqa" (0-shot); "lm_eval/NAME" for another task of lm-eval, or the path of a
    YAML file of its form, whose Python functions run. lm-eval's tasks need `pip install "lm-eval>=0.4.12"`, and their
    data. text: a str, a pathlib.Path, a list of documents, rows as for `fk.dialogues`, fk.Documents, or texts by name,
    as `fk.sample_texts()`.

    chat: ask questions in the model's chat format; prompts are continued as they are. num_fewshot: examples before each
    item of lm-eval's tasks; unset, as above, or the task's own; other tasks have none. limit: the first items of each
    task. stride: tokens that each window of a long text adds; unset, half the context. truncate: "left" drops the
    beginning of a context that is too long, as lm-eval's tasks always do; unset, it is an error. batch_size: rows in a
    batch; unset, as many as fit a fixed number of tokens. output_dir: a folder for finished parts, from which the same
    call goes on after an interruption. seed: of lm-eval's choice of examples; 1234 is its own default.

    Raises LookupError for an unknown task, with the nearest names, ConnectionError that names missing data of lm-eval,
    FileNotFoundError for a missing file, and ValueError for malformed rows, by file and line, or an empty text.
    """
    require(truncate in (None, "left"), f'truncate must be "left" or None; got {shown(truncate)}')
    check_flag("chat", chat)
    check_whole("seed", seed, 0, 2**32 - 1)
    numbers = {"limit": limit, "stride": stride, "batch_size": batch_size, "num_fewshot": num_fewshot}
    for name, value in numbers.items():
        if value is not None:
            check_whole(name, value, 0 if name == "num_fewshot" else 1)
    settings = {"chat": chat, "truncate": truncate, "seed": seed, **numbers}
    plain = {name: plain_scalar(value) for name, value in settings.items()}  # they are saved as JSON
    return _evaluate(falcon, tasks, text, plain, output_dir)


def _evaluate(
    falcon: Any, tasks: Any, text: Any, settings: dict[str, Any], output_dir: str | Path | None
) -> Evaluation:
    names: list[Any] = []
    for each in split_names(tasks):
        names += LEADERBOARD if each == "leaderboard" else [each]
    require(bool(names) or text is not None, f"nothing to measure: give text=, or tasks= such as {SHIPPED[0]!r}")
    corpora = read_corpora(text) if text is not None else ()
    runs = [_resolve(each, settings) for each in names]
    given = [*(each.name for each in corpora), *(each.name for each in runs)]
    twice = sorted({each for each in given if given.count(each) > 1})
    require(not twice, f"{', '.join(twice)} is given twice: texts and tasks need names of their own")
    model: Model = RemoteModel(falcon) if isinstance(falcon, Endpoint) else LocalModel(falcon, settings["batch_size"])
    data = {each.name: each.sha256 for each in corpora} | {each.name: each.sha256 for each in runs if each.sha256}
    record = {**model.record(), "settings": settings, "data": data, "versions": _versions()}
    progress = Progress(output_dir, {"model": model.name, **record})
    perplexities = tuple(model.perplexity(corpus, progress, settings["stride"]) for corpus in corpora)
    evaluation = Evaluation(model.name, record, perplexities, tuple(each.run(model, progress) for each in runs))
    if output_dir is not None:
        evaluation.save(Path(output_dir).expanduser() / "evaluation.json")
    return evaluation


@dataclass(frozen=True)
class _Run:
    """A task with its items, ready to be given to a model."""

    name: str
    sha256: str | None
    """The hash of its items, where it is known before."""
    run: Callable[[Model, Progress], TaskResult]


def _resolve(task: Any, settings: Mapping[str, Any]) -> _Run:
    """A task given by name or path, with its data. Raises LookupError for an unknown name."""
    name = str(task)
    if name in LEADERBOARD:
        each = LEADERBOARD[name]
        own = {"limit": None, "chat": False, "num_fewshot": each["num_fewshot"]}
        if settings["num_fewshot"] is None:
            settings = {**settings, "num_fewshot": each["num_fewshot"]}
        return _harness(name, each["task"], settings, each["folder"], leaderboard=own.items() <= settings.items())
    if name.startswith(_PREFIX):
        return _harness(name.removeprefix(_PREFIX), name.removeprefix(_PREFIX), settings)
    if name.endswith((".yaml", ".yml")) and not isinstance(task, Task):
        return _harness(Path(name).stem, str(Path(name).expanduser()), settings)
    found = _own_task(task)
    found = replace(found, items=found.items[: settings["limit"]])
    require(
        not settings["num_fewshot"],
        f"num_fewshot={settings['num_fewshot']} is for lm-eval's tasks, {found.name} has no examples: leave it out, or "
        "evaluate the two in calls of their own",
    )
    arguments = {"chat": settings["chat"], "truncate": settings["truncate"] == "left"}
    return _Run(found.name, found.sha256, partial(answer, found, **arguments))


def _own_task(task: Any) -> Task:
    if isinstance(task, Task):
        return task
    if isinstance(task, Path) or str(task).lower().endswith(TABLES):
        return read_task(task)
    known = [*SHIPPED, "leaderboard", *LEADERBOARD]
    if str(task) not in SHIPPED:
        raise LookupError(f"{unknown_name('task', str(task), known)} lm-eval's tasks are named {_PREFIX}NAME.")
    return shipped_task(str(task))


def _harness(
    name: str, task: str, settings: Mapping[str, Any], folder: str | None = None, leaderboard: bool = False
) -> _Run:
    """A task of lm-eval with its data. Raises ImportError, with what to install, if it is missing or too old."""
    try:
        from falcon_kit.evaluation import harness
    except ImportError as error:
        raise ImportError(f'{name} is a task of lm-eval ({error}): pip install "lm-eval>=0.4.12"') from None
    loaded = harness.load(name, task, folder)
    harness.check_examples(loaded, settings["num_fewshot"])
    return _Run(name, None, partial(harness.run, loaded, settings=settings, leaderboard=leaderboard))


def _versions() -> dict[str, str]:
    """The versions of the kit and of the libraries that results depend on."""
    found = {}
    for name in ("falcon-kit", "torch", "transformers", "tokenizers", "lm-eval"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
