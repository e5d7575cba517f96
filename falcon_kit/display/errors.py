"""Checks of arguments, and the error text for an unknown name."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any


def unknown_name(kind: str, given: str, known: Sequence[str]) -> str:
    """The error text for a name that is not one of `known`: it lists the nearest names, or all if none is near."""
    names = {name.lower(): name for name in known}
    nearest = [names[name] for name in get_close_matches(given.strip().lower().rpartition("/")[2], names, cutoff=0.55)]
    hint = f"Nearest: {', '.join(nearest)}." if nearest else f"Known: {', '.join(known)}."
    return f"Unknown {kind} {given!r}. {hint}"


def plain_scalar(value: Any) -> Any:
    """A number of numpy or torch as Python's own, which can be written as JSON; any other value as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a GPU's, the host's, or that of torch's allocator on a CPU, whose error has no type."""
    kinds = {each.__name__ for each in type(error).__mro__}
    return bool(kinds & {"OutOfMemoryError", "MemoryError"}) or "allocate memory" in str(error)
