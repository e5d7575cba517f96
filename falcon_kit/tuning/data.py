"""Documents to fine-tune on, conversations and plain texts: made from rows of several forms, checked, split, mixed.

Documents are written to a file on disk and mapped into memory from there (the datasets library), so they may exceed
memory. A row that cannot be used is left out, and `Documents.problems` names it by file and line.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter

from falcon_kit.display.tables import html_table
from falcon_kit.generation.chat import BAIZE, Message, check_messages
from falcon_kit.tuning.files import BAIZE_MARK, rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "text": Value("string"),
        "where": Value("string"),
    }
)
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_FORMS = (
    '"messages" (chat), "conversations" (ShareGPT), "instruction" and "output" (Alpaca), "prompt" and "completion", '
    '"input" (Baize) or "text"'
)


@dataclass(frozen=True)
class Problem:
    """A row, or a part of one, that is not used."""

    where: str
    """File and line, "chats.jsonl:17"; for a row in a list, "row 17"."""
    reason: str
    """Why it is not used."""


class Documents(Sequence[dict[str, Any]]):
    """Conversations and texts, each {"messages": [...], "text": None or a text, "where": file and line}."""

    def __init__(self, table: Dataset, problems: Sequence[Problem] = (), folders: Sequence[Any] = ()) -> None:
        self.table = table
        """The documents, as a `datasets.Dataset` that is mapped from disk."""
        self.problems = tuple(problems)
        """Rows left out, and why."""
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
        if not 0 < share < 1 or len(self) < 2:
            raise ValueError(f"share={share} of {len(self)} documents: give a share between 0 and 1, and two or more")
        order = random.Random(seed).sample(range(len(self)), len(self))
        count = min(max(1, round(share * len(self))), len(self) - 1)
        return self._select(sorted(order[count:])), self._select(sorted(order[:count]))

    def _select(self, indices: Iterable[int]) -> Documents:
        return Documents(self.table.select(indices), self.problems, self._folders)

    @property
    def texts(self) -> int:
        """The number of plain texts among the documents."""
        return sum(text is not None for text in self.table["text"])

    def __repr__(self) -> str:
        left = f"; {len(self.problems)} rows left out, see .problems" if self.problems else ""
        return f"Documents({len(self) - self.texts:,} conversations, {self.texts:,} texts{left})"

    def _repr_html_(self) -> str:
        begins = [
            (each["where"], each["text"] or " / ".join(m["content"] for m in each["messages"])) for each in self[:3]
        ]
        table = html_table(repr(self), ("where", "begins"), [(where, text[:160]) for where, text in begins])
        left_out = [(each.where, each.reason) for each in self.problems[:10]]
        return table + (html_table("Left out", ("where", "why"), left_out) if left_out else "")


def _all_text(document: Mapping[str, Any]) -> str:
    """A plain text, or the contents of all messages."""
    return document["text"] or "\n".join(each["content"] for each in document["messages"])


def dialogues(path: str | Path | Iterable[str | Path | Mapping[str, Any]]) -> Documents:
    """Documents to fine-tune on, read from a file, a folder, several of them, or a list of rows.

    `.json` (one array, or a row a line) and `.jsonl`: rows with "messages" (role and content), "conversations"
    (ShareGPT), "instruction", "input" and "output" (Alpaca), "prompt" and "completion", "input" (Baize: `[|Human|]`
    and `[|AI|]`) or "text". `.txt`: documents between blank lines, in Baize form or plain. A last message of the user
    without an answer is dropped.

    Warns of rows that cannot be used and lists them in `.problems`. Raises FileNotFoundError for a path that does not
    exist, and ValueError where no row can be used, or for a file in UTF-16.
    """
    if path is None or isinstance(path, Mapping):
        given = "one row: put it into a list" if path else "nothing: give a file, a folder, or a list of rows"
        raise TypeError(f"fk.dialogues got {given}. A row has {_FORMS}")
    problems: list[Problem] = []
    stored = store(_documents(path, problems), FEATURES)
    if stored is None:
        reasons = "; ".join(f"{each.where}: {each.reason}" for each in problems[:3]) or "it is empty"
        raise ValueError(f"nothing to fine-tune on in {_name(path)}: {reasons.rstrip('.')}. A row has {_FORMS}")
    if problems:
        first = "; ".join(f"{each.where}: {each.reason}" for each in problems[:3])
        warnings.warn(f"{len(problems)} rows of {_name(path)} are left out: {first}", stacklevel=2)
    table, folder = stored
    return Documents(table, problems, [folder])


def store(rows: Iterator[dict[str, Any]], features: Features) -> tuple[Dataset, TemporaryDirectory[str]] | None:
    """The rows as a table that is mapped from a file, and the temporary folder of this file; None without rows."""
    folder = TemporaryDirectory(prefix="falcon-kit-")
    file = str(Path(folder.name) / "rows.arrow")
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


def _documents(path: Any, problems: list[Problem]) -> Iterator[dict[str, Any]]:
    """Every usable row as a document; the others are appended to `problems`."""
    for where, row in rows(path):
        try:
            if isinstance(row, ValueError):
                raise row
            document = _document(row)
            json.dumps(document, ensure_ascii=False).encode()  # half a character, or bytes that were not UTF-8
        except UnicodeEncodeError:
            problems.append(Problem(where, "it is not valid UTF-8"))
        except ValueError as error:
            problems.append(Problem(where, str(error).rstrip(".")))
        else:
            yield {"text": None, "messages": [], **document, "where": where}


def _document(row: Any) -> dict[str, Any]:
    """A row of any form as {"messages": ...} or {"text": ...}; ValueError for one that cannot be trained on."""
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, Mapping):
        row = {"messages": row}
    if isinstance(row.get("text"), str):
        if not row["text"].strip():
            raise ValueError("its text is blank")
        return {"text": row["text"]}
    if pair := _pair(row):
        return {"messages": _checked(pair)}
    if isinstance(row.get("input"), str):
        return {"messages": _checked(_baize(row["input"]))}
    if isinstance(row.get("conversations"), list):
        return {"messages": _checked([_share_gpt(turn) for turn in row["conversations"]])}
    if isinstance(row.get("messages"), list):
        return {"messages": _checked(row["messages"])}
    raise ValueError(f"it has none of {_FORMS}, but {', '.join(map(repr, row)) or 'nothing'}")


def _pair(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The two messages of a row in Alpaca's form, or of a prompt and its completion; none for other forms."""
    if isinstance(row.get("instruction"), str) and "output" in row:
        prompt, answer = row["instruction"], row["output"]
        if row.get("input"):
            prompt = f"{prompt}\n\n{row['input']}"
    elif isinstance(row.get("prompt"), str) and "completion" in row:
        prompt, answer = row["prompt"], row["completion"]
    else:
        return []
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _baize(text: str) -> list[dict[str, str]]:
    """The messages between Baize's marks, after a system message if another text than Baize's default precedes them."""
    before, *parts = BAIZE_MARK.split(text)
    messages = [
        {"role": "user" if mark == "Human" else "assistant", "content": content.strip()}
        for mark, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if before.strip() not in ("", BAIZE.system):
        messages.insert(0, {"role": "system", "content": before.strip()})
    return (
        messages[:-1] if messages and not messages[-1]["content"] else messages
    )  # Baize's files end with an empty one


def _share_gpt(turn: Any) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    role = str(turn.get("from", turn.get("role")))
    return {"role": _ROLES.get(role, role), "content": turn.get("value", turn.get("content"))}


def _checked(messages: list[Any]) -> list[Message]:
    """The conversation up to the last answer; ValueError for one without an answer."""
    checked = check_messages(messages)
    if checked[-1]["role"] == "user":
        checked = checked[:-1]
    if not any(each["role"] == "assistant" for each in checked):
        raise ValueError("it has no message of the assistant, so there is nothing to train on")
    return checked


def mix(
    dialogues: Documents,
    web_texts: Documents | str | Path | Iterable[str],
    web_fraction: float = 0.05,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> Documents:
    """Dialogues and web text in random order, drawn by `seed`; `web_fraction` of all tokens are web text.

    The default is the recipe of Falcon-40B-Instruct's model card: chat mixed with 5% of RefinedWeb. `web_texts`: texts,
    read until there are enough, or a file or folder for `dialogues`. Without a `tokenizer`, lengths are
    compared in bytes of UTF-8.
    Raises ValueError for a fraction out of range, or for too few web texts.
    """
    if not 0 < web_fraction < 1:
        raise ValueError(f"web_fraction={web_fraction} is not between 0 and 1: the model card's recipe is 0.05")

    def size(text: str) -> int:
        return len(tokenizer(text, verbose=False)["input_ids"]) if tokenizer else len(text.encode())

    web = _read_web(web_texts)
    chat = sum(size(_all_text(each)) for each in dialogues)
    wanted = chat * web_fraction / (1 - web_fraction)
    taken: list[dict[str, Any]] = []
    have = 0
    for number, text in enumerate(_texts(web), 1):
        if have >= wanted:
            break
        taken.append({"messages": [], "text": text, "where": f"web text {number}"})
        have += size(text)
    if have < wanted:
        unit = "tokens" if tokenizer else "bytes"
        raise ValueError(
            f"{web_fraction:.1%} of web text beside {chat:,} {unit} of dialogues takes {wanted:,.0f} {unit}, but the "
            f"web texts have {have:,}: give more web text, or a web_fraction of at most {have / (have + chat):.3f}"
        )
    both = concatenate_datasets([dialogues.table, Dataset.from_list(taken, features=FEATURES)])
    order = random.Random(seed).sample(range(len(both)), len(both))
    problems = web.problems if isinstance(web, Documents) else ()
    return Documents(both.select(order), (*dialogues.problems, *problems), dialogues._folders)


def _read_web(web_texts: Documents | str | Path | Iterable[str]) -> Documents | Iterable[str]:
    return dialogues(web_texts) if isinstance(web_texts, str | Path) else web_texts


def _texts(web: Documents | Iterable[str]) -> Iterable[str]:
    return (each["text"] for each in web if each["text"]) if isinstance(web, Documents) else web
