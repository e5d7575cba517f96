"""A text while it is generated: what may be shown, and when it is blocked."""

import logging
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

from falcon_kit.guardrails.matching import Growing, Running
from falcon_kit.guardrails.verdict import Blocked, Finding, Verdict, Where

Item = TypeVar("Item")
"""A str, or an object with a `text`, such as a `Piece`."""


class StreamCheck(Generic[Item]):
    """The checks of one text that arrives in pieces. A piece comes back when none of it can become part of a finding.

    The checks keep a bounded end of the text, so that a piece costs the same however long the text is.
    """

    def __init__(self, running: Sequence[Running], where: Where) -> None:
        self._running, self._where, self._text = running, where, Growing()
        self._held: deque[tuple[int, Item]] = deque()  # each with the place after its last character
        self.findings: list[Finding] = []

    def push(self, item: Item) -> list[Item]:
        """Takes the next piece; the pieces that may be shown now. Raises `Blocked` for a finding, then and later."""
        self._text.add(item if isinstance(item, str) else item.text)  # type: ignore[attr-defined]
        # A piece without text has a token of the text to come: it waits for the next character.
        self._held.append((self._text.length + (not self._text.newest), item))
        return self._released()

    def end(self) -> list[Item]:
        """The pieces that were held back, at the end of the text. Raises `Blocked` as `push` does."""
        self._text.ended, self._text.newest = True, ""
        return self._released()

    def check(self, text: str) -> Verdict:
        """The verdict on a whole text: all findings."""
        self._text.add(text)
        self._text.ended = True
        self._read()
        return Verdict.of(self.findings, self._where)

    def _released(self) -> list[Item]:
        if not self.findings:
            self._read()
        if self.findings:
            self._held.clear()
            raise Blocked(Verdict.of(self.findings, self._where))
        waiting = min((each.waiting(self._text) for each in self._running), default=self._text.length)
        self._text.forget(waiting)
        released = []
        while self._held and (self._text.ended or self._held[0][0] <= waiting):
            released.append(self._held.popleft()[1])
        return released

    def _read(self) -> None:
        for each in self._running:
            self.findings += each.read(self._text)
        if self.findings:
            names = ", ".join(dict.fromkeys(each.check for each in self.findings))
            logging.getLogger(__name__).info("%s of %d characters blocked by %s", self._where, self._text.length, names)
