"""The guardrails of a session: those of `fk.guardrails(...)`, or a function; both check prompts and outputs."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from falcon_kit.display.errors import require
from falcon_kit.guardrails import Blocked
from falcon_kit.guardrails.guard import Guardrails
from falcon_kit.playground.records import Span

Guard = Guardrails | Callable[[str], str | None]
"""What `fk.guardrails(...)` returns, or a function that takes a text and returns a reason to refuse it, or None."""
_SENTENCE_ENDS = frozenset(".!?:;\n。！？…")


class Refused(Exception):
    """The guardrails refuse an output; the message is the reason."""


class OutputCheck(Protocol):
    """One output while it is generated."""

    def push(self, span: Span) -> list[Span]:
        """Takes the next span; the spans that may be shown now. Raises `Refused`."""

    def end(self) -> list[Span]:
        """The spans that were held back, at the end of the text. Raises `Refused`."""


def check_guard(guard: Any) -> None:
    """Raises ValueError for guardrails that cannot be called."""
    require(guard is None or callable(guard), f"guardrails must be callable, got {guard!r:.60}")


def check_prompts(guard: Guard | None, texts: Iterable[str]) -> None:
    """Raises ValueError, with the reason, for a prompt or a message that the guardrails refuse."""
    if guard is None:
        return
    for text in texts:
        reason = guard.check(text, "prompt").reasons if isinstance(guard, Guardrails) else guard(text)
        require(not reason, f"the guardrails refuse this text: {reason}")


def output_check(guard: Guard | None) -> OutputCheck:
    """The check of one output."""
    if guard is None:
        return _Unchecked()
    return _Checked(guard) if isinstance(guard, Guardrails) else _CheckedBySentence(guard)


class _Unchecked:
    """Without guardrails, each span is shown at once."""

    def push(self, span: Span) -> list[Span]:
        return [span]

    def end(self) -> list[Span]:
        return []


class _Checked:
    """With `Guardrails`, a span is shown once none of it can become part of a finding."""

    def __init__(self, guard: Guardrails) -> None:
        self._check = guard.begin()

    def push(self, span: Span) -> list[Span]:
        return self._passed(lambda: self._check.push(span))

    def end(self) -> list[Span]:
        return self._passed(self._check.end)

    def _passed(self, spans: Callable[[], list[Span]]) -> list[Span]:
        try:
            return spans()
        except Blocked as blocked:
            raise Refused(blocked.verdict.reasons) from None


class _CheckedBySentence:
    """A function reads the whole text so far at the end of each sentence, before the sentence is shown."""

    def __init__(self, guard: Callable[[str], str | None]) -> None:
        self._guard, self._text = guard, ""
        self._held: list[Span] = []

    def push(self, span: Span) -> list[Span]:
        self._text += span.text
        self._held.append(span)
        return [] if _SENTENCE_ENDS.isdisjoint(span.text) else self.end()

    def end(self) -> list[Span]:
        spans, self._held = self._held, []
        reason = self._guard(self._text) if spans else None
        if reason is not None:
            raise Refused(reason)
        return spans
