"""What the checks found in a text, and why. None of these objects contains the text."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from falcon_kit.display.documented import documented
from falcon_kit.display.errors import Portable, printable
from falcon_kit.display.tables import html_table

Where = Literal["prompt", "output"]
"""Which checks run: those for what a user writes, or those for what a model generates."""


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that a check found."""

    span: tuple[int, int]
    """Its first character and the one after its last, counted in the original text."""
    check: str
    """The check: "length", "secrets", "personal_data", "blocked_words", "control_tokens", "injection", "repetition",
    or the name of a custom check."""
    reason: str
    """What was found, without the characters themselves."""

    def __str__(self) -> str:
        return f"{printable(self.check)}: {printable(self.reason)} (characters {self.span[0]} to {self.span[1]})"


@documented
@dataclass(frozen=True)
class Verdict:
    """The findings in one text, in the order of their places. False if there are none."""

    findings: tuple[Finding, ...]
    """What was found."""
    where: Where
    """Which checks ran: those for a "prompt" or those for an "output"."""

    @classmethod
    def of(cls, findings: Iterable[Finding], where: Where) -> "Verdict":
        """The verdict with its findings sorted and each of them once."""
        return cls(tuple(sorted(set(findings))), where)

    def __bool__(self) -> bool:
        return bool(self.findings)

    @property
    def reasons(self) -> str:
        """All findings in one line; empty if there are none."""
        return "; ".join(map(str, self.findings))

    def __str__(self) -> str:
        return f"{self.where} blocked by {self.reasons}" if self else f"{self.where} passed"

    def _repr_html_(self) -> str:
        rows = [(each.check, each.reason, f"{each.span[0]} to {each.span[1]}") for each in self.findings]
        return html_table(f"{self.where}: {'blocked' if self else 'passed'}", ("check", "reason", "characters"), rows)


class Blocked(Portable, ValueError):
    """The guardrails blocked a text. `.verdict` has the findings; neither it nor the message contains the text."""

    def __init__(self, verdict: Verdict, label: str = "") -> None:
        self.verdict = verdict
        self.label = label or verdict.where
        """Which text: "prompt", "output", or one of several, as "prompt 2 of 3", "message 1 of 2", "output 4 of 4"."""
        super().__init__(f"{self.label} blocked by {verdict.reasons}")
