"""transformers' `generate`, observed token by token.

A `SequenceDecoder` turns the tokens of one sequence into text and ends it. A `GenerationObserver` feeds the decoders
of a batch from two hooks of `generate`.

Shapes: B sequences (prompts times sequences per prompt), T tokens, V vocabulary.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

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


class SequenceDecoder:
    """Decodes one sequence incrementally, until an end-of-sequence token, a stop string or the limit of new tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: tuple[str, ...],
        limit: int,
        strip: bool,
        eos_token_ids: Collection[int] | None = None,
    ) -> None:
        """`eos_token_ids`: the tokens that end the text; by default the tokenizer's."""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.alternatives: list[tuple[Alternative, ...]] = []
        self.finish_reason: FinishReason | None = None
        self._tokenizer, self._limit, self._text = tokenizer, limit, Text(stop, strip)
        self._eos_token_ids = (tokenizer.eos_token_id,) if eos_token_ids is None else eos_token_ids
        self._decode_stream = DecodeStream(skip_special_tokens=True)
        added = tokenizer.added_tokens_decoder.items()
        self._special = {id: token.content for id, token in added if token.special}

    @property
    def text(self) -> str:
        """The text so far."""
        return str(self._text)

    def push(self, token: int, logprob: float) -> str:
        """Appends a token and returns the text that can be shown now."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self._special:
            self._text.add(self._special[token], hidden=True)
        else:
            self._text.add(self._decode_stream.step(self._tokenizer.backend_tokenizer, token) or "")
        if token in self._eos_token_ids:
            self.finish_reason = "eos"
        elif self._text.stopped or len(self.tokens) == self._limit:
            self.finish_reason = "stop" if self._text.stopped else "length"
        if self.finish_reason and not self._text.stopped:
            self._add_incomplete_character()
        return self._text.show(self.finish_reason is not None)

    def _add_incomplete_character(self) -> None:
        """Adds the incomplete character that the decode stream withholds at the end; `decode` returns it as U+FFFD."""
        whole = str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))
        self._text.add(whole[len(self._text.visible(len(self._text.raw))) :])

    def add_alternatives(self, likeliest: list[tuple[int, float]]) -> tuple[Alternative, ...]:
        """Stores and returns the most probable tokens of a step, given as pairs of token id and log-probability."""
        decode = self._tokenizer.backend_tokenizer.decode
        self.alternatives.append(
            tuple(
                Alternative(decode([token], skip_special_tokens=False), token, logprob) for token, logprob in likeliest
            )
        )
        return self.alternatives[-1]


class SamplingRNG:
    """A generator per request, swapped in around each sampling step.

    transformers samples from torch's global generators. With a seed, a request has generator states of its own, so that
    neither another stream nor other code changes what it samples, and the global states are restored after each step.
    """

    _lock = threading.RLock()  # the global generators belong to the process: one thread samples at a time
    _thread: ClassVar[int | None] = None  # the one that samples
    _sampling: ClassVar[list["SamplingRNG"]] = []
    """The requests between `swap_in` and `swap_out`: more than one if a logits processor itself generates a text."""

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self._device = device
        self._states: list[torch.Tensor] | None = None
        self._global_states: list[torch.Tensor] | None = None
        if seed is not None:  # not torch.manual_seed, which seeds the global generators of all devices
            devices = [torch.device("cpu"), *([] if device.type == "cpu" else [device])]
            self._states = [torch.Generator(each).manual_seed(seed).get_state() for each in devices]

    def swap_in(self) -> None:
        """With a seed, saves the global generator states and replaces them by the request's.

        Waits while a request of another thread is between `swap_in` and `swap_out`. One of the same thread, whose
        logits processor makes this request, gets its states back in `swap_out`.
        """
        self._lock.acquire()
        if self._sampling:
            self._sampling[-1]._leave()
        self._enter()
        self._sampling.append(self)
        SamplingRNG._thread = threading.get_ident()

    def swap_out(self) -> None:
        """Saves the request's generator states and restores the global ones; without `swap_in`, does nothing."""
        if self not in self._sampling:
            return
        self._leave()
        self._sampling.pop()
        if self._sampling:
            self._sampling[-1]._enter()
        else:
            SamplingRNG._thread = None
        self._lock.release()

    @classmethod
    def is_sampling(cls) -> bool:
        """Whether this thread is between `swap_in` and `swap_out`, as a logits processor is."""
        return cls._thread == threading.get_ident()

    def _enter(self) -> None:
        if self._states:  # reading the state of a GPU takes longer than choosing a token
            self._global_states = self._read()
            self._write(self._states)

    def _leave(self) -> None:
        if self._global_states:
            self._states = self._read()
            self._write(self._global_states)
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


