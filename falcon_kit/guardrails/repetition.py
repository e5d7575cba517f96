"""Repetition and runaway output: the same words or lines over and over at the end of a text."""

from collections import deque
from collections.abc import Iterator

import regex

from falcon_kit.guardrails.matching import Growing
from falcon_kit.guardrails.verdict import Finding
from falcon_kit.guardrails.words import UNSPACED

_LONGEST_PERIOD = 32  # items
_LONGEST_ITEM = 16  # characters; a longer word or row of signs counts as several items
_COPIES = 5  # in a row that a period may have, the first included
_LEAST = 24  # items that the copies must have together: a refrain of few words may be repeated more often
LIMITS = [max(period * _COPIES, _LEAST - period) for period in range(1, _LONGEST_PERIOD + 1)]
"""For each period, from 1 on: how many items equal to the one a period before them are blocked."""
_ITEM = regex.compile(rf"[^\W{UNSPACED}]{{1,{_LONGEST_ITEM}}}|[{UNSPACED}]|[^\w\s]{{1,{_LONGEST_ITEM}}}")


class Repetition:
    """Blocks an output at the word that completes too many copies of what stands before it.

    Items are words, single letters of scripts without spaces, and rows of punctuation; case does not matter. Copies of
    1 to 32 items are found: of a word, a sentence, a line or a short list. Copies of more are not.
    """

    def __init__(self) -> None:
        self._items: deque[str | None] = deque([None] * _LONGEST_PERIOD, maxlen=_LONGEST_PERIOD)  # the newest first
        self._equal = [0] * _LONGEST_PERIOD  # for each period, how many of the last items equal the one before them
        self._place, self._found = 0, False

    def waiting(self, text: Growing) -> int:
        """The open item, if it may be the one that completes too many copies."""
        near = any(equal + 1 >= limit for equal, limit in zip(self._equal, LIMITS, strict=True))
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
        for match in _ITEM.finditer(view.text, self._place - view.start):
            first, last = match.span()
            self._place = view.start + first
            if last == len(view.text) and last - first < _LONGEST_ITEM and not text.ended:
                return
            self._place = view.start + last
            yield match[0], view.span(view.start + first, view.start + last)
        self._place = view.end

    def _repeats(self, item: str) -> bool:
        """Counts an item; whether a period has too many copies now."""
        pairs = zip(self._equal, self._items, strict=True)
        self._equal = [equal + 1 if item == before else 0 for equal, before in pairs]
        self._items.appendleft(item)
        return any(equal >= limit for equal, limit in zip(self._equal, LIMITS, strict=True))
