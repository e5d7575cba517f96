"""JSON that other programs wrote: read, or refused with the name of the file and what to do."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from falcon_kit.display.errors import Portable, printable

INCOMPLETE = "it may be incomplete: download it again"
UNEXPECTED = (TypeError, ValueError, LookupError, AttributeError, RecursionError)
"""What libraries raise for values that they do not expect; not RuntimeError, which torch raises for much else."""


class TwiceNamed(Portable, ValueError):
    """An object of JSON names a key twice with different values, of which Python would take the last in silence."""

    def __init__(self, key: str) -> None:
        super().__init__(f"it names {key!r} twice, with different values: keep the one that is meant")


def json_object(twice: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, as a decoder's `object_pairs_hook`. twice: gets the keys that have two different values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice += [key for key, value in pairs if repr(value) != repr(found[key])]  # nan is not equal to nan
    return found


def parse_json(text: str | bytes) -> Any:
    """The value that a text stands for.

    Raises ValueError for any other text, for one nested too deeply, and for an object with two values of one key.
    """
    twice: list[str] = []
    try:
        if not text.strip():
            raise ValueError("it is empty")
        value = json.loads(text, object_pairs_hook=partial(json_object, twice))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if twice:
        raise TwiceNamed(twice[0])
    return value


def read_json(file: Path, remedy: str = INCOMPLETE) -> dict[str, Any]:
    """The JSON object in a file.

    Raises ValueError, with `remedy`, for a file that is not UTF-8, not JSON, or another value than an object.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except TwiceNamed as error:
        raise ValueError(f"{file} cannot be used: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); {remedy}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} contains a {type(content).__name__}, but a {file.name} is a JSON object; {remedy}.")
    return content


def texts_by_name(file: Path) -> dict[str, dict[str, str]]:
    """The tables of one of the kit's own JSON files, which list several names for each text: the text of each name."""
    tables = json.loads(file.read_text(encoding="utf-8"))
    return {key: {name: text for text, names in table.items() for name in names} for key, table in tables.items()}


@contextmanager
def named_errors(
    file: Path, remedy: str = INCOMPLETE, kinds: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Names the file in the errors of a library that reads it.

    OSError, MemoryError, and ImportError for a package that the library lacks, stay what they are.
    kinds: of errors; by default all, since each library has its own, and tokenizers raises Exception itself. A panic of
    a library in Rust, which is no Exception, is one of them.
    """
    try:
        yield
    except (OSError, MemoryError, ImportError):
        raise
    except BaseException as error:
        if not isinstance(error, kinds) and type(error).__name__ != "PanicException":
            raise
        reason = printable(f"{type(error).__name__}: {error}", keep="\n")
        raise ValueError(f"{file} cannot be used ({reason}); {remedy}.") from error
