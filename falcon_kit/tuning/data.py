"""Dialogues and web text to fine-tune on: read from files, checked row by row, mixed.

Whatever form a row has, it becomes a conversation of messages or a plain text. Rows go to a file on disk and are mapped
into memory from there (the datasets library), so that they may be more than memory holds. A bad row is never used and
never dropped in silence: `Documents.problems` names it by file and line.
"""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter

from falcon_kit.display.tables import html_table
from falcon_kit.generation.chat import BAIZE, Message, check_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "text": Value("string"),
        "where": Value("string"),
    }
)
SUFFIXES = (".json", ".jsonl", ".ndjson", ".txt")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_MARK = re.compile(r"\[\|(Human|AI)\|\]")
_SPACE = re.compile(r"[ \t\r\n,]*")
_CHUNK, _LARGEST = 2**20, 2**26  # characters read at once; the longest row of a JSON array
_FORMS = (
    '"messages" (chat), "conversations" (ShareGPT), "instruction" and "output" (Alpaca), "prompt" and "completion", '
    '"input" (Baize) or "text"'
)


@dataclass(frozen=True)
class Problem:
    """A row that is not used."""

    where: str
    """File and line, "chats.jsonl:17"; for rows given directly, "row 17"."""
    reason: str
    """What is wrong with it."""


class Documents(Sequence[dict[str, Any]]):
    """Conversations and texts, each {"messages": [...], "text": None or a text, "where": file and line}."""

    def __init__(self, table: Dataset, problems: Sequence[Problem] = (), held: Sequence[Any] = ()) -> None:
        self.table = table
        """The rows, as a `datasets.Dataset` that is mapped from disk."""
        self.problems = tuple(problems)
        """Rows left out, and why."""
        self._held = tuple(held)  # temporary folders, which go when the last table on them does

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        """One document; for a slice, Documents of their own."""
        if isinstance(index, slice):
            return self._select(range(*index.indices(len(self))))
        return dict(self.table[int(index)])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.table)

    def split(self, share: float, seed: int = 0) -> tuple[Documents, Documents]:
        """Two parts without overlap, drawn by `seed`: the rest, and `share` of the documents, at least one of each."""
        if not 0 < share < 1 or len(self) < 2:
            raise ValueError(f"share={share} of {len(self)} documents: give a share between 0 and 1, and two or more")
        order = random.Random(seed).sample(range(len(self)), len(self))
        count = min(max(1, round(share * len(self))), len(self) - 1)
        return self._select(sorted(order[count:])), self._select(sorted(order[:count]))

    def _select(self, indices: Iterable[int]) -> Documents:
        return Documents(self.table.select(indices), self.problems, self._held)

    @property
    def texts(self) -> int:
        """How many are plain texts, not conversations."""
        return sum(text is not None for text in self.table["text"])

    def __repr__(self) -> str:
        left = f"; {len(self.problems)} rows left out, see .problems" if self.problems else ""
        return f"Documents({len(self) - self.texts:,} conversations, {self.texts:,} texts{left})"

    def _repr_html_(self) -> str:
        rows = [
            (each["where"], each["text"] or " / ".join(m["content"] for m in each["messages"])) for each in self[:3]
        ]
        shown = html_table(repr(self), ("where", "begins"), [(where, text[:160]) for where, text in rows])
        left = [(each.where, each.reason) for each in self.problems[:10]]
        return shown + (html_table("Left out", ("where", "why"), left) if left else "")


def _said(document: Mapping[str, Any]) -> str:
    """All words of a document."""
    return document["text"] or "\n".join(each["content"] for each in document["messages"])


