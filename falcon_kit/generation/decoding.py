"""From the steps of a generation to text.

A `SequenceDecoder` turns the tokens of one sequence into text and ends it. A `BatchDecoder` feeds those of a batch with
the tokens of each step.

Shapes: B sequences (prompts times sequences per prompt), T tokens, N new tokens of a step, V vocabulary.
"""

import math
import threading
import time
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from falcon_kit.display.errors import require
from falcon_kit.generation.text import Alternative, FinishReason, Piece, Text

_NO_NUMBERS = (
    "the model's logits are nan: one of its weights is nan, or, in float16, a value was too large. Fetch the "
    "checkpoint again, or load it in bfloat16 or float32"
)


class Step(NamedTuple):
    """What a step of the model adds to each sequence."""

    tokens: torch.Tensor
    """The new tokens (B, N): N is 1, except for one sequence whose draft was accepted."""
    logprobs: torch.Tensor
    """The log-probabilities (B, N, V) that the model gives at each of them, before any logits processor."""
    ended: torch.Tensor
    """Which sequences the stopping criteria end, (B,)."""
    cache: Any
    """The transformers cache, or None."""
    accepted: int = 0
    """How many of the N tokens a draft proposed; they come first."""


class SequenceDecoder:
    """Decodes one sequence incrementally, until an end-of-sequence token, a stop string or the limit of new tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: tuple[str, ...],
        limit: int,
        strip: bool,
        eos_token_ids: Collection[int],
    ) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.alternatives: list[tuple[Alternative, ...]] = []
        self.finish_reason: FinishReason | None = None
        self.accepted = 0
        """How many of the tokens a draft proposed."""
        self._tokenizer, self._limit, self._text = tokenizer, limit, Text(stop, strip)
        self._eos_token_ids = eos_token_ids
        self._decode_stream = DecodeStream(skip_special_tokens=True)
        added = tokenizer.added_tokens_decoder.items()
        self._special = {id: token.content for id, token in added if token.special}

    @property
    def text(self) -> str:
        return str(self._text)

    def push(self, token: int, logprob: float, ended: bool = False, accepted: bool = False) -> str:
        """Appends a token and returns the text that can be shown now.

        ended: a stopping criterion ends the text here. accepted: a draft proposed the token.
        """
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.accepted += accepted
        if token in self._special:
            self._text.add(self._special[token], hidden=True)
        else:
            self._text.add(self._decode_stream.step(self._tokenizer.backend_tokenizer, token) or "")
        if token in self._eos_token_ids:
            self.finish_reason = "eos"
        elif self._text.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) == self._limit:
            self.finish_reason = "length"
        elif ended:
            self.finish_reason = "stop"
        if self.finish_reason and not self._text.stopped:
            self._add_incomplete_character()
        return self._text.show(self.finish_reason is not None)

    def _add_incomplete_character(self) -> None:
        """Adds the incomplete character that the decode stream withholds at the end; `decode` returns it as U+FFFD."""
        whole = str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))
        self._text.add(whole[len(self._text.visible(len(self._text.raw))) :])

    def add_alternatives(self, likeliest: list[tuple[int, float]]) -> tuple[Alternative, ...]:
        """Stores and returns the most probable tokens of a step, given as pairs of token id and log-probability."""
        decode = partial(self._tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
        found = tuple(Alternative(decode([token]), token, logprob) for token, logprob in likeliest)
        self.alternatives.append(found)
        return found


class SamplingRNG:
    """A generator per request, swapped in around each sampling step: `with rng:`.

    transformers samples from torch's global generators. With a seed, a request has generator states of its own, so that
    neither another stream nor other code changes what it samples, and the global states are restored after each step.
    """

    _lock = threading.RLock()  # the global generators belong to the process: one thread samples at a time
    _sampling: ClassVar[list["SamplingRNG"]] = []
    """The requests inside their `with` block: more than one if a logits processor itself generates a text."""

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self._device = device
        self._states: list[torch.Tensor] | None = None
        self._global_states: list[torch.Tensor] | None = None
        if seed is not None:  # not torch.manual_seed, which seeds the global generators of all devices
            devices = [torch.device("cpu"), *([] if device.type == "cpu" else [device])]
            self._states = [torch.Generator(each).manual_seed(seed).get_state() for each in devices]

    def __enter__(self) -> None:
        """With a seed, saves the global generator states and replaces them by the request's.

        Waits while a request of another thread samples. One of the same thread, whose logits processor makes this
        request, gets its states back at the end of the block.
        """
        self._lock.acquire()
        try:
            self._sampling.append(self)
            if len(self._sampling) > 1:
                self._sampling[-2]._leave()
            self._enter()
        except BaseException:  # Ctrl-C too
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        """Saves the request's generator states and restores the global ones."""
        try:
            self._leave()
        finally:
            try:
                self._sampling.pop()
                if self._sampling:
                    self._sampling[-1]._enter()
            finally:
                self._lock.release()

    def _enter(self) -> None:
        if self._states and not self._global_states:  # reading the state of a GPU takes longer than choosing a token
            self._global_states = self._read()
            self._write(self._states)

    def _leave(self) -> None:
        if global_states := self._global_states:
            try:
                self._states = self._read()
            finally:
                self._write(global_states)
                self._global_states = None

    def _read(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(module.get_rng_state(self._device) for module in self._accelerator())]

    def _write(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for module, state in zip(self._accelerator(), states[1:], strict=True):
            module.set_rng_state(state, self._device)

    def _accelerator(self) -> list[Any]:
        """torch's module for the device, such as torch.cuda; none for a CPU."""
        return [] if self._device.type == "cpu" else [torch.get_device_module(self._device)]


class BatchDecoder:
    """Decodes the sequences of a batch step by step, and measures the time."""

    def __init__(self, decoders: list[SequenceDecoder], cancelled: threading.Event, alternatives: int) -> None:
        """`cancelled` ends all sequences; `alternatives` is the number of most probable tokens to keep per token."""
        self.decoders, self._cancelled, self._alternatives = decoders, cancelled, alternatives
        self._start = time.perf_counter()
        self.first_token_seconds = self.seconds = 0.0
        """From creation to the first and the last token, without the time that the reader of the pieces takes."""
        self._is_cancelled = False
        self._copy: tuple[torch.Tensor, torch.cuda.Event] | None = None
        """What the next step is read from, and what marks the end of copying it."""

    @property
    def ended(self) -> bool:
        """Whether no sequence goes on."""
        return self._is_cancelled or all(each.finish_reason for each in self.decoders)

    def finished(self, device: torch.device) -> torch.Tensor | None:
        """Which sequences are finished, (B,); None if none is, which saves a copy from the host."""
        flags = [each.finish_reason is not None for each in self.decoders]
        return torch.tensor(flags, device=device) if any(flags) else None

    def read(self, step: Step) -> Iterator[Piece]:
        """Decodes the new tokens of a step, and returns a piece for each token of an unfinished sequence."""
        rows = self._read_values(step)
        self._record_time()
        for position in range(step.tokens.shape[1]):
            last = position == step.tokens.shape[1] - 1
            for decoder, row in zip(self.decoders, rows, strict=True):
                if decoder.finish_reason is None:
                    piece = self._piece(decoder, row[position], last, position < step.accepted)
                    given = time.perf_counter()
                    yield piece
                    self._start += time.perf_counter() - given
            self._is_cancelled = self._cancelled.is_set()
            if self.ended:
                return

    def begin_reading(self, step: Step) -> None:
        """Starts to copy to the host what `read` reads of a step on a GPU, which meanwhile can go on."""
        values = self._values(step)
        copy = values.to("cpu", non_blocking=True)
        self._copy = copy, torch.cuda.current_stream(values.device).record_event()

    def _read_values(self, step: Step) -> list[list[list[float]]]:
        """`_values` as lists, from the copy if one was begun."""
        if self._copy is None:
            return self._values(step).tolist()
        (values, copied), self._copy = self._copy, None
        copied.synchronize()
        return values.tolist()

    def _values(self, step: Step) -> torch.Tensor:
        """For each sequence and new token (B, N): the token, whether the sequence ends with this step, the
        log-probability, and the alternatives and theirs.

        One tensor, so that the GPU is waited for once. float32 represents token ids up to 2**24 exactly.
        """
        tokens = step.tokens[..., None]  # (B, N, 1)
        columns = [tokens, step.ended[:, None, None].expand(tokens.shape), step.logprobs.gather(2, tokens)]
        if count := min(self._alternatives, step.logprobs.shape[-1]):
            values, likeliest = step.logprobs.topk(count)  # (B, N, count)
            columns += [likeliest, values]
        return torch.cat([each.float() for each in columns], dim=-1)

    def _piece(self, decoder: SequenceDecoder, values: list[float], last: bool, accepted: bool) -> Piece:
        """Appends a token to its sequence. values: see `_values`. Raises ValueError if the logits are nan."""
        token, ended, logprob, *others = values
        require(not math.isnan(logprob), _NO_NUMBERS)
        half = len(others) // 2
        likeliest = [(int(each), value) for each, value in zip(others[:half], others[half:], strict=True)]
        text = decoder.push(int(token), logprob, ended=bool(ended) and last, accepted=accepted)
        return Piece(text, int(token), logprob, decoder.add_alternatives(likeliest), accepted)

    def read_sequences(self, ids: torch.Tensor) -> None:
        """Decodes the new tokens (B, T) of a call without steps, such as beam search; log-probabilities are nan."""
        self._record_time()
        for decoder, tokens in zip(self.decoders, ids.tolist(), strict=True):
            for token in tokens:
                if decoder.finish_reason is None:
                    decoder.push(token, float("nan"))

    def _record_time(self) -> None:
        self.seconds = time.perf_counter() - self._start
        self.first_token_seconds = self.first_token_seconds or self.seconds
