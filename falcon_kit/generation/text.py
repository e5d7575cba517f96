"""Generated text: the pieces of a stream, stop strings, the finished text and its statistics."""

import html
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from falcon_kit.display.documented import documented
from falcon_kit.display.errors import Portable, shortened
from falcon_kit.display.page import direction
from falcon_kit.display.tables import counted, format_bytes

FinishReason = Literal["eos", "stop", "length", "cancelled", "broken"]


@dataclass(frozen=True)
class Alternative:
    """One of the most probable tokens of a decoding step, generated or not."""

    text: str
    """The token decoded by itself; an incomplete character is U+FFFD."""
    token_id: int | None
    """Its id; None where an endpoint does not send it."""
    logprob: float
    """As `Piece.logprob`."""


@documented
@dataclass(frozen=True)
class Piece:
    """One new token of a stream, and the text to show with it."""

    text: str
    """What can be shown now: whole characters, and nothing that may become a stop string. May be empty."""
    token_id: int | None
    """The token; None where an endpoint does not send it."""
    logprob: float
    """Its natural log-probability under the model, before temperature, top_k and top_p; nan where it is not known."""
    alternatives: tuple[Alternative, ...] = ()
    """The most probable tokens of this step, in descending order, as many as `Sampling.alternatives`.

    vLLM's completions report tokens by their text, so there one of several tokens with equal texts stands for all.
    """
    accepted: bool = False
    """Whether a draft proposed the token and the model accepted it; only in assisted generation."""


class Text:
    """A text that grows, cut at the first stop string. It shows only what cannot become part of a stop string.

    `strip` removes leading white space from what is shown, not from `raw`: a stop string may begin with white space.
    """

    def __init__(self, stop: tuple[str, ...], strip: bool) -> None:
        self.raw, self.stopped = "", False
        """The characters so far, those of special tokens included, and whether a stop string ended them."""
        self._stop, self._strip, self._shown = stop, strip, 0
        self._hidden: list[tuple[int, int]] = []  # the spans of special tokens in raw

    def add(self, characters: str, hidden: bool = False) -> None:
        """Appends the characters and cuts the text at a stop string. Hidden ones can stop the text; none is shown."""
        if hidden:
            self._hidden.append((len(self.raw), len(self.raw) + len(characters)))
        self.raw, self.stopped = cut(self.raw + characters, self._stop)

    def show(self, ended: bool) -> str:
        """The characters that were not returned before; unless `ended`, without the beginning of a stop string."""
        pending = 0 if ended else overlap(self.raw, self._stop)
        visible = self._stripped(self.visible(len(self.raw) - pending))
        shown, self._shown = self._shown, max(self._shown, len(visible))
        return visible[shown:]

    def visible(self, end: int) -> str:
        """The first `end` characters without the hidden ones; white space is not stripped."""
        edges = [0, *(edge for span in self._hidden for edge in span), end]
        return "".join(self.raw[first : min(last, end)] for first, last in zip(edges[::2], edges[1::2], strict=True))

    def _stripped(self, text: str) -> str:
        return text.lstrip() if self._strip else text

    def __str__(self) -> str:
        return self._stripped(self.visible(len(self.raw)))


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one.

    The first is the one that is complete first when the text is read character by character, so the result does not
    depend on where tokens or chunks end.
    """
    matches = ((start + len(word), start) for word in stop if (start := text.find(word)) >= 0)
    first = min(matches, default=None)
    return (text[: first[1]], True) if first else (text, False)


def overlap(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest suffix of `text` that is an incomplete stop string."""
    return max((_overlap(text[max(0, len(text) - len(word) + 1) :], word) for word in stop), default=0)


def _overlap(end: str, word: str) -> int:
    start = end.find(word[0])
    while start >= 0 and not word.startswith(end[start:]):
        start = end.find(word[0], start + 1)
    return len(end) - start if start >= 0 else 0


