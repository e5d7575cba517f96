"""Checks of values, how an error quotes what was given, how a process ended, and whether memory ran out."""

import operator
import signal
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any


def unknown_name(kind: str, given: object, known: Sequence[str]) -> str:
    """The error text for what is not one of the names `known`: it lists the nearest, or all if none is near."""
    names = {name.lower(): name for name in known}
    word = given.strip().lower().rpartition("/")[2] if isinstance(given, str) else ""
    nearest = [names[name] for name in get_close_matches(word, names, cutoff=0.55)]
    hint = (
        f"Nearest: {', '.join(map(printable, nearest))}." if nearest else f"Known: {', '.join(map(printable, known))}."
    )
    quoted = repr(given) if isinstance(given, str) else shown(given)
    return f"Unknown {kind} {quoted}. {hint}"


def check_known(kind: str, given: object, known: Sequence[str]) -> None:
    """Raises ValueError, with the nearest names, unless a value is one of the names `known`."""
    if not isinstance(given, str) or given not in known:
        raise ValueError(unknown_name(kind, given, known))


def plain_scalar(value: Any) -> Any:
    """A number of numpy or torch as Python's own, which can be written as JSON; any other value as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(printable(message, keep="\n"))


LARGEST = 2**63 - 1
"""The largest whole number that the kit accepts: what 64 bits hold."""


def is_whole(value: object, least: float, most: float = LARGEST) -> bool:
    """Whether a value is a whole number in a range, of numpy or torch too; a boolean is none."""
    value = plain_scalar(value)
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: object, least: float, most: float) -> bool:
    """Whether a value is a number in a range, of numpy or torch too; a boolean and nan are none."""
    value = plain_scalar(value)
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def check_whole(name: str, value: Any, least: int, most: int = LARGEST) -> None:
    """Raises ValueError, with the range, unless a value is a whole number in it."""
    largest = "2**63 - 1" if most == LARGEST else most
    require(
        is_whole(value, least, most), f"{name} must be a whole number from {least} to {largest}, got {shown(value)}"
    )


def check_flag(name: str, value: Any, *others: Any) -> None:
    """Raises ValueError unless a value is True or False, of numpy or torch too, or one of the others."""
    value = plain_scalar(value)
    *allowed, last = map(repr, (True, False, *others))
    is_allowed = isinstance(value, bool | str | None) and value in (True, False, *others)
    require(is_allowed, f"{name} must be {', '.join(allowed)} or {last}; got {shown(value)}")


def check_flags(**values: Any) -> None:
    """Raises ValueError unless each value is True or False, of numpy or torch too."""
    for name, value in values.items():
        check_flag(name, value)


JOIN_SURROGATES = "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') joins pairs and replaces the rest"
"""What to do with half a surrogate pair."""


def is_encodable(text: str) -> bool:
    """Whether UTF-8 can encode a text: it cannot if half a surrogate pair is in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_encodable(label: str, text: str) -> None:
    """Raises ValueError, with what to do, for a text that UTF-8 cannot encode."""
    require(is_encodable(text), f"{label} has a lone surrogate, which UTF-8 cannot encode: {JOIN_SURROGATES}")


def join_surrogates(text: str) -> str:
    """The text with surrogate pairs joined, and "\ufffd" for half a pair, which tokenizers refuse."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def printable(text: str, keep: str = "") -> str:
    """A text from outside, as a `repr` or an error quotes it: control and direction characters are written out.

    keep: characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else repr(each)[1:-1] for each in text)


def shown(value: Any) -> str:
    """A value as an error quotes it, with at most 60 characters; `repr` refuses to write out a very large number."""
    try:
        text = repr(value)
    except ValueError:
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return shortened(text)


def shortened(text: str, most: int = 60) -> str:
    """A text of at most so many characters: the beginning of a longer one."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def to_save(value: Any) -> str:
    """For an error: how a transformers model, or a pair of one and its tokenizer, becomes a Falcon; else nothing."""
    parts = value if isinstance(value, tuple | list) else (value,)
    if not any(hasattr(each, "save_pretrained") for each in parts):
        return ""
    return ": model.save_pretrained(folder), tokenizer.save_pretrained(folder), and take fk.load(folder)"


class Portable:
    """An error that can be copied, and pickled to the process that waits for it, whatever its constructor takes.

    Python would call the constructor with the message alone, which breaks a process pool.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        error: Any = self
        return _rebuilt, (type(self), error.args, vars(self))


def _rebuilt(kind: Any, args: tuple[Any, ...], state: Mapping[str, Any]) -> Any:
    """An error with its message and attributes, made without its constructor."""
    error = kind.__new__(kind, *args)
    error.args = args  # OSError leaves them to its constructor
    vars(error).update(state)
    return error


def differences(
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    places: tuple[str, str] = ("there", "here"),
    is_same: Callable[[Any, Any], bool] = operator.eq,
) -> str:
    """The names whose values differ, with both values, as an error lists them; empty where none does."""
    return "; ".join(
        f"{name}: {one.get(name)!r} {places[0]}, {other.get(name)!r} {places[1]}"
        for name in sorted(one.keys() | other.keys())
        if not is_same(one.get(name), other.get(name))
    )


def exit_cause(code: int) -> str:
    """How a process ended, by its exit code as `subprocess` reports it: below 0 for a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = next((each.name for each in signal.Signals if each == -code), f"signal {-code}")
    return f"was killed by {name}" + (", perhaps out of memory" if name == "SIGKILL" else "")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a GPU's, the host's, or that of torch's allocator on a CPU, whose error has no type."""
    kinds = {each.__name__ for each in type(error).__mro__}
    return bool(kinds & {"OutOfMemoryError", "MemoryError"}) or "allocate memory" in str(error)