class GenerationObserver:
    """Reads logits before and tokens after each step of `generate`, decodes them, and stops finished sequences."""

    def __init__(
        self,
        decoders: list[SequenceDecoder],
        rng: SamplingRNG,
        cancelled: threading.Event,
        emit: Callable[[Piece], None] | None,
        alternatives: int = 0,
    ) -> None:
        """`emit` is called with each piece; `alternatives` is the number of most probable tokens to keep per step."""
        self.decoders, self._rng, self._cancelled, self._emit = decoders, rng, cancelled, emit
        self._alternatives, self._stopped = alternatives, False
        self._start = self._first_token = self._last_token = time.perf_counter()
        self._logprobs: torch.Tensor  # (B, V), of the current step

    @property
    def first_token_seconds(self) -> float:
        """From creation to the first token."""
        return self._first_token - self._start

    @property
    def seconds(self) -> float:
        """From creation to the last token."""
        return self._last_token - self._start

    def hooks(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The hooks as arguments of `generate`, followed by those of the caller's `options`."""
        processors, criteria = options.get("logits_processor") or (), options.get("stopping_criteria") or ()
        return {
            "logits_processor": LogitsProcessorList([_ObservingLogitsProcessor(self), *processors]),
            "stopping_criteria": StoppingCriteriaList([_ObservingStoppingCriteria(self), *criteria]),
        }

    def before_sampling(self, logits: torch.Tensor) -> None:
        """Keeps the log-probabilities of this step's logits (B, V) and swaps the request's generator in."""
        self._logprobs = torch.log_softmax(logits, dim=-1)
        self._rng.swap_in()

    def after_sampling(self, ids: torch.Tensor) -> torch.Tensor:
        """Decodes the newest token of each sequence, ids (B, T); returns which sequences are finished, (B,).

        Does nothing once all were: on Apple's GPUs transformers reads a step late whether to stop (DeferredStopCheck),
        and a reader that has closed its stream waits for no further piece.
        """
        self._rng.swap_out()
        if not self._stopped:
            self._decode(self._newest(ids[:, -1:]))
            self._stopped = self._cancelled.is_set() or all(each.finish_reason for each in self.decoders)
        finished = [self._stopped or each.finish_reason is not None for each in self.decoders]
        if any(finished):
            return torch.tensor(finished, device=ids.device)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # without a copy from the host

    def _newest(self, tokens: torch.Tensor) -> list[list[float]]:
        """A row for each sequence: its newest token (B, 1), the log-probability, and the alternatives and theirs.

        One tensor, so that the GPU is waited for once. float32 represents token ids up to 2**24 exactly.
        """
        count = min(self._alternatives, self._logprobs.shape[-1])
        columns = [tokens, self._logprobs.gather(1, tokens)]
        if count:
            values, likeliest = self._logprobs.topk(count)  # (B, count)
            columns += [likeliest, values]
        return torch.cat([each.float() for each in columns], dim=1).tolist()

    def _decode(self, rows: list[list[float]]) -> None:
        self._record_time()
        for decoder, (token, logprob, *others) in zip(self.decoders, rows, strict=True):
            if decoder.finish_reason is None:
                half = len(others) // 2
                likeliest = [(int(each), value) for each, value in zip(others[:half], others[half:], strict=True)]
                text = decoder.push(int(token), logprob)
                piece = Piece(text, int(token), logprob, decoder.add_alternatives(likeliest))
                if self._emit:
                    self._emit(piece)

    def read_sequences(self, ids: torch.Tensor) -> None:
        """Decodes the new tokens (B, T) of a call without hooks, such as beam search; log-probabilities are nan."""
        self._record_time()
        for decoder, tokens in zip(self.decoders, ids.tolist(), strict=True):
            for token in tokens:
                if decoder.finish_reason is None:
                    decoder.push(token, float("nan"))

    def _record_time(self) -> None:
        self._last_token = time.perf_counter()
        if self._first_token == self._start:
            self._first_token = self._last_token


class _ObservingLogitsProcessor(LogitsProcessor):
    """Passes the model's logits to the observer. It stands first, before temperature, top_k and top_p."""

    def __init__(self, observer: GenerationObserver) -> None:
        self._observer = observer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._observer.before_sampling(scores)
        return scores


class _ObservingStoppingCriteria(StoppingCriteria):
    """Passes the new tokens to the observer and ends the sequences that it reports as finished."""

    def __init__(self, observer: GenerationObserver) -> None:
        self._observer = observer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return self._observer.after_sampling(input_ids)
