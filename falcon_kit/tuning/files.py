"""Rows of files, each with its line: JSON arrays, JSON lines, and text with blank lines between documents."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl", ".ndjson", ".txt")
BAIZE_MARK = re.compile(r"\[\|(Human|AI)\|\]")
_SPACE = re.compile(r"[ \t\r\n,]*")
_CHUNK, _LARGEST = 2**20, 2**26  # characters read at once; the longest row of a JSON array


def rows(path: Any) -> Iterator[tuple[str, Any]]:
    """Every row with its file and line; in place of a row that cannot be read, a ValueError.

    path: a file, a folder, or several of them or of rows. Raises FileNotFoundError for a path that does not exist or a
    folder without a file to read, and ValueError for a file in another format or in UTF-16.
    """
    if not isinstance(path, str | Path):
        for number, each in enumerate(path, 1):
            yield from rows(each) if isinstance(each, str | Path) else [(f"row {number}", each)]
        return
    path = Path(path).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
        if not files:
            raise FileNotFoundError(f"{path} has no file that ends in {', '.join(SUFFIXES)}")
        yield from rows(files)
        return
    _check_file(path)
    for line, row in _rows_of_file(path):
        yield f"{path.name}:{line}", row


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}: give a file or a folder of {', '.join(SUFFIXES)}; a text itself is "
            '{"text": "..."}'
        )
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path.name} ends in {path.suffix or 'nothing'}, but only files that end in {', '.join(SUFFIXES)} are read"
        )
    with path.open("rb") as raw:
        if raw.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{path} is UTF-16: convert it first, `iconv -f UTF-16 -t UTF-8`")


def _rows_of_file(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of one file with the number of their line, read a part at a time."""
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
    paragraph: list[str] = []
    for number, line in enumerate(chain(lines, [""]), 1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            text = "".join(paragraph).strip()
            yield number - len(paragraph), {"input" if BAIZE_MARK.match(text) else "text": text}
            paragraph = []


def _array(read: Callable[[], str]) -> Iterator[tuple[int, Any]]:
    """The values of a JSON array, one at a time."""
    decoder, line = json.JSONDecoder(), 1
    text = read().lstrip("\ufeff")
    at = text.index("[") + 1
    line += text.count("\n", 0, at)
    while True:
        start = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # an empty match is a match
        line += text.count("\n", at, start)
        at = start
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError as error:
            if text.startswith("]", at):
                return
            if more := read() if len(text) - at < _LARGEST else "":
                text, at = text[at:] + more, 0  # the only copy, once for many rows
                continue
            yield line, ValueError(f"the JSON is broken from here on ({error}): the rest of the file is not read")
            return
        yield line, value
        line += text.count("\n", at, end)
        at = end