def dialogues(path: str | Path | Iterable[str | Path | Mapping[str, Any]]) -> Documents:
    """Reads what to fine-tune on: a file, a folder, several of them, or rows given directly.

    `.json` (one array, or a row a line) and `.jsonl`: rows with "messages" (role and content), "conversations"
    (ShareGPT), "instruction", "input" and "output" (Alpaca), "prompt" and "completion", "input" (Baize: `[|Human|]`
    and `[|AI|]`) or "text". `.txt`: documents between blank lines, in Baize
    form or plain. A last turn of the user, which nothing answers, is dropped.

    Warns of rows that cannot be used and keeps them in `.problems`. Raises FileNotFoundError for a path that is not
    there, and ValueError where no row can be used, or for a file in another encoding than UTF-8.
    """
    if path is None or isinstance(path, Mapping):
        given = "one row: put it into a list" if path else "nothing: give a file, a folder, or a list of rows"
        raise TypeError(f"fk.dialogues got {given}. A row has {_FORMS}")
    problems: list[Problem] = []
    found = store(_documents(path, problems), FEATURES)
    if found is None:
        reasons = "; ".join(f"{each.where}: {each.reason}" for each in problems[:3]) or "it is empty"
        raise ValueError(f"nothing to fine-tune on in {_name(path)}: {reasons.rstrip('.')}. A row has {_FORMS}")
    if problems:
        first = "; ".join(f"{each.where}: {each.reason}" for each in problems[:3])
        warnings.warn(f"{len(problems)} rows of {_name(path)} are left out: {first}", stacklevel=2)
    return Documents(found[0], problems, [found[1]])


def store(rows: Iterator[dict[str, Any]], features: Features) -> tuple[Dataset, TemporaryDirectory[str]] | None:
    """The rows in a file on disk, mapped into memory, and the folder that it lies in; None if there are none."""
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
    """Every usable row as a document; `problems` gets the others."""
    for where, row in _rows(path):
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


def _rows(path: Any) -> Iterator[tuple[str, Any]]:
    """Every row with its place; a ValueError in place of one that cannot be read."""
    if not isinstance(path, str | Path):
        for number, each in enumerate(path, 1):
            yield from _rows(each) if isinstance(each, str | Path) else [(f"row {number}", each)]
        return
    path = Path(path).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
        if not files:
            raise FileNotFoundError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
        yield from _rows(files)
        return
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}: give a file or a folder of {', '.join(SUFFIXES)}; a text itself is "
            '{"text": "..."}'
        )
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path.name} ends in {path.suffix or 'nothing'}, and what is read ends in {', '.join(SUFFIXES)}"
        )
    for line, row in _read(path):
        yield f"{path.name}:{line}", row


