"""Documents to fine-tune on, conversations and plain texts: made from rows of several forms, checked, split, mixed.

Documents are written to a file on disk and mapped into memory from there (the datasets library), so they may exceed
memory. A row that cannot be used is left out, and `Documents.problems` names it by file and line.
"""

from __future__ import annotations

import json
import math
import operator
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter

from falcon_kit.display.errors import check_whole, is_number, printable, require, shown
from falcon_kit.display.tables import counted, html_table
from falcon_kit.display.temporary import TemporaryFolder
from falcon_kit.display.warning import warn
from falcon_kit.generation.control_tokens import encode_prompt
from falcon_kit.tuning.files import rows
from falcon_kit.tuning.forms import FORMS, document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "untrained": List(Value("int32")),
        "text": Value("string"),
        "where": Value("string"),
    }
)


@dataclass(frozen=True)
class Problem:
    """A row, or a part of one, that is not used."""

    where: str
    """File and line, "chats.jsonl:17"; for a row in a list, "row 17"."""
    reason: str
    cut: bool = False
    """Whether the rest of the row is used."""


class Documents(Sequence[dict[str, Any]]):
    """Conversations and texts, each {"messages": [...], "text": None or a text, "where": file and line}.

    "untrained" has the indices of the messages of the assistant that are only read.
    """

    def __init__(self, table: Dataset, problems: Sequence[Problem] = (), folders: Sequence[Any] = ()) -> None:
        self.table = table
        """The documents, as a `datasets.Dataset` that is mapped from disk."""
        self.problems = tuple(problems)
        """Rows left out or cut, and why."""
        self._folders = tuple(folders)  # temporary folders, which exist as long as a table in them is used

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        """One document; for a slice, Documents."""
        if isinstance(index, slice):
            return self._select(range(*index.indices(len(self))))
        return dict(self.table[int(index)])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.table)

    def split(self, share: float, seed: int = 0) -> tuple[Documents, Documents]:
        """The remaining documents and a random `share` of them, drawn by `seed`; each part has at least one document.

        Raises ValueError for a share that is not between 0 and 1, and for fewer than two documents.
        """
        check_whole("seed", seed, 0)
        if not (is_number(share, 0, 1) and 0 < share < 1) or len(self) < 2:
            raise ValueError(
                f"share={shown(share)} of {len(self)} documents: give a share between 0 and 1, and two or more"
            )
        order = random.Random(operator.index(seed)).sample(range(len(self)), len(self))
        count = min(max(1, round(share * len(self))), len(self) - 1)
        return self._select(sorted(order[count:])), self._select(sorted(order[:count]))

    def _select(self, indices: Iterable[int]) -> Documents:
        return Documents(self.table.select(indices), self.problems, self._folders)

    @property
    def texts(self) -> int:
        """The number of plain texts among the documents, counted without reading them."""
        batches = self.table.select_columns("text").with_format("arrow").iter(batch_size=10_000)
        return len(self) - sum(batch.column("text").null_count for batch in batches)

    def __repr__(self) -> str:
        left = f"; {_unused(self.problems)}, see .problems" if self.problems else ""
        texts = self.texts
        return f"Documents({counted(len(self) - texts, 'conversation')}, {counted(texts, 'text')}{left})"

    def _repr_html_(self) -> str:
        begins = [
            (each["where"], each["text"] or " / ".join(m["content"] for m in each["messages"])) for each in self[:3]
        ]
        table = html_table(repr(self), ("where", "begins"), [(where, text[:160]) for where, text in begins])
        left_out = [(each.where, each.reason) for each in self.problems[:10]]
        return table + (html_table("Left out or cut", ("where", "why"), left_out) if left_out else "")


