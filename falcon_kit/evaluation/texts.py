"""What `evaluate` takes as `text`: a text, a file, several documents or rows, or texts by name."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_kit.display.errors import check_encodable, require
from falcon_kit.tuning.files import TABLES, check_no_utf16


@dataclass(frozen=True)
class Corpus:
    """One text, or several documents whose losses are added up."""

    name: str
    """Its name in the results."""
    documents: tuple[str, ...]
    """The texts; each is read on its own."""
    where: tuple[str, ...]
    """Where each document is from: file and line, or its number."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.documents).encode()).hexdigest()


def read_corpora(text: Any) -> tuple[Corpus, ...]:
    """The corpora of `text`; one named "text", or by the name of the file, unless it is a mapping by name.

    Raises ValueError for an empty text, a document that is a conversation, or bytes that are not UTF-8.
    """
    if isinstance(text, Mapping):
        require(bool(text), "there are no texts: give at least one by name")
        return tuple(_corpus(str(name), each) for name, each in text.items())
    return (_corpus(text.name if isinstance(text, Path) else "text", text),)


def _corpus(name: str, text: Any) -> Corpus:
    rows = list(_documents(text))
    require(bool(rows), f"{name!r} has no documents: give at least one text")
    for where, each in rows:
        label = where if len(rows) > 1 else f"the text {name!r}"
        if not isinstance(each, str):
            raise TypeError(f"{label} is no text but {type(each).__name__}")
        require(each != "", f"{label} is empty: give at least two tokens")
        check_encodable(label, each)
    return Corpus(name, tuple(each for _, each in rows), tuple(where for where, _ in rows))


def _documents(text: Any) -> Iterable[tuple[str, str]]:
    """Each document, and where it is from."""
    if isinstance(text, str):
        require(
            not os.path.isfile(os.path.expanduser(text)),  # noqa: PTH111, PTH113  # pathlib raises for a long text
            f"{text!r} is a file: give Path({text!r}) for what is in it",
        )
        return [("text", text)]
    if isinstance(text, Path):
        return _file(text)
    if hasattr(text, "problems") or hasattr(text, "iterrows"):  # fk.Documents, or a pandas DataFrame
        return _rows(text) if len(text) else []
    if isinstance(text, Iterable) and not isinstance(text, Mapping):
        documents = list(text)
        if documents and all(isinstance(each, Mapping) for each in documents):
            return _rows(documents)
        return [(f"document {number}", each) for number, each in enumerate(documents, 1)]
    raise TypeError(
        "a text is a str, a pathlib.Path, a list of str, rows in a list or a pandas DataFrame, or fk.Documents; got "
        f"{type(text).__name__}"
    )


def _file(path: Path) -> Iterable[tuple[str, str]]:
    """A file of rows as documents, any other file as one text."""
    path = path.expanduser()
    if path.suffix.lower() in TABLES:
        return _rows(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give a text file, or one of {', '.join(TABLES)}")
    check_no_utf16(path)
    try:
        return [(path.name, path.read_text(encoding="utf-8-sig"))]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error}): convert it first, `iconv -f LATIN1 -t UTF-8`, with the encoding that it "
            "has after -f"
        ) from None


def _rows(given: Any) -> list[tuple[str, str]]:
    """The text of each row of a file, a list or a table, and where it is from."""
    from falcon_kit.tuning.data import dialogues  # it imports pandas and datasets

    rows = [(each["where"], each["text"]) for each in dialogues(given)]
    for where, text in rows:
        require(
            text is not None,
            f"{where} is a conversation, which has no perplexity without a chat format: give plain texts",
        )
    return rows
