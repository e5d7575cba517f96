"""Guardrails that a caller passes: prompts are checked before anything runs, texts before the caller gets them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from falcon_kit.generation.chat import check_messages
from falcon_kit.generation.prompts import check_prompt, is_conversation, numbered
from falcon_kit.generation.text import Generation, Piece, PieceStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")
"""A `Generation`, or a list of them."""
_ENDED_EARLY = ("cancelled", "broken")  # such a text may be longer than what was read from the stream


class Guard(Protocol):
    """What `falcon_kit.guardrails(...)` returns."""

    def raise_if_found(self, text: str, where: Literal["prompt", "output"], label: str) -> None:
        """Raises `Blocked` for a text in which something is found; its message begins with the label."""

    def stream(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces of an output that passed. Raises `Blocked` at the first finding; closes `pieces` at the end."""


def check_guard(guardrails: Any) -> None:
    """Raises TypeError for what is neither guardrails nor None."""
    if not (guardrails is None or hasattr(guardrails, "raise_if_found")):
        raise TypeError(
            f"guardrails must be what fk.guardrails(...) returns, got a {type(guardrails).__name__}: "
            "fk.guardrails(custom=...) takes a function or a classifier"
        )


def check_given(guardrails: Guard | None, given: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Checks a prompt, each of several prompts, or the content of each message of a conversation.

    tokenizer: decodes a prompt of token ids; without one, such a prompt raises ValueError. Raises TypeError for
    guardrails of another kind.
    """
    check_guard(guardrails)
    if guardrails is None:
        return
    if is_conversation(given):
        kind, texts = "message", [each["content"] for each in check_messages(given)]
    else:
        kind, texts = "prompt", [_as_text(each, tokenizer) for each in check_prompt(given)[0]]
    for number, text in enumerate(texts, 1):
        guardrails.raise_if_found(text, "prompt", numbered(kind, number, len(texts)))


def _as_text(prompt: str | list[int], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text of a prompt. Ids outside the vocabulary are left out: the model refuses them."""
    if isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise ValueError("guardrails read text, and this endpoint's tokenizer is not here: give the prompt as a text")
    return str(tokenizer.decode([token for token in prompt if 0 <= token < len(tokenizer)]))


def checked(guardrails: Guard | None, generate: Callable[[], Result]) -> Result:
    """What `generate` returns, after each text of it was checked; so is each text that its error has."""
    if guardrails is None:
        return generate()
    try:
        result = generate()
    except Exception as error:  # noqa: BLE001  # raised again below
        broken = error
    else:
        texts: Any = result if isinstance(result, list) else [result]
        _check_texts(guardrails, texts)
        return result
    raise _checked_error(guardrails, broken)


def _check_texts(guardrails: Guard, generations: Sequence[Generation]) -> None:
    for number, each in enumerate(generations, 1):
        guardrails.raise_if_found(each.text, "output", numbered("output", number, len(generations)))


def _checked_error(guardrails: Guard, error: Exception) -> Exception:
    """The error, or `Blocked` if one of its `generations` is blocked, such as those of `IncompleteAnswer`.

    Call it outside of `except`: else the `__context__` of `Blocked` would have the text.
    """
    try:
        _check_texts(guardrails, getattr(error, "generations", ()))
    except ValueError as blocked:
        return blocked
    return error


class GuardedStream(PieceStream):
    """A stream that returns a piece once none of it can become part of a finding, and raises `Blocked` at the first.

    `close()`, the end of a `with` block, a finding and Ctrl-C stop the model. Any thread may close it, also while
    another one reads.
    """

    def __init__(self, stream: PieceStream, guardrails: Guard) -> None:
        self._stream, self._guardrails, self._pieces = stream, guardrails, guardrails.stream(stream)
        self._read_lock = threading.Lock()
        self._closed = self._read_to_the_end = False
        self._error: Exception | None = None

    def __next__(self) -> Piece:
        with self._read_lock:
            if self._closed:
                raise StopIteration
            try:
                return next(self._pieces)
            except StopIteration:
                self._read_to_the_end = True
                raise
            except Exception as error:  # noqa: BLE001  # raised again below
                broken = error
        self._error = _checked_error(self._guardrails, broken)
        raise self._error

    def __repr__(self) -> str:
        return f"GuardedStream({self._stream!r}, {self._guardrails!r})"

    def close(self) -> None:
        """Stops the model, or closes the connection, and waits until that is done."""
        self._closed = True
        self._stream.close()

    @property
    def generation(self) -> Generation:
        """The whole text and its statistics, checked. Raises RuntimeError before the end, and `Blocked` after it."""
        if self._error is not None and not hasattr(self._error, "generations"):
            raise self._error
        generation = self._stream.generation
        if not self._read_to_the_end or generation.finish_reason in _ENDED_EARLY:
            _check_texts(self._guardrails, [generation])
        return generation


Streaming = TypeVar("Streaming", bound=PieceStream)


def guarded(stream: Streaming, guardrails: Guard | None) -> Streaming | GuardedStream:
    """The stream, with its pieces checked if there are guardrails."""
    return stream if guardrails is None else GuardedStream(stream, guardrails)
