r"""Patterns in a text that grows: every match is found once, and an end that may become a match is known.

The `regex` package tells whether the end of a text is the beginning of a match (partial matching). Two rules make the
result independent of how the text arrives. A pattern has a bounded length, so that little text waits for a decision. A
pattern's right border is a character that must exist, such as `(?=\W)`, and not the absence of one: more text never
undoes a match. The end of a text counts as a line break.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import regex

from falcon_kit.guardrails.folding import View, folded, plain
from falcon_kit.guardrails.verdict import Finding

_KEPT_BEFORE = 64  # characters that stay for the patterns' left borders
_FORGET_FROM = 4096  # characters at which a view is shortened, which costs its length


class Growing:
    """A text that grows, in both of its forms."""

    def __init__(self) -> None:
        self.plain, self.folded = View(plain), View(folded)
        self.newest, self.length, self.ended = "", 0, False

    def add(self, characters: str) -> None:
        self.newest = characters
        self.length += len(characters)
        self.plain.add(characters)
        self.folded.add(characters)

    def forget(self, waiting: int) -> None:
        """Drops what no pattern needs when every character before `waiting` is decided."""
        for view in (self.plain, self.folded):
            if len(view.text) > _FORGET_FROM:
                view.forget(view.place(waiting) - _KEPT_BEFORE)


class Running(Protocol):
    """A check of one text, while the text grows."""

    def read(self, text: Growing) -> list[Finding]:
        """What the characters that were added last complete."""

    def waiting(self, text: Growing) -> int:
        """The first character that may still become part of a finding; the text's length if none may."""


@dataclass(frozen=True)
class Pattern:
    """A regular expression of the `regex` package, and what a match of it means."""

    check: str
    """The check that it belongs to."""
    reason: str
    """What a match is."""
    expression: str
    """The expression, with bounded repetition and a right border that must exist."""
    folded: bool = False
    """Whether it is searched for in the folded text."""
    valid: Callable[[str], bool] | None = None
    """Confirms the characters of a match. The expression must then match in one way only from a given place."""

    @cached_property
    def compiled(self) -> Any:
        return regex.compile(self.expression)

    def running(self) -> Running:
        return _Search(self)


class _Search:
    """One pattern in one text; no match begins before `_place`, except those that were found."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern, self._expression, self._place = pattern, pattern.compiled, 0

    def waiting(self, text: Growing) -> int:
        return self._view(text).origin(min(self._place, self._view(text).end))

    def read(self, text: Growing) -> list[Finding]:
        view = self._view(text)
        characters = view.text + "\n" if text.ended else view.text
        spans = self._spans(characters, view.start, partial=not text.ended)
        return [Finding(view.span(*span), self._pattern.check, self._pattern.reason) for span in spans]

    def _view(self, text: Growing) -> View:
        return text.folded if self._pattern.folded else text.plain

    def _spans(self, characters: str, start: int, partial: bool) -> Iterator[tuple[int, int]]:
        """Places of the matches that begin at `_place` or after it, up to the first that is not complete."""
        while True:
            match = self._expression.search(characters, self._place - start, partial=partial)
            if match is None or match.partial:
                self._place = start + (len(characters) if match is None else match.start())
                return
            first, last = match.span()
            # `search` prefers a complete match to an incomplete one that begins before it.
            before = range(self._place - start, first) if partial else ()
            incomplete = next((at for at in before if self._expression.match(characters, at, partial=True)), None)
            if incomplete is not None:
                self._place = start + incomplete
                return
            accepted = self._pattern.valid is None or self._pattern.valid(match[0])
            self._place = start + (last if accepted else first + 1)
            if accepted:
                yield start + first, start + last
