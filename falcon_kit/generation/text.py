"""Generated text: pieces as they arrive, stop strings, the finished text and its statistics."""

import html
from dataclasses import dataclass
from typing import Literal

from falcon_kit.display.tables import format_bytes

FinishReason = Literal["eos", "stop", "length", "cancelled", "broken"]


@dataclass(frozen=True)
class Alternative:
    """One of the likeliest tokens at a place in the text, taken or not."""

    text: str
    """The token by itself; part of a character shows as U+FFFD."""
    token_id: int
    """The token."""
    logprob: float
    """As `Piece.logprob`."""


@dataclass(frozen=True)
class Piece:
    """One new token as it arrives."""

    text: str
    """What can be shown now: whole characters, and nothing that may turn out to be a stop string. May be empty."""
    token_id: int | None
    """The token; None where an endpoint does not tell."""
    logprob: float
    """Its natural log-probability under the model, before temperature, top_k and top_p; nan where it is not known."""
    alternatives: tuple[Alternative, ...] = ()
    """The likeliest tokens of this step, the likeliest first, as many as `Sampling.alternatives` asks for."""


class Text:
    """Characters as they come: cut at a stop string, and handed on once they are certain to be part of the text.

    `strip` drops white space before the first word, but only from what is shown: a stop string may begin with it.
    """

    def __init__(self, stop: tuple[str, ...], strip: bool) -> None:
        self.raw, self.stopped = "", False
        self._stop, self._strip, self._shown = stop, strip, 0

    def add(self, characters: str) -> None:
        """Takes what came, up to a stop string."""
        self.raw, self.stopped = cut(self.raw + characters, self._stop)

    def show(self, ended: bool) -> str:
        """What was not shown yet; until the text has ended, less an end that may become a stop string."""
        certain = self._visible(self.raw[: len(self.raw) - (0 if ended else overlap(self.raw, self._stop))])
        shown, self._shown = self._shown, max(self._shown, len(certain))
        return certain[shown:]

    def _visible(self, raw: str) -> str:
        return raw.lstrip() if self._strip else raw

    def __str__(self) -> str:
        return self._visible(self.raw)


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before a stop string, and whether there is one.

    The one that is complete first counts, as if characters came singly: the borders of tokens or chunks change nothing.
    """
    found = ((at + len(word), at) for word in stop if (at := text.find(word)) >= 0)
    first = min(found, default=None)
    return (text[: first[1]], True) if first else (text, False)


def overlap(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` with which one of the stop strings begins."""
    lengths = (length for word in stop for length in range(len(word) - 1, 0, -1) if text.endswith(word[:length]))
    return max(lengths, default=0)


@dataclass(frozen=True)
class Stats:
    """What one call of `generate` took, over all its rows."""

    rows: int
    """Texts written at once."""
    prompt_tokens: int
    """Tokens read, padding not counted."""
    new_tokens: int
    """Tokens generated, end tokens counted."""
    first_token_seconds: float
    """From the call to the first new token: the prefill."""
    seconds: float
    """From the call to the last token."""
    cache_bytes: int | None = None
    """Bytes of keys and values held at the end, as allocated; None on an endpoint."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens read per second; nan where no token came."""
        return self.prompt_tokens / self.first_token_seconds if self.first_token_seconds > 0 else float("nan")

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens per second after the first of each row; nan where there was no second."""
        elapsed = self.seconds - self.first_token_seconds
        return (self.new_tokens - self.rows) / elapsed if elapsed > 0 else float("nan")

    def __str__(self) -> str:
        cache = "" if self.cache_bytes is None else f"; KV cache {format_bytes(self.cache_bytes)}"
        return (
            f"{self.prompt_tokens} prompt tokens, first word after {self.first_token_seconds * 1000:.0f} ms; "
            f"{self.new_tokens} new tokens at {self.decode_tokens_per_second:.0f} tokens/s{cache}"
        )


@dataclass(frozen=True)
class Generation:
    """A finished text."""

    prompt: str
    """What it continues, as the model read it."""
    text: str
    """The new text, without special tokens and without the stop string."""
    tokens: tuple[int, ...]
    """Every new token id, an end token and those of a stop string included; empty where an endpoint does not tell."""
    logprobs: tuple[float, ...] | None
    """One per token, see `Piece.logprob`; None after beam search or assisted generation: they give whole texts."""
    finish_reason: FinishReason
    """"eos": the end token; "stop": a stop string; "length": no tokens or room left; "cancelled": by the caller;
    "broken": an endpoint broke off."""
    stats: Stats
    """Time and memory of the call that made it, shared by all rows of a batch."""
    alternatives: tuple[tuple[Alternative, ...], ...] | None = None
    """The likeliest tokens at each step, see `Piece.alternatives`; None unless `alternatives` asked for them."""

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        short = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        count = f"{len(self.tokens)} tokens, " if self.tokens else ""
        return f"Generation({short!r}, {count}finish_reason={self.finish_reason!r})"

    def _repr_html_(self) -> str:
        gap = "" if self.text[:1].isspace() else " "  # the answer in a chat comes without the space before it
        return (
            f'<div style="white-space:pre-wrap"><span style="opacity:.6">{html.escape(self.prompt)}{gap}</span>'
            f"<b>{html.escape(self.text)}</b></div>"
            f'<div style="opacity:.6;font-size:smaller">{html.escape(str(self.stats))}; {self.finish_reason}</div>'
        )
