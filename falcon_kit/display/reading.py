"""JSON that other programs wrote: read, or refused with the name of the file and what to do."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INCOMPLETE = "it may be incomplete: download it again"
UNEXPECTED = (TypeError, ValueError, LookupError, AttributeError, RecursionError)
"""What libraries raise for values that they do not expect; not RuntimeError, which torch raises for much else."""


def parse_json(text: str | bytes) -> Any:
    """The value that a text stands for. Raises ValueError for any other text, also for one nested too deeply."""
    try:
        if not text.strip():
            raise ValueError("it is empty")
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(file: Path, remedy: str = INCOMPLETE) -> dict[str, Any]:
    """The JSON object in a file.

    Raises ValueError, with `remedy`, for a file that is not UTF-8, not JSON, or another value than an object.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); {remedy}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} contains a {type(content).__name__}, but a {file.name} is a JSON object; {remedy}.")
    return content


@contextmanager
def named_errors(
    file: Path, remedy: str = INCOMPLETE, kinds: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Names the file in the errors of a library that reads it; OSError and MemoryError stay what they are.

    kinds: of errors; by default all, since each library has its own, and tokenizers raises Exception itself.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except kinds as error:
        raise ValueError(f"{file} cannot be used ({type(error).__name__}: {error}); {remedy}.") from error
