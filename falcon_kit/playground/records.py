"""What a playground remembers: turns, the answers to them, and the tokens that an answer is made of.

A record holds plain values only: it outlives the model, and can be saved and opened without it.
"""

import html
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from falcon_kit.generation.chat import Message

Mode = Literal["prompt", "chat"]
Ending = Literal["eos", "stop", "length", "cancelled", "broken", "refused", "error"]
"""How an answer ended: as a `Generation` does, or "refused" by the guardrails, or with an "error"."""
MODES: tuple[Mode, ...] = get_args(Mode)
ENDINGS: tuple[str, ...] = get_args(Ending)


@dataclass(frozen=True)
class Token:
    """A token, how likely it was, and what else was likely at its place."""

    text: str
    """The token by itself."""
    logprob: float | None
    """Natural log-probability under the model; None where an endpoint does not say."""
    alternatives: tuple[tuple[str, float], ...] = ()
    """Text and log-probability of the likeliest tokens at this place, the likeliest first."""


@dataclass(frozen=True)
class Span:
    """Characters that became certain together, and the tokens behind them: one, unless a character needs several."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(repr=False)
class Answer:
    """What one model wrote, and everything needed to write it again. It grows while the model writes."""

    model: str
    """Name of the model."""
    source: str
    """Python that makes the model."""
    prompt: str | list[Message]
    """What it was given."""
    settings: dict[str, Any]
    """Fields of `Sampling` that it was given, the seed included."""
    spans: list[Span] = field(default_factory=list)
    """The text so far."""
    ending: Ending | None = None
    """How it ended; None while it is being written."""
    reason: str = ""
    """Why it was refused, or what went wrong."""
    prompt_tokens: int | None = None
    """Tokens read; None where nobody counted them."""
    new_tokens: int = 0
    """Tokens written, those of an end token or stop string included."""
    first_token_seconds: float | None = None
    """From the request to the first new token."""
    seconds: float = 0.0
    """From the request to the newest token."""
    cache_bytes: int | None = None
    """Bytes of keys and values at the end; None where nobody counted them."""

    def __repr__(self) -> str:
        return f"Answer({_short(self.text)!r}, {self.new_tokens} tokens, ending={self.ending!r})"

    @property
    def text(self) -> str:
        """What can be read of it."""
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
        """The seed that gives the same text again."""
        return self.settings.get("seed")


@dataclass(frozen=True, repr=False)
class Turn:
    """What somebody wrote, and the answer of each model to it."""

    id: str
    """Unique among all sessions."""
    mode: Mode
    """Whether `user` was continued as it stands, or answered as a message."""
    user: str
    """What was written."""
    answers: tuple[Answer, ...]
    """One for each model that is compared."""
    before: tuple[str, ...] = ()
    """Ids of the turns of the conversation that came before."""

    def __repr__(self) -> str:
        answers = ", ".join(f"{_short(answer.text)!r}" for answer in self.answers)
        return f"Turn({_short(self.user)!r}: {answers})"

    def _repr_html_(self) -> str:
        answers = "".join(_answer_html(self, answer) for answer in self.answers)
        return f'<div style="display:flex;flex-wrap:wrap;gap:1em 2em">{answers}</div>'  # beside each other, given room


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _answer_html(turn: Turn, answer: Answer) -> str:
    gap = "" if answer.text[:1].isspace() else " "
    facts = [f"{answer.new_tokens} tokens", f"seed {answer.seed}", answer.ending or "", answer.reason]
    return (
        f'<div style="flex:1 1 300px;min-width:0;overflow-wrap:anywhere"><div>{html.escape(answer.model)}</div>'
        f'<div style="white-space:pre-wrap"><span style="opacity:.7">{html.escape(turn.user)}{gap}</span>'
        f"<b>{html.escape(answer.text)}</b></div>"
        f'<div style="opacity:.7;font-size:smaller">{html.escape(" · ".join(filter(None, facts)))}</div></div>'
    )
