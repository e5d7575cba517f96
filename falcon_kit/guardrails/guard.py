"""Guardrails: the checks that were chosen, for prompts and for outputs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from falcon_kit.display.documented import documented
from falcon_kit.display.errors import check_flag, is_number, is_whole, require, shown
from falcon_kit.display.tables import html_table
from falcon_kit.guardrails.custom import Custom, Judge, named_judges
from falcon_kit.guardrails.injection import CONTROL_TOKENS, INJECTION
from falcon_kit.guardrails.matching import Growing, Pattern, Running
from falcon_kit.guardrails.personal import personal_patterns
from falcon_kit.guardrails.repetition import Repetition
from falcon_kit.guardrails.secrets import SECRETS
from falcon_kit.guardrails.stream import StreamCheck
from falcon_kit.guardrails.verdict import Blocked, Finding, Verdict, Where
from falcon_kit.guardrails.words import word_patterns

Item = TypeVar("Item")
_READ_AT_MOST = 100_000


class _Length:
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


@documented
@dataclass(frozen=True, repr=False, kw_only=True)
class Guardrails:
    """Checks on prompts and outputs. Several threads may use them at once.

    Raises ValueError for a limit below 1, a region without a numbering plan, blocked words that are no words, a
    pipeline without labels or with labels that its model does not have.
    """

    max_characters: int | None = 8000
    """The longest prompt, and the longest output, in characters; None for no limit."""
    secrets: bool = True
    """Keys of known forms, and passwords that stand beside their name."""
    personal_data: bool = True
    """Email addresses, payment cards, IBANs, US social security numbers, Chinese identity card numbers (18 digits) and
    telephone numbers."""
    phone_regions: Sequence[str] = ("US",)
    """Regions whose telephone numbers are found without "+" and country code too, from seven digits on: in the groups
    in which a region writes them; mobile numbers, and numbers with a first 0, also in others. Digits without a gap are
    found only where they can be nothing but a mobile number, as 9876543210 in "IN"; in "US" never."""
    blocked_words: Sequence[str] = ()
    """Whole words and phrases, in any spelling of case, accents, width, invisible and look-alike letters."""
    control_tokens: bool = True
    """In prompts: Falcon's special tokens, the markers of chat formats, the control tokens of other models."""
    injection: bool = True
    """In prompts: phrases that revoke instructions, in English, German, Chinese and Arabic."""
    repetition: bool = True
    """In outputs: the same words over and over."""
    custom: Judge | Mapping[str, Judge] | None = None
    """A function that takes a text and returns a reason to block it or None; a dict of such functions by name; or a
    text-classification pipeline of transformers. It reads a prompt at once and an output sentence by sentence; a
    pipeline reads a text that is longer than its context in parts. If it raises an error, the text is blocked."""
    labels: Sequence[str] = ()
    """The labels of a pipeline that block a text."""
    threshold: float = 0.5
    """The least score of such a label that blocks a text."""

    def __post_init__(self) -> None:
        limit, threshold = self.max_characters, self.threshold
        require(
            limit is None or is_whole(limit, 1),
            f"max_characters={shown(limit)} must be at least 1, or None for no limit",
        )
        require(
            is_number(threshold, 0, 1) and threshold > 0, f"threshold={shown(threshold)} must be above 0, and at most 1"
        )
        for name in ("secrets", "personal_data", "control_tokens", "injection", "repetition"):
            check_flag(name, getattr(self, name))
        for name in ("phone_regions", "blocked_words", "labels"):
            given = getattr(self, name)
            several = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (None,)
            texts = all(isinstance(each, str) for each in several)
            require(texts, f"{name}={shown(given)} must be a tuple of texts, such as ('a', 'b')")
            object.__setattr__(self, name, several)  # an iterator would end
        _ = self._patterns, self._judges  # raises for what cannot be checked

    @cached_property
    def _patterns(self) -> dict[Where, list[Pattern]]:
        shared = [
            *(SECRETS if self.secrets else ()),
            *(personal_patterns(self.phone_regions) if self.personal_data else ()),
            *word_patterns(self.blocked_words),
        ]
        prompt = [*(CONTROL_TOKENS if self.control_tokens else ()), *(INJECTION if self.injection else ())]
        return {"prompt": shared + prompt, "output": shared}

    @cached_property
    def _judges(self) -> list[tuple[str, Judge]]:
        """The checks of your own, with their names."""
        return list(named_judges(self.custom, self.labels, self.threshold))

    def _running(self, where: Where) -> Iterator[Running]:
        if self.max_characters is not None:
            yield _Length(self.max_characters)
        for pattern in self._patterns[where]:
            yield pattern.running()
        if self.repetition and where == "output":
            yield Repetition()
        for name, judge in self._judges:
            yield Custom(name, judge, whole=where == "prompt")

    def check(self, text: str, where: Where = "prompt") -> Verdict:
        """What was found in a whole text, and why; false where nothing was.

        where: "prompt" for what a user writes, "output" for what a model generates. A text of more than 100,000
        characters that is over `max_characters` is not read: its length is the only finding.
        """
        require(where in ("prompt", "output"), f'where={where!r} must be "prompt" or "output"')
        limit = self.max_characters
        if limit is not None and len(text) > max(limit, _READ_AT_MOST):
            return Verdict((_Length(limit).finding(len(text)),), where)
        return self.begin(where).check(text)

    def raise_if_found(self, text: str, where: Where = "prompt", label: str = "") -> None:
        """Raises `Blocked`, a ValueError, for a text in which something is found. label: which of several texts."""
        if verdict := self.check(text, where):
            raise Blocked(verdict, label)

    def begin(self, where: Where = "output") -> StreamCheck[Any]:
        """The checks of one text while it arrives, by default of an output: push each piece, then end it."""
        return StreamCheck([*self._running(where)], where)

    def stream(self, pieces: Iterable[Item]) -> Iterator[Item]:
        """The pieces of an output (texts, or objects with a `text`), each once none of it can become part of a finding.

        Raises `Blocked` at the first finding, before any of its characters was returned. `pieces` is closed at the end.
        """
        check: StreamCheck[Item] = self.begin()
        try:
            for piece in pieces:
                yield from check.push(piece)
            yield from check.end()
        finally:
            if close := getattr(pieces, "close", None):
                close()

    def _facts(self) -> dict[str, object]:
        """The settings, for people to read: no blocked word is among them."""
        names = ("max_characters", "secrets", "personal_data", "control_tokens", "injection", "repetition")
        facts: dict[str, object] = {name: getattr(self, name) for name in names}
        custom = ", ".join(name for name, _ in self._judges)
        return {**facts, "blocked_words": len(self.blocked_words), "custom": custom or None}

    def __repr__(self) -> str:
        return f"Guardrails({', '.join(f'{name}={value!r}' for name, value in self._facts().items())})"

    def _repr_html_(self) -> str:
        return html_table("Guardrails", ("check", "setting"), self._facts().items())
