"""Rows of files, each with its line: JSON in an array, in lines or indented, CSV, and text with blank lines between."""

from __future__ import annotations

import csv
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from falcon_kit.display.errors import printable
from falcon_kit.display.reading import TwiceNamed, json_object, parse_json
from falcon_kit.generation.chat import BAIZE

TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
"""What the names of files with a row for each document end in."""
SUFFIXES = (*TABLES, ".txt")
BAIZE_MARK = re.compile(r"\[\|(Human|AI)\|\]")
_BAIZE_LINE = re.compile(rf"^{BAIZE_MARK.pattern}", re.MULTILINE)
_SPACE = re.compile(r"[ \t\r\n,]*")
_CHUNK, _LARGEST = 2**20, 2**26  # characters read at once; the longest row of a JSON array, and cell of a table
_LIMIT = threading.Lock()
_limits: list[int] = []
"""For each table that is being read, the limit of the csv module before the first of them."""


def rows(path: Any) -> Iterator[tuple[str, Any]]:
    """Every row with its file and line; in place of a row that cannot be read, a ValueError.

    path: a file, a folder, or several of them or of rows. Raises FileNotFoundError for a path that does not exist or a
    folder without a file to read, and ValueError for a file in another format or in UTF-16.
    """
    if not isinstance(path, str | Path):
        for number, each in enumerate(path, 1):
            yield from rows(each) if isinstance(each, str | Path) else [(f"row {number}", each)]
        return
    if not str(path).strip():
        raise ValueError('got "", which is no path: give a file or a folder; a text itself is {"text": "..."}')
    path = Path(path).expanduser()
    if path.is_dir():
        yield from _rows_of_folder(path)
        return
    _check_file(path)
    for line, row in _rows_of_file(path):
        yield f"{path.name}:{line}", row


def _rows_of_folder(folder: Path) -> Iterator[tuple[str, Any]]:
    """The rows of its files, and a ValueError for each folder or file of another type; a README is passed over."""
    found = sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    files = [each for each in found if each.suffix.lower() in SUFFIXES and not each.is_dir()]
    if not files:
        raise FileNotFoundError(f"{folder} has no file that ends in {', '.join(SUFFIXES)}")
    for each in found:
        if each.is_dir():
            yield each.name, ValueError("it is a folder in a folder, which is not read: give it by its own path")
        elif each in files:
            yield from rows(each)
        elif each.suffix.lower() not in ("", ".md"):
            yield each.name, ValueError(f"only files that end in {', '.join(SUFFIXES)} are read")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {printable(str(path))}: give a file or a folder of {', '.join(SUFFIXES)}; a text itself "
            'is {"text": "..."}'
        )
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path.name} ends in {path.suffix or 'nothing'}, but only files that end in {', '.join(SUFFIXES)} are "
            "read: others as a datasets.Dataset or a pandas DataFrame"
        )
    check_no_utf16(path)


def check_no_utf16(path: Path) -> None:
    """Raises ValueError for a file that begins as UTF-16 does."""
    with path.open("rb") as raw:
        if raw.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{path} is UTF-16: convert it first, `iconv -f UTF-16 -t UTF-8`")


def _rows_of_file(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of one file with the number of their line, read a part at a time."""
    # Bytes that are not UTF-8 become surrogates here, which no text may contain: their row is left out, not the file.
    suffix = path.suffix.lower()
    delimiter = {".csv": ",", ".tsv": "\t"}.get(suffix)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="" if delimiter else None) as file:
        if suffix == ".txt":
            yield from _paragraphs(file)
        elif delimiter:
            yield from _table(file, delimiter)
        else:
            head = file.read(_CHUNK).lstrip()
            file.seek(0)
            array = head[:1] == "["
            if _is_indented(head) or (array and suffix == ".json"):
                yield from _values(lambda: file.read(_CHUNK), array)
            else:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield from ((number, row) for row in _rows_of_line(_json(line)))


def _is_indented(head: str) -> bool:
    """Whether the first value of a JSON file goes over several lines."""
    try:
        return "\n" in head[: json.JSONDecoder().raw_decode(head)[1]]
    except (ValueError, RecursionError):
        return head.partition("\n")[0].strip() in ("{", "[")  # the value is longer than the head, or broken


def _table(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, Any]]:
    """The rows below a line of names; an empty cell is None."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []
    start = 1
    try:
        with _long_cells():
            for cells in reader:
                if not names:
                    names = cells
                    if twice := sorted({each for each in names if names.count(each) > 1}):
                        yield start, ValueError(f"it names the column {twice[0]!r} twice: the file is not read")
                        return
                elif cells and len(cells) != len(names):
                    yield start, ValueError(f"it has {len(cells)} cells, but the first line has {len(names)} names")
                elif cells:
                    yield start, {name: cell or None for name, cell in zip(names, cells, strict=True)}
                start = reader.line_num + 1
    except csv.Error as error:
        yield start, ValueError(f"the table is broken from here on ({error}): the rest of the file is not read")


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lets the csv module read cells of more than 128 KiB until the last table is read: all threads have one limit."""
    with _LIMIT:
        _limits.append(_limits[0] if _limits else csv.field_size_limit(_LARGEST))
    try:
        yield
    finally:
        with _LIMIT:
            before = _limits.pop()
            if not _limits:
                csv.field_size_limit(before)


def _rows_of_line(value: Any) -> list[Any]:
    """A line's row, or the rows of an array of them; a list of messages is one row."""
    rows = isinstance(value, list) and bool(value)
    rows = rows and all(isinstance(each, dict) and not each.keys() & {"role", "from"} for each in value)
    return value if rows else [value]


def _json(line: str) -> Any:
    try:
        return parse_json(line)
    except TwiceNamed as error:
        return error
    except ValueError as error:
        return ValueError(f"it is not JSON ({error})")


def _paragraphs(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Documents between blank lines, except those below Baize's header."""
    paragraph: list[str] = []
    below_header = False
    for number, line in enumerate(chain(lines, [""]), 1):
        if line.strip():
            below_header = not paragraph and line.strip() == BAIZE.system
        if line.strip() or (line and below_header):
            paragraph.append(line)
        elif paragraph:
            text = "".join(paragraph).strip()
            yield number - len(paragraph), {"input" if _BAIZE_LINE.search(text) else "text": text}
            paragraph, below_header = [], False


def _values(read: Callable[[], str], array: bool) -> Iterator[tuple[int, Any]]:
    """The values of a JSON array and of those after it, or of a file of indented values, one at a time."""
    twice: list[str] = []
    decoder = json.JSONDecoder(object_pairs_hook=partial(json_object, twice))
    text, inside = read(), False
    at = text.index("[") if array else 0
    line = 1 + text.count("\n", 0, at)
    while True:
        start = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # an empty match is a match
        line += text.count("\n", at, start)
        at = start
        if array and text.startswith("]" if inside else "[", at):
            inside, at = not inside, at + 1
            continue
        twice.clear()
        try:
            value, end = decoder.raw_decode(text, at)
        except RecursionError:
            yield line, ValueError("a value is nested too deeply: the rest of the file is not read")
            return
        except ValueError as error:
            if len(text) - at < _LARGEST and (more := read()):
                text, at = text[at:] + more, 0  # the only copy, once for many rows
                continue
            if inside or at < len(text):
                yield line, ValueError(f"the JSON is broken from here on ({error}): the rest of the file is not read")
            return
        yield line, TwiceNamed(twice[0]) if twice else value
        line += text.count("\n", at, end)
        at = end
