"""The length of a text."""

from __future__ import annotations

from dataclasses import dataclass

from falcon_kit.guardrails.matching import Growing, Running
from falcon_kit.guardrails.verdict import Finding


@dataclass(frozen=True)
class Length:
    """Blocks what stands after a number of characters."""

    characters: int
    """The limit."""

    def finding(self, length: int) -> Finding:
        """The finding in a text of that length, which is over the limit."""
        return Finding((self.characters, length), "length", f"more than {self.characters} characters")

    def running(self) -> Running:
        """The count in one text."""
        return _Length(self)


class _Length:
    def __init__(self, length: Length) -> None:
        self._length = length

    def waiting(self, text: Growing) -> int:
        return text.length

    def read(self, text: Growing) -> list[Finding]:
        over = text.length > self._length.characters
        return [self._length.finding(text.length)] if over else []
