"""Tasks: questions with choices or with one exact answer, from a file, from rows, or shipped with the kit.

A row is {"question" or "prompt": ..., "choices": [...], "answer": ...} for multiple choice, where the answer is the
index of the right choice or its text, or {"question" or "prompt": ..., "answer": ...} for generation. A prompt is
continued as it is; a question is asked in the model's chat format, or as "Question: ...\\nAnswer:". A key that is None
counts as absent. Whatever else a row has stays with its results.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from falcon_kit.display.errors import is_encodable, plain_scalar, printable, require, shown
from falcon_kit.display.tables import counted
from falcon_kit.tuning.files import rows as rows_of_files

Parsed = TypeVar("Parsed")
_FOLDER = Path(__file__).parent / "tasks"
SHIPPED = tuple(sorted(file.stem for file in _FOLDER.glob("*.jsonl")))
"""The tasks about Falconet's world: "falconet-answers", "falconet-choices" and "falconet-unknown"."""
RESERVED = {*"acc acc_norm answer choices chosen exact_match loglikelihoods sureness text where".split(), "text asked"}
"""The fields of results, which no label of a row may have as its name."""
_FORM = '{"question" or "prompt": "...", "answer": "..."}, for multiple choice with "choices": ["...", "..."]'


@dataclass(frozen=True)
class Item:
    """One row of a task."""

    where: str
    """File and line."""
    text: str
    """The question or the prompt."""
    is_question: bool
    choices: tuple[str, ...]
    """The choices; none for generation."""
    answer: str
    """The right choice, or the exact answer."""
    labels: Mapping[str, Any]
    """What else the row has."""


@dataclass(frozen=True, repr=False)
class Task:
    """Items of one kind."""

    name: str
    """The name in the results."""
    items: tuple[Item, ...]
    """The items, in the order of the file."""

    @property
    def is_choice(self) -> bool:
        return bool(self.items[0].choices)

    @property
    def is_question(self) -> bool:
        """Whether the items are questions, not prompts."""
        return self.items[0].is_question

    @property
    def sha256(self) -> str:
        """The hash of the items: where they are from does not count."""
        rows = [[each.text, each.is_question, each.choices, each.answer] for each in self.items]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def __repr__(self) -> str:
        kind = "multiple-choice item" if self.is_choice else "generation item"
        return f"Task({printable(self.name)}, {counted(len(self.items), kind)})"


def shipped_task(name: str) -> Task:
    """The task in `SHIPPED` with this name."""
    return read_task(_FOLDER / f"{name}.jsonl")


def read_task(path: str | Path) -> Task:
    """The task in a jsonl file. Raises ValueError that names each malformed row by file and line."""
    path = Path(path).expanduser()
    return make_task(path.stem, rows_of_files(path), path.name)


def make_task(name: str, rows: Iterable[tuple[str, Any]], source: str = "the rows given") -> Task:
    """The task of rows, each with its file and line. Raises ValueError if one is malformed or there are none."""
    items = parsed(rows, _item, source, _FORM)
    first = items[0]
    if odd := next((each for each in items if _kind(each) != _kind(first)), None):
        raise ValueError(
            f"{odd.where} is {_kind(odd)}, {first.where} {_kind(first)}: write the two kinds into two files"
        )
    return Task(name, tuple(items))


def _task_of_rows(name: Any, rows: Any) -> Task:
    """The task of rows with a name: a list, a `datasets.Dataset`, a pandas DataFrame, or files."""
    from falcon_kit.tuning.data import as_rows  # it imports pandas and datasets

    require(isinstance(name, str) and name.strip() != "", f"the name of a task must be a text; got {shown(name)}")
    label = f"the task {shown(name)}"
    return make_task(name, rows_of_files(as_rows(rows, label, f"A row is {_FORM}")), label)


def _kind(item: Item) -> str:
    return ("a question" if item.is_question else "a prompt") + (" with choices" if item.choices else "")


def parsed(
    rows: Iterable[tuple[str, Any]], parse: Callable[[str, Mapping[str, Any]], Parsed], source: str, form: str
) -> list[Parsed]:
    """Each row as `parse` reads it; a key that is None counts as absent.

    Raises ValueError that names malformed rows by file and line, or for no rows.
    """
    found, problems = [], []
    for where, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            require(isinstance(row, Mapping), f"it is {type(row).__name__}, not an object")
            found.append(parse(where, {name: value for name, value in row.items() if value is not None}))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    require(
        not problems,
        f"{source} has {counted(len(problems), 'malformed row')}: {'; '.join(problems[:5])}. A row is {form}",
    )
    require(bool(found), f"{source} has no rows. A row is {form}")
    return found


def _item(where: str, row: Mapping[str, Any]) -> Item:
    """A row as an item. Raises ValueError for what is wrong with it."""
    kinds = [name for name in ("question", "prompt") if name in row]
    require(len(kinds) == 1, f"it has {'both a question and a prompt' if kinds else 'no question and no prompt'}")
    text = text_of(row, kinds[0])
    choices = _choices(row["choices"]) if "choices" in row else ()
    answer = _answer(row, choices)
    labels = {name: value for name, value in row.items() if name not in (kinds[0], "choices", "answer")}
    taken = sorted(RESERVED & labels.keys())
    require(not taken, f"its field {', '.join(map(repr, taken))} has the name of a field of the results: rename it")
    for name, value in labels.items():
        require(
            _is_json(value), f"its field {name!r} is {shown(value)}, which a file of results cannot hold: write a text"
        )
    return Item(where, text, kinds[0] == "question", choices, answer, labels)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def text_of(row: Mapping[str, Any], name: str) -> str:
    """A field of a row. Raises ValueError unless it is a text."""
    value = row.get(name)
    require(isinstance(value, str) and value.strip() != "", f"its {name} is {value!r}, not a text")
    require(is_encodable(str(value)), f"its {name} is not valid UTF-8")
    return str(value)


def _choices(given: Any) -> tuple[str, ...]:
    require(
        isinstance(given, list | tuple)
        and len(given) >= 2
        and all(isinstance(each, str) and each.strip() for each in given),
        f"its choices are {given!r}, not two or more texts",
    )
    require(len({*given}) == len(given), f"two of its choices are equal: {given!r}")
    return tuple(text_of({"choice": each}, "choice") for each in given)


def _answer(row: Mapping[str, Any], choices: Sequence[str]) -> str:
    require("answer" in row, "it has no answer")
    answer = row["answer"]
    if not choices:
        return text_of(row, "answer")
    answer = plain_scalar(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        require(0 <= answer < len(choices), f"its answer is {answer}, but its choices go from 0 to {len(choices) - 1}")
        return choices[answer]
    require(answer in choices, f"its answer {answer!r} is neither the index of a choice nor the text of one")
    return str(answer)


def split_names(tasks: Any) -> Iterator[Any]:
    """The tasks that are given: one or several, each a name, a path, a `Task`, or rows by name.

    Raises ValueError for rows without a name.
    """
    table = isinstance(tasks, Mapping) or hasattr(tasks, "iterrows")  # whose elements are names of columns
    for each in [tasks] if isinstance(tasks, str) or table or not isinstance(tasks, Iterable) else tasks:
        if isinstance(each, Mapping) and not each.keys() & {"question", "prompt", "answer"}:
            yield from (_task_of_rows(name, rows) for name, rows in each.items())
            continue
        require(
            isinstance(each, str | Path | Task),
            f"tasks is a name, a path, or several of them; got {shown(each)}: give rows with a name for their task, "
            'tasks={"mine": rows}',
        )
        yield each