def _read(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of one file with the number of their line, without holding the file in memory."""
    with path.open("rb") as raw:
        if raw.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{path} is UTF-16: convert it first, `iconv -f UTF-16 -t UTF-8`")
    # Bytes that are not UTF-8 become surrogates here, which no text may contain: their row is left out, not the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        if path.suffix == ".txt":
            yield from _paragraphs(file)
        elif path.suffix == ".json" and file.read(_CHUNK).lstrip()[:1] == "[":
            file.seek(0)
            yield from _array(lambda: file.read(_CHUNK))
        else:
            file.seek(0)
            yield from ((number, _json(line)) for number, line in enumerate(file, 1) if line.strip())


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return ValueError(f"it is not JSON ({error})")


def _paragraphs(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Documents between blank lines."""
    held: list[str] = []
    for number, line in enumerate(chain(lines, [""]), 1):
        if line.strip():
            held.append(line)
        elif held:
            text = "".join(held).strip()
            yield number - len(held), {"input" if _MARK.match(text) else "text": text}
            held = []


def _array(read: Callable[[], str]) -> Iterator[tuple[int, Any]]:
    """The values of a JSON array, one at a time."""
    decoder, line = json.JSONDecoder(), 1
    held = read().lstrip("\ufeff")
    at = held.index("[") + 1
    line += held.count("\n", 0, at)
    while True:
        start = _SPACE.match(held, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        line += held.count("\n", at, start)
        at = start
        try:
            value, end = decoder.raw_decode(held, at)
        except ValueError as error:
            if held.startswith("]", at):
                return
            if more := read() if len(held) - at < _LARGEST else "":
                held, at = held[at:] + more, 0  # only here, once for many rows
                continue
            yield line, ValueError(f"the JSON is broken from here on ({error}): the rest of the file is not read")
            return
        yield line, value
        line += held.count("\n", at, end)
        at = end


def _document(row: Any) -> dict[str, Any]:
    """What a row says, as {"messages": ...} or {"text": ...}; ValueError for what cannot be trained on."""
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
    """The two turns of a row in Alpaca's form, or of a prompt and its completion; none for other forms."""
    if isinstance(row.get("instruction"), str) and "output" in row:
        asked, answer = row["instruction"], row["output"]
        if row.get("input"):
            asked = f"{asked}\n\n{row['input']}"
    elif isinstance(row.get("prompt"), str) and "completion" in row:
        asked, answer = row["prompt"], row["completion"]
    else:
        return []
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _baize(text: str) -> list[dict[str, str]]:
    """Turns between Baize's marks; what stands before them is a system text, unless it is Baize's own."""
    before, *parts = _MARK.split(text)
    turns = [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    own = before.strip() in ("", BAIZE.system)
    turns = turns if own else [{"role": "system", "content": before.strip()}, *turns]
    return turns[:-1] if turns and not turns[-1]["content"] else turns  # files of Baize end with an empty turn


def _share_gpt(turn: Any) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    role = str(turn.get("from", turn.get("role")))
    return {"role": _ROLES.get(role, role), "content": turn.get("value", turn.get("content"))}


def _checked(messages: list[Any]) -> list[Message]:
    """The conversation up to the assistant's last word."""
    checked = check_messages(messages)
    if checked[-1]["role"] == "user":
        checked = checked[:-1]
    if not any(each["role"] == "assistant" for each in checked):
        raise ValueError("the assistant says nothing in it, so there is nothing to train on")
    return checked


def mix(
    dialogues: Documents,
    web_texts: Documents | str | Path | Iterable[str],
    web_fraction: float = 0.05,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> Documents:
    """Dialogues and web text in one seeded order, `web_fraction` of all tokens being web text.

    The default is the recipe of Falcon-40B-Instruct's model card: chat mixed with 5% of RefinedWeb. `web_texts`: texts,
    of which only as many are read as it takes, or a file or folder for `dialogues`. Without a `tokenizer`, lengths are
    compared in bytes of UTF-8.
    Raises ValueError for a fraction out of range, or where the web texts are too few.
    """
    if not 0 < web_fraction < 1:
        raise ValueError(f"web_fraction={web_fraction} is not between 0 and 1: the model card's recipe is 0.05")

    def size(text: str) -> int:
        return len(tokenizer(text, verbose=False)["input_ids"]) if tokenizer else len(text.encode())

    web = _read_web(web_texts)
    chat = sum(size(_said(each)) for each in dialogues)
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
            f"{web_fraction:.1%} beside {chat:,} {unit} of dialogues are {wanted:,.0f} {unit} of web text, but there "
            f"are {have:,}: give more web text, or a web_fraction of at most {have / (have + chat):.3f}"
        )
    both = concatenate_datasets([dialogues.table, Dataset.from_list(taken, features=FEATURES)])
    order = random.Random(seed).sample(range(len(both)), len(both))
    problems = web.problems if isinstance(web, Documents) else ()
    return Documents(both.select(order), (*dialogues.problems, *problems), dialogues._held)


def _read_web(given: Documents | str | Path | Iterable[str]) -> Documents | Iterable[str]:
    return dialogues(given) if isinstance(given, str | Path) else given


def _texts(web: Documents | Iterable[str]) -> Iterable[str]:
    return (each["text"] for each in web if each["text"]) if isinstance(web, Documents) else web
