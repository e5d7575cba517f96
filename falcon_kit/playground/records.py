"""What a playground stores: turns, their answers, the tokens of an answer; and how much of the context is used.

Records contain plain values only, so they can be saved and loaded without the model.
"""

import html
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from falcon_kit.display.errors import shortened
from falcon_kit.display.tables import counted, format_bytes
from falcon_kit.generation.chat import Message
from falcon_kit.generation.text import continuation_html

Mode = Literal["prompt", "chat"]
Ending = Literal["eos", "stop", "length", "cancelled", "broken", "refused", "error"]
"""How an answer ended: the finish_reason of a `Generation`, "refused" by the guardrails, or an "error"."""
MODES: tuple[Mode, ...] = get_args(Mode)
MOST_LOGPROB = 1e-3
"""The largest log-probability of a token: rounding may leave it a little above 0."""


class Token(NamedTuple):
    """A token with its probability and the most probable tokens at its position; a tuple, which JSON writes short."""

    text: str
    """The token by itself."""
    logprob: float | None
    """Natural log-probability under the model; None if an endpoint does not report it."""
    alternatives: tuple[tuple[str, float], ...] = ()
    """Text and log-probability of the most probable tokens at this position, the likeliest first."""


class Span(NamedTuple):
    """Characters that were shown together, and their tokens: one, unless a character needs several tokens."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(repr=False)
class Answer:
    """The text of one model, with everything needed to generate it again. It grows during generation."""

    model: str
    source: str
    """Python code that makes the model."""
    prompt: str | list[Message]
    """The prompt or conversation that the model continued."""
    settings: dict[str, Any]
    """The fields of `Sampling` that were set, with the seed."""
    spans: list[Span] = field(default_factory=list)
    ending: Ending | None = None
    """How it ended; None during generation."""
    reason: str = ""
    """The reason of the guardrails, or the error."""
    prompt_tokens: int | None = None
    """Tokens of the prompt; None if not reported."""
    new_tokens: int = 0
    """Tokens generated, with the end-of-sequence token or those of a stop string."""
    first_token_seconds: float | None = None
    """From the request to the first new token."""
    seconds: float = 0.0
    """From the request to the newest token."""
    cache_bytes: int | None = None
    """Bytes of the KV cache at the end; None if not reported."""

    def __repr__(self) -> str:
        return f"Answer({shortened(self.text)!r}, {counted(self.new_tokens, 'token')}, ending={self.ending!r})"

    @property
    def text(self) -> str:
        """The visible text."""
        return "".join(span.text for span in self.spans)

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens per second after the first; None before there are two."""
        if self.first_token_seconds is None or self.new_tokens < 2:
            return None
        elapsed = self.seconds - self.first_token_seconds
        return (self.new_tokens - 1) / elapsed if elapsed > 0 else None

    @property
    def seed(self) -> int | None:
        """The seed that reproduces the text."""
        return self.settings.get("seed")


@dataclass(frozen=True, repr=False)
class Turn:
    """A prompt or message, and the answer of each model."""

    id: str
    """Unique among all sessions."""
    mode: Mode
    """Whether `user` is a prompt to continue or a message in a chat."""
    user: str
    """The prompt or message."""
    answers: tuple[Answer, ...]
    """One for each model."""
    before: tuple[str, ...] = ()
    """Ids of the earlier turns of the conversation."""

    def __repr__(self) -> str:
        answers = ", ".join(f"{shortened(answer.text)!r}" for answer in self.answers)
        return f"Turn({shortened(self.user)!r}: {answers})"

    def _repr_html_(self) -> str:
        answers = "".join(_answer_html(self, answer) for answer in self.answers)
        return f'<div style="display:flex;flex-wrap:wrap;gap:1em 2em">{answers}</div>'  # side by side if there is room


def _answer_html(turn: Turn, answer: Answer) -> str:
    details = [counted(answer.new_tokens, "token"), f"seed {answer.seed}", answer.ending or "", answer.reason]
    text = continuation_html(turn.user, answer.text, html.escape(" · ".join(filter(None, details))))
    head = f'<div style="flex:1 1 300px;min-width:0;overflow-wrap:anywhere"><div>{html.escape(answer.model)}</div>'
    return f"{head}{text}</div>"


@dataclass(frozen=True)
class Meter:
    """How much of the context is used."""

    used: int | None
    """Tokens of the draft with its conversation, or of the last answer with its prompt; None if not known."""
    context: int | None
    """The limit in tokens; None if not reported."""
    cache_bytes: int | None
    """Bytes of the KV cache for the used tokens; None for an endpoint."""

    def __str__(self) -> str:
        if self.used is None:
            return "tokens not counted here"
        used = f"{self.used} of {self.context} tokens" if self.context else counted(self.used, "token")
        cache = f", KV cache {format_bytes(self.cache_bytes)}" if self.cache_bytes is not None else ""
        return f"{used}{cache}"
