"""Token by token: what transformers' loop chooses becomes text, and ends where it should.

A `Row` turns tokens into characters; a `Watch` follows transformers' `generate` through its two hooks and feeds the
rows.

Shapes: B rows (prompts times sequences), T tokens, V vocabulary.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

FinishReason = Literal["eos", "stop", "length", "cancelled"]


@dataclass(frozen=True)
class Piece:
    """One new token as it arrives."""

    text: str
    """What can be shown now: whole characters, and nothing that may turn out to be a stop string. May be empty."""
    token_id: int
    """The token."""
    logprob: float
    """Its natural log-probability under the model, before temperature, top_k and top_p."""


class Row:
    """One text as it grows: tokens in, characters out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], limit: int, strip: bool) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._tokenizer, self._stop, self._limit, self._strip = tokenizer, stop, limit, strip
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._shown = 0

    def push(self, token: int, logprob: float) -> str:
        """Takes one token and returns the characters that are now certain to be part of the text."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.text += self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""
        self.text = self.text.lstrip() if self._strip else self.text
        cut = min((at for at in map(self.text.find, self._stop) if at >= 0), default=None)
        if cut is not None:
            self.finish_reason, self.text = "stop", self.text[:cut]
        elif token == self._tokenizer.eos_token_id or len(self.tokens) == self._limit:
            self.finish_reason = "eos" if token == self._tokenizer.eos_token_id else "length"
            self.text = self._complete()
        return self._show()

    def _complete(self) -> str:
        """The text with a last, incomplete character shown as U+FFFD, as transformers decodes it."""
        text = str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))
        return text.lstrip() if self._strip else text

    def _show(self) -> str:
        """What was not shown yet, less an end that may become a stop string."""
        held = 0 if self.finish_reason else _overlap(self.text, self._stop)
        shown, self._shown = self._shown, max(self._shown, len(self.text) - held)
        return self.text[shown : self._shown]


def _overlap(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` with which one of the stop strings begins."""
    lengths = (length for word in stop for length in range(len(word) - 1, 0, -1) if text.endswith(word[:length]))
    return max(lengths, default=0)


class Watch:
    """Follows transformers' loop through its two hooks: logits before each choice, tokens after it."""

    def __init__(self, rows: list[Row], cancelled: threading.Event, emit: Callable[[Piece], None] | None) -> None:
        self.rows, self.cancelled, self.emit = rows, cancelled, emit
        self.start = self.first = self.last = time.perf_counter()
        self.logprobs: torch.Tensor  # (B, V), of the step that is under way

    def hooks(self) -> dict[str, Any]:
        """The arguments that put this object into `generate`."""
        return {
            "logits_processor": LogitsProcessorList([_BeforeChoice(self)]),
            "stopping_criteria": StoppingCriteriaList([_AfterChoice(self)]),
        }

    def step(self, ids: torch.Tensor) -> list[bool]:
        """Takes the newest token of each row, ids (B, T), and says which rows are done."""
        newest = ids[:, -1:]
        tokens, logprobs = newest[:, 0].tolist(), self.logprobs.gather(1, newest)[:, 0].tolist()
        self._clock()
        for row, token, logprob in zip(self.rows, tokens, logprobs, strict=True):
            if row.finish_reason is None:
                text = row.push(token, logprob)
                if self.emit:
                    self.emit(Piece(text, token, logprob))
        return [row.finish_reason is not None or self.cancelled.is_set() for row in self.rows]

    def read(self, sequences: torch.Tensor) -> None:
        """Takes whole rows of new tokens (B, T) at once, as a beam search hands them over."""
        self._clock()
        for row, tokens in zip(self.rows, sequences.tolist(), strict=True):
            for token in tokens:
                if row.finish_reason is None:
                    row.push(token, float("nan"))

    def _clock(self) -> None:
        self.last = time.perf_counter()
        if self.first == self.start:
            self.first = self.last


class _BeforeChoice(LogitsProcessor):
    """Keeps the model's log-probabilities (B, V); runs before temperature, top_k and top_p."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.watch.logprobs = torch.log_softmax(scores, dim=-1)
        return scores


class _AfterChoice(StoppingCriteria):
    """Hands the chosen tokens over and ends the rows that are done."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(self.watch.step(input_ids), device=input_ids.device)
