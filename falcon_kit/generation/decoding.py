"""Token by token: what transformers' loop chooses becomes text, and ends where it should.

A `Row` turns tokens into characters; a `Watch` follows transformers' `generate` through its two hooks and feeds the
rows.

Shapes: B rows (prompts times sequences), T tokens, V vocabulary.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from tokenizers.decoders import DecodeStream
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

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


class RandomState:
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

    def borrow(self) -> None:
        """Takes the global state, and puts the text's own in its place."""
        self._lent.acquire()
        self._global = self._read()
        if self._own:
            self._write(self._own)

    def give_back(self) -> None:
        """Undoes `borrow`; nothing happens if there is nothing to give back."""
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


class SharedEvent(threading.Event):
    """Set once it is set on any rank of a tensor-parallel model: they ask together, and stop at the same token."""

    def __init__(self, ranks: DeviceMesh, device: torch.device) -> None:
        super().__init__()
        self._ranks, self._device = ranks, device

    def is_set(self) -> bool:
        """Whether any rank has set it; every rank has to ask."""
        return anywhere(super().is_set(), self._ranks, self._device)


def anywhere(flag: bool, ranks: DeviceMesh, device: torch.device) -> bool:
    """Whether the flag is up on any rank; every rank has to ask. `device` is this rank's own.

    The current one would be the first GPU on all ranks, in a thread that nobody told otherwise.
    """
    said = torch.tensor(int(flag), device=device)
    dist.all_reduce(said, dist.ReduceOp.MAX, group=ranks.get_group())
    return bool(said)


def shared_seed(ranks: DeviceMesh, device: torch.device) -> int:
    """A seed from the first rank's random state, the same on all ranks: they have to draw the same tokens."""
    seed = torch.randint(2**62, (1,)).to(device)
    dist.broadcast(seed, group=ranks.get_group(), group_src=0)
    return int(seed)


class Watch:
    """Follows transformers' loop through its two hooks: logits before each choice, tokens after it."""

    def __init__(
        self,
        rows: list[Row],
        random: RandomState,
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
        self.watch.random.borrow()
        return scores


class _AfterChoice(StoppingCriteria):
    """Hands the chosen tokens over and ends the rows that are done."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.watch.random.give_back()
        return torch.tensor(self.watch.step(input_ids), device=input_ids.device)
