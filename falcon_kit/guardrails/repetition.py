"""Repetition and runaway output: the same words or lines over and over at the end of a text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from falcon_kit.guardrails.matching import Growing, Running
from falcon_kit.guardrails.verdict import Finding
from falcon_kit.guardrails.words import UNSPACED

_LONGEST_PERIOD = 32  # items
_LONGEST_ITEM = 16  # characters; a longer word or row of signs counts as several items


@dataclass(frozen=True)
class Repetition:
    """Blocks an output at the word that completes too many copies of what stands before it.

    Items are words, single letters of scripts without spaces, and rows of punctuation; case does not matter. Copies of
    1 to 32 items are found: of a word, a sentence, a line or a short list. Copies of more are not.
    """

    copies: int = 5
    """Copies in a row that a period may have, the first included, before the next one is blocked."""
    items: int = 24
    """Items that the copies must have together: a refrain of few words may be repeated more often."""

    def running(self) -> Running:
        """The search in one text."""
        return _Count(self)

    def limit(self, period: int) -> int:
        """How many items equal to the one a period before them are blocked."""
        return max(period * self.copies, self.items - period)


@cache
def _item() -> Any:
    import regex

    letter = rf"[^\W{UNSPACED}]"
    return regex.compile(rf"{letter}{{1,{_LONGEST_ITEM}}}|[{UNSPACED}]|[^\w\s]{{1,{_LONGEST_ITEM}}}")


class _Count:
    """For each period, how many of the last items equal the one a period before them."""

    def __init__(self, repetition: Repetition) -> None:
        self._items: deque[str] = deque(maxlen=_LONGEST_PERIOD)  # the newest first
        self._limits = [repetition.limit(period) for period in range(1, _LONGEST_PERIOD + 1)]
        self._equal = [0] * _LONGEST_PERIOD
        self._place, self._found = 0, False

    def waiting(self, text: Growing) -> int:
        """The open item, if it may be the one that completes too many copies."""
        near = any(equal + 1 >= limit for equal, limit in zip(self._equal, self._limits, strict=True))
        return text.folded.origin(min(self._place, text.folded.end)) if near and not self._found else text.length

    def read(self, text: Growing) -> list[Finding]:
        findings = []
        for item, span in self._new_items(text):
            if self._repeats(item) and not self._found:
                self._found = True
                findings.append(Finding(span, "repetition", "the same words over and over"))
        return findings

    def _new_items(self, text: Growing) -> Iterator[tuple[str, tuple[int, int]]]:
        """The items that are complete: more characters make them no longer."""
        view = text.folded
        for match in _item().finditer(view.text, self._place - view.start):
            first, last = match.span()
            self._place = view.start + first
            if last == len(view.text) and last - first < _LONGEST_ITEM and not text.ended:
                return
            self._place = view.start + last
            yield match[0], view.span(view.start + first, view.start + last)
        self._place = view.end

    def _repeats(self, item: str) -> bool:
        """Counts an item; whether a period has too many copies now."""
        self._equal = [
            equal + 1 if item == before else 0 for equal, before in zip(self._equal, self._padded(), strict=True)
        ]
        self._items.appendleft(item)
        return any(equal >= limit for equal, limit in zip(self._equal, self._limits, strict=True))

    def _padded(self) -> Iterator[str | None]:
        yield from self._items
        yield from [None] * (_LONGEST_PERIOD - len(self._items))