def dialogues(path: str | Path | Iterable[str | Path | Mapping[str, Any]] | pd.DataFrame) -> Documents:
    """Documents to fine-tune on, read from a file, a folder, several of them, or a list of rows.

    Rows may be a `datasets.Dataset` or a pandas DataFrame too. Each has "messages" (role and content), "conversations"
    (ShareGPT), "instruction", "input" and "output" (Alpaca), "prompt" and "completion" (texts, or lists of messages as
    in TRL), "question" and "answer" (as for `fk.evaluate`), "input" (Baize: `[|Human|]` and `[|AI|]`), or "text" or
    "content"; the first that it has is taken. Its "system" becomes the system message, the pairs of "history" the
    earlier turns, and an answer with "weight" 0 is only read. A row with tools, images, reasoning, choices, a context
    or another weight is left out, as is a node of a tree (OASST). A last message of the user without an answer is
    dropped, and the row counts as cut.
    `.json` and `.jsonl`: an array, a row a line, or indented rows. `.csv` and `.tsv`: names in the first line. `.txt`:
    documents between blank lines, in Baize form or plain.

    Warns of rows that cannot be used or are cut, and of what is not read in a folder, and lists both in `.problems`.
    Raises FileNotFoundError for a path that does not exist, and ValueError where no row can be used, or for a file in
    UTF-16.
    """
    if isinstance(path, Documents):
        return path
    path = as_rows(path, "fk.dialogues")
    problems: list[Problem] = []
    stored = store(_documents(path, problems), FEATURES)
    if stored is None:
        reasons = first_problems(problems) or ": it is empty"
        forms = "" if FORMS in reasons else f". A row has {FORMS}"
        raise ValueError(f"nothing can be used of {_name(path)}{reasons}{forms}")
    if problems:
        warn(f"of {_name(path)}, {_unused(problems)}{first_problems(problems)}")
    table, folder = stored
    return Documents(table, problems, [folder])


def check_documents(value: Any, function: str) -> None:
    """Raises TypeError for anything but the documents that `dialogues` returns."""
    if not isinstance(value, Documents):
        raise TypeError(f"{function} takes what fk.dialogues returns: fk.dialogues({shown(value)})")


def store(rows: Iterator[dict[str, Any]], features: Features) -> tuple[Dataset, TemporaryFolder] | None:
    """The rows as a table that is mapped from a file, and the temporary folder of this file; None without rows."""
    folder = TemporaryFolder()
    file = str(folder.path / "rows.arrow")
    if (first := next(rows, None)) is None:
        return None
    with ArrowWriter(path=file, features=features, writer_batch_size=100) as writer:
        writer.write(first)
        for row in rows:
            writer.write(row)
        writer.finalize()
    return Dataset.from_file(file), folder


def _name(path: Any) -> str:
    return str(path) if isinstance(path, str | Path) else "the rows given"


def as_rows(given: Any, function: str, form: str = f"A row has {FORMS}") -> Any:
    """`given`, or the rows of a pandas DataFrame. Raises TypeError for one row, several splits, or what has no rows.

    function, form: who takes the rows, and what a row is, for the error.
    """
    if isinstance(given, DatasetDict | IterableDatasetDict):
        raise TypeError(
            f"{function} got several splits: give one of them, such as data[{next(iter(given), 'train')!r}]"
        )
    if given is None or isinstance(given, Mapping):
        what = "one row: put it into a list" if given else "nothing: give a file, a folder, or a list of rows"
        raise TypeError(f"{function} got {what}. {form}")
    if isinstance(given, pd.DataFrame):
        return _frame_rows(given)
    if isinstance(given, Dataset) and given.format["type"] in ("arrow", "pandas", "polars"):
        return given.with_format(None)  # a row of it would be a table
    if not isinstance(given, Iterable | Path):
        raise TypeError(f"{function} got {shown(given)}: give a file, a folder, or a list of rows. {form}")
    return given


def _frame_rows(frame: pd.DataFrame) -> Any:
    """The rows of a frame. Arrow has no column of texts and numbers: then they are dictionaries."""
    twice = [*frame.columns[frame.columns.duplicated()]]
    require(not twice, f"the DataFrame names the column {shown(twice[0]) if twice else ''} twice: rename one of them")
    try:
        return Dataset.from_pandas(frame, preserve_index=False)
    except (TypeError, ValueError):
        return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _documents(path: Any, problems: list[Problem]) -> Iterator[dict[str, Any]]:
    """Every usable row as a document; the others are appended to `problems`."""
    for each in _read(rows(path)):
        if isinstance(each, Problem):
            problems.append(each)
        else:
            yield each


def _read(rows: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any] | Problem]:
    """Each row as a document, or why it cannot be used, or both where a part of it cannot."""
    for where, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            usable = document(row)
            cut = usable.pop("cut", "")
            json.dumps(usable, ensure_ascii=False).encode()  # half a character, or bytes that were not UTF-8
        except UnicodeEncodeError:
            yield Problem(where, "it is not valid UTF-8")
        except ValueError as error:
            yield Problem(where, str(error).rstrip("."))
        else:
            if cut:
                yield Problem(where, cut, cut=True)
            yield {"text": None, "messages": [], "untrained": [], **usable, "where": where}


