"""The length of a text."""

from __future__ import annotations

from falcon_kit.guardrails.matching import Growing
from falcon_kit.guardrails.verdict import Finding


class Length:
    """Blocks what stands after a number of characters."""

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def finding(self, length: int) -> Finding:
        """The finding in a text of that length, which is over the limit."""
        return Finding((self._limit, length), "length", f"more than {self._limit} characters")

    def waiting(self, text: Growing) -> int:
        return text.length

    def read(self, text: Growing) -> list[Finding]:
        return [self.finding(text.length)] if text.length > self._limit else []