@documented
@dataclass(frozen=True)
class Stats:
    """Tokens, time and memory of one call of `generate`, over all its rows."""

    rows: int
    """Sequences generated in one batch."""
    prompt_tokens: int
    """Tokens of the prompts, without padding."""
    new_tokens: int
    """Generated tokens, end-of-sequence tokens included."""
    first_token_seconds: float
    """From the start of the computation, or the request to an endpoint, to the first new token: the prefill."""
    seconds: float
    """From there to the last token, without the time that the reader of a stream takes between two pieces."""
    cache_bytes: int | None = None
    """Bytes of the keys and values in the KV cache at the end; None on an endpoint.

    In memory, a row of the kit's cache may have room for `falcon_kit.model.cache.ROOM` more tokens.
    """

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second of prefill; nan if no token was generated."""
        return self.prompt_tokens / self.first_token_seconds if self.first_token_seconds > 0 else float("nan")

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens per second, without the first token of each row; nan if there are no others."""
        elapsed = self.seconds - self.first_token_seconds
        return (self.new_tokens - self.rows) / elapsed if elapsed > 0 else float("nan")

    def __str__(self) -> str:
        cache = "" if self.cache_bytes is None else f"; KV cache {format_bytes(self.cache_bytes)}"
        return (
            f"{counted(self.prompt_tokens, 'prompt token')}, "
            f"first token after {self.first_token_seconds * 1000:.0f} ms; "
            f"{counted(self.new_tokens, 'new token')} at {self.decode_tokens_per_second:.0f} tokens/s{cache}"
        )


@documented
@dataclass(frozen=True)
class Generation:
    """A finished text."""

    prompt: str
    """The prompt that the text continues, decoded from its token ids."""
    text: str
    """The new text, without special tokens and without the stop string."""
    tokens: tuple[int, ...]
    """All new token ids, also the end-of-sequence token and those of a stop string. An endpoint may send none, or
    fewer: llama.cpp only the last one of a character of several tokens, and not the end-of-sequence token."""
    logprobs: tuple[float, ...] | None
    """One per token, see `Piece.logprob`; None after beam search."""
    finish_reason: FinishReason
    """"eos": end-of-sequence token; "stop": stop string; "length": limit of new tokens, or context full;
    "cancelled": by the caller; "broken": an error ended the text, such as a broken connection or full memory."""
    stats: Stats
    """Time and memory of the call, shared by all rows of a batch."""
    alternatives: tuple[tuple[Alternative, ...], ...] | None = None
    """The most probable tokens of each step, see `Piece.alternatives`; None unless `Sampling.alternatives` is set."""
    accepted: int | None = None
    """How many of the tokens a draft proposed, see `Piece.accepted`; None without assisted generation."""

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        count = f"{counted(len(self.tokens), 'token')}, " if self.tokens else ""
        return f"Generation({shortened(self.text)!r}, {count}finish_reason={self.finish_reason!r})"

    def _repr_html_(self) -> str:
        drafts = "" if self.accepted is None else f"; {counted(self.accepted, 'token')} accepted from drafts"
        facts = f"{html.escape(str(self.stats))}; {self.finish_reason}{drafts}"
        return continuation_html(self.prompt, self.text, facts)


class PieceStream(Iterator[Piece]):
    """Iterator over the pieces of one text. `close()`, and the end of a `with` block, stop the model."""

    @abstractmethod
    def close(self) -> None:
        """Stops the model."""

    @property
    @abstractmethod
    def generation(self) -> Generation:
        """The whole text and its statistics, after the end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def continuation_html(prompt: str, text: str, facts: str) -> str:
    """A prompt with its continuation, and a line of facts, which is HTML already."""
    gap = "" if text[:1].isspace() else " "  # the answer of a chat has lost its leading space
    return (
        f'<div dir="{direction(prompt + text)}" style="white-space:pre-wrap">'
        f'<span style="opacity:.6"><bdi>{html.escape(prompt)}</bdi>{gap}</span>'
        f"<b><bdi>{html.escape(text)}</bdi></b></div>"
        f'<div style="opacity:.6;font-size:smaller">{facts}</div>'
    )


class TextOutOfMemory(Portable, MemoryError):
    """Memory ran out while a text was generated; `.generations` has the texts so far, with finish_reason "broken"."""

    def __init__(self, message: str, generations: Sequence[Generation]) -> None:
        super().__init__(message)
        self.generations = tuple(generations)
        self.add_note("The error's .generations have the text so far.")  # a note does not reach another process