def mix(
    dialogues: Documents,
    web_texts: Documents | str | Path | Iterable[str | Mapping[str, Any]] | pd.DataFrame,
    web_fraction: float = 0.05,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> Documents:
    """Dialogues and web text in random order, drawn by `seed`; `web_fraction` of all tokens are web text.

    The default is the recipe of Falcon-40B-Instruct's model card: chat mixed with 5% of RefinedWeb. `web_texts`: texts,
    or rows with "text" or "content", such as a `datasets.Dataset`, streamed or not, read until there are enough; or a
    file or folder for `dialogues`. Those left out are in `.problems`. Without a `tokenizer`, lengths are compared in
    bytes of UTF-8.
    Raises ValueError for a fraction out of range, or for too few web texts, and TypeError for other dialogues.
    """
    check_documents(dialogues, "fk.mix")
    check_whole("seed", seed, 0)
    if not (is_number(web_fraction, 0, 1) and 0 < web_fraction < 1):
        raise ValueError(f"web_fraction={shown(web_fraction)} is not between 0 and 1: the model card's recipe is 0.05")

    def size(text: str) -> int:
        return len(encode_prompt(text, tokenizer)) if tokenizer else len(text.encode())

    problems: list[Problem] = []
    chat = sum(size(each["text"] or "\n".join(m["content"] for m in each["messages"])) for each in dialogues)
    wanted = chat * web_fraction / (1 - web_fraction)
    taken: list[dict[str, Any]] = []
    have = 0
    for each in _web_rows(web_texts, problems):
        if have >= wanted:
            break
        taken.append(each)
        have += size(each["text"])
    if have < wanted:
        unit, possible = "tokens" if tokenizer else "bytes", math.floor(1000 * have / (have + chat)) / 1000
        instead = f", or a web_fraction of at most {possible:.3f}" if possible else ""
        raise ValueError(
            f"{web_fraction:.1%} of web text beside {chat:,} {unit} of dialogues takes {wanted:,.0f} {unit}, but the "
            f"web texts have {have:,}: give more web text{instead}{first_problems(problems)}"
        )
    if problems and not isinstance(web_texts, Documents | str | Path):  # of those, `dialogues` warns
        which = f"{counted(len(problems), 'web text')} {'is' if len(problems) == 1 else 'are'}"
        warn(f"{which} left out{first_problems(problems)}")
    both = concatenate_datasets([dialogues.table, Dataset.from_list(taken, features=FEATURES)])
    order = random.Random(operator.index(seed)).sample(range(len(both)), len(both))
    return Documents(both.select(order), (*dialogues.problems, *problems), dialogues._folders)


def _web_rows(given: Any, problems: list[Problem]) -> Iterator[dict[str, Any]]:
    """The plain texts of `given`, one at a time; rows that are none are appended to `problems`.

    Raises ValueError where the first hundred rows of a stream have no text, since it may never end.
    """
    if isinstance(given, str | Path):
        given = dialogues(given)
    found: Iterable[dict[str, Any] | Problem]
    if isinstance(given, Documents):
        problems += given.problems
        found = given
    else:
        found = _read((f"web text {number}", each) for number, each in enumerate(as_rows(given, "fk.mix"), 1))
    usable = 0
    for each in found:
        if isinstance(each, Problem):
            if not each.cut:  # that of a conversation, which is none as a whole, comes next
                problems.append(each)
        elif each["text"] is None:
            problems.append(Problem(each["where"], "it is a conversation, not a web text"))
        else:
            usable += 1
            yield each
        if not usable and len(problems) == 100 and not isinstance(given, Sized):
            raise ValueError(f"the first {len(problems)} rows have no web text{first_problems(problems)}")


def _unused(problems: Sequence[Problem]) -> str:
    """How many rows are left out, and how many cut: "2 rows left out, 1 row cut"."""
    cut = sum(each.cut for each in problems)
    counts = {"left out": len(problems) - cut, "cut": cut}
    return ", ".join(f"{counted(number, 'row')} {how}" for how, number in counts.items() if number)


def first_problems(problems: Sequence[Problem]) -> str:
    """The first problems, as the end of an error or a warning: each reason once, after its places."""
    places: dict[str, list[str]] = {}
    for each in problems[:3]:
        places.setdefault(each.reason, []).append(each.where)
    text = "; ".join(f"{', '.join(where)}: {reason}" for reason, where in places.items())
    return f": {printable(text)}" if text else ""
