"""Token by token: what transformers' loop chooses becomes text, and ends where it should.

A `Row` turns tokens into characters; a `Watch` follows transformers' `generate` through its two hooks and feeds the
rows.

Shapes: B rows (prompts times sequences), T tokens, V vocabulary.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from falcon_kit.generation.text import Alternative, FinishReason, Piece, Text


class Row:
    """One text as it grows: tokens in, characters out."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: tuple[str, ...],
        limit: int,
        strip: bool,
        ends: Collection[int] | None = None,
    ) -> None:
        """`ends`: the tokens that end the text, unset the tokenizer's end token."""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.alternatives: list[tuple[Alternative, ...]] = []
        self.finish_reason: FinishReason | None = None
        self._tokenizer, self._limit, self._text = tokenizer, limit, Text(stop, strip)
        self._ends = (tokenizer.eos_token_id,) if ends is None else ends
        self._decoder = DecodeStream(skip_special_tokens=True)

    @property
    def text(self) -> str:
        """The text so far."""
        return str(self._text)

    def push(self, token: int, logprob: float) -> str:
        """Takes one token and returns the characters that are now certain to be part of the text."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self._text.add(self._decoder.step(self._tokenizer.backend_tokenizer, token) or "")
        if self._text.stopped:
            self.finish_reason = "stop"
        elif token in self._ends or len(self.tokens) == self._limit:
            self.finish_reason = "eos" if token in self._ends else "length"
            # A last, incomplete character shows as U+FFFD, as transformers decodes it.
            self._text.raw = str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))
        return self._text.show(self.finish_reason is not None)

    def alternative(self, token: int, logprob: float) -> Alternative:
        """A token that may stand at this place, with its text."""
        return Alternative(self._tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False), token, logprob)


class SamplingRNG:
    """torch's random state, lent to one choice of a token at a time.

    With a seed the text has a state of its own, so that nothing else that draws, another stream included, changes it;
    the global one is as it was after each choice.
    """

    _lent = threading.Lock()

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self._device = device
        self._own: list[torch.Tensor] | None = None
        self._global: list[torch.Tensor] | None = None
        if seed is not None:  # generators of its own: torch.manual_seed would seed every device there is
            places = [torch.device("cpu"), *([] if device.type == "cpu" else [device])]
            self._own = [torch.Generator(place).manual_seed(seed).get_state() for place in places]

    def swap_in(self) -> None:
        """Takes the global state, and puts the text's own in its place."""
        self._lent.acquire()
        self._global = self._read()
        if self._own:
            self._write(self._own)

    def swap_out(self) -> None:
        """Undoes `swap_in`; nothing happens if there is nothing to give back."""
        if self._global is None:
            return
        if self._own:
            self._own = self._read()
            self._write(self._global)
        self._global = None
        self._lent.release()

    def _read(self) -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        elif self._device.type == "mps":
            states.append(torch.mps.get_rng_state())
        return states

    def _write(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)
        elif self._device.type == "mps":
            torch.mps.set_rng_state(states[1])


class Watch:
    """Follows transformers' loop through its two hooks: logits before each choice, tokens after it."""

    def __init__(
        self,
        rows: list[Row],
        random: SamplingRNG,
        cancelled: threading.Event,
        emit: Callable[[Piece], None] | None,
        alternatives: int = 0,
    ) -> None:
        self.rows, self.random, self.cancelled, self.emit = rows, random, cancelled, emit
        self.alternatives = alternatives
        self.start = self.first = self.last = time.perf_counter()
        self.logprobs: torch.Tensor  # (B, V), of the step that is under way

    def hooks(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that put this object into `generate`, before those of the caller's `options`."""
        processors, criteria = options.get("logits_processor") or (), options.get("stopping_criteria") or ()
        return {
            "logits_processor": LogitsProcessorList([_BeforeChoice(self), *processors]),
            "stopping_criteria": StoppingCriteriaList([_AfterChoice(self), *criteria]),
        }

    def step(self, ids: torch.Tensor) -> list[bool]:
        """Takes the newest token of each row, ids (B, T), and says which rows are done."""
        newest = ids[:, -1:]
        tokens, logprobs = newest[:, 0].tolist(), self.logprobs.gather(1, newest)[:, 0].tolist()
        likeliest = self._likeliest()
        self._clock()
        for row, token, logprob, others in zip(self.rows, tokens, logprobs, likeliest, strict=True):
            if row.finish_reason is None:
                text = row.push(token, logprob)
                row.alternatives.append(tuple(row.alternative(*each) for each in others))
                if self.emit:
                    self.emit(Piece(text, token, logprob, row.alternatives[-1]))
        over = self.cancelled.is_set()
        return [row.finish_reason is not None or over for row in self.rows]

    def _likeliest(self) -> list[list[tuple[int, float]]]:
        """Token and log-probability of the likeliest tokens of each row; nothing is computed unless asked for."""
        if not self.alternatives:
            return [[] for _ in self.rows]
        values, tokens = self.logprobs.topk(min(self.alternatives, self.logprobs.shape[-1]))  # (B, alternatives)
        return [list(zip(*row, strict=True)) for row in zip(tokens.tolist(), values.tolist(), strict=True)]

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
        self.watch.random.swap_in()
        return scores


class _AfterChoice(StoppingCriteria):
    """Hands the chosen tokens over and ends the rows that are done."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.watch.random.swap_out()
        return torch.tensor(self.watch.step(input_ids), device=input_ids.device)
