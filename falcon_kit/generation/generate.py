"""Text from a Falcon: one prompt or a batch, at once or streamed, with log-probabilities and statistics.

Both functions take any transformers model and tokenizer and call transformers' own `generate`, so that all its
arguments (`repetition_penalty`, `num_beams`, `cache_implementation`, ...) work. `Falcon.generate` and `Falcon.stream`
call them.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import FalconForCausalLM, PreTrainedTokenizerBase

from falcon_kit.catalogue.spec import context_limit
from falcon_kit.display.errors import require
from falcon_kit.generation.arguments import (
    ASSISTED,
    add_checkpoint_settings,
    check_names,
    end_token_ids,
    expand_generation_config,
)
from falcon_kit.generation.decoding import GenerationObserver, SamplingRNG, SequenceDecoder
from falcon_kit.generation.prompts import (
    Prompt,
    check_length,
    check_prompt,
    check_tokens,
    new_token_limit,
    prompt_label,
    token_ids,
    vocabulary_size,
)
from falcon_kit.generation.ranks import SharedEvent, shared_seed
from falcon_kit.generation.sampling import check_stop, split_settings
from falcon_kit.generation.stream import Stream
from falcon_kit.generation.text import Generation, Piece, Stats


def generate(
    model: FalconForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    strip: bool = False,
    **settings: Any,
) -> Generation | list[Generation]:
    """Continues `prompt`: a Generation for one text, else a list in the order of the prompts, sequences side by side.

    `settings` are the fields of `Sampling` and any other argument of transformers' `generate`. `strip` removes leading
    white space from the text, as the answer of a chat needs.
    Raises ValueError for an empty prompt, one that is longer than the context, or settings out of range.
    """
    task = _GenerateTask(model, tokenizer, prompt, settings, strip)
    generations = task()
    return generations if task.returns_list else generations[0]


def stream(
    model: FalconForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    strip: bool = False,
    **settings: Any,
) -> Stream:
    """Continues one prompt piece by piece: iterate over the result. Arguments as for `generate`."""
    task = _GenerateTask(model, tokenizer, prompt, settings, strip)
    require(
        not task.returns_list,
        "a stream carries one text: give one prompt and num_return_sequences=1, or use generate()",
    )
    require(task.has_steps, "beam search and assisted generation cannot stream token by token: use generate()")
    return Stream(task)


class _GenerateTask:
    """One call of transformers' `generate`: the arguments are checked on creation, the text is generated on call."""

    def __init__(
        self,
        model: FalconForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        settings: dict[str, Any],
        strip: bool,
    ) -> None:
        self.model, self.tokenizer, self.strip = model, tokenizer, strip
        settings = add_checkpoint_settings(expand_generation_config(settings), model.generation_config)
        self.sampling, self.options = split_settings(settings)
        check_names(self.options, model)
        beam_search = (self._effective("num_beams") or 1) > 1
        self.stop = self._stop_strings()
        # Beam search revises earlier tokens; assisted generation accepts several tokens at a time.
        self.has_steps = not beam_search and not any(self._effective(name) for name in ASSISTED)
        copies = self.sampling.num_return_sequences
        require(
            copies == 1 or self.sampling.samples or beam_search,
            f"num_return_sequences={copies} without sampling would give {copies} equal texts: set do_sample=True",
        )
        prompts, single = check_prompt(prompt)
        self.prompts, self.new_tokens = self._encode(prompts)
        self.returns_list = not single or copies > 1
        self.cancelled = threading.Event()
        if (mesh := getattr(getattr(model, "transformer", None), "tp_mesh", None)) is not None:
            self.cancelled = SharedEvent(mesh, model.device)
            if self.sampling.samples and self.sampling.seed is None:
                self.sampling = replace(self.sampling, seed=shared_seed(mesh, model.device))

    def __call__(self, emit: Callable[[Piece], None] | None = None) -> list[Generation]:
        """Generates the texts; `emit` is called with each piece."""
        rng = SamplingRNG(self.sampling.seed, self.model.device)
        observer = self._observer(rng, emit)
        try:
            if not self.has_steps:  # no hook swaps it in before each step, so it is swapped in for the whole call
                rng.swap_in()
            hooks = observer.hooks(self.options) if self.has_steps else {}
            output: Any = self.model.generate(**self._arguments() | hooks)  # type: ignore[misc]  # its self is misdeclared
        finally:
            rng.swap_out()
        if not self.has_steps:
            observer.read_sequences(output.sequences[:, max(map(len, self.prompts)) :])
        return self._generations(observer, _cache_bytes(output.past_key_values))

    def nothing(self) -> Generation:
        """The generation of a text that was cancelled before its first token."""
        return self._generations(self._observer(SamplingRNG(None, self.model.device), None), 0)[0]

    def _observer(self, rng: SamplingRNG, emit: Callable[[Piece], None] | None) -> GenerationObserver:
        decoders = [self._decoder() for _ in self.prompts for _ in range(self.sampling.num_return_sequences)]
        return GenerationObserver(decoders, rng, self.cancelled, emit, self.sampling.alternatives)

    def _effective(self, name: str) -> Any:
        """The value of an argument of transformers' `generate`: the caller's, else the checkpoint's."""
        return self.options.get(name, getattr(self.model.generation_config, name, None))

    def _encode(self, prompts: list[Any]) -> tuple[list[list[int]], int]:
        """The token ids of each prompt, the first ones dropped as `truncate` allows, and the limit of new tokens."""
        context = context_limit(vars(self.model.config))
        for number, each in enumerate(prompts, 1):
            if isinstance(each, str) and self.sampling.truncate is None:
                check_length(each, self.tokenizer, context, prompt_label(number, len(prompts)))
        encoded = token_ids(self.tokenizer, prompts)
        check_tokens(encoded, vocabulary_size(self.model))
        new_tokens = new_token_limit(encoded, context, self.sampling)
        room = min(context, self.sampling.max_length or context)
        return [ids[-(room - new_tokens) :] for ids in encoded], new_tokens

    def _stop_strings(self) -> tuple[str, ...]:
        """The setting `stop` and transformers' `stop_strings`, of the caller or the checkpoint; all are cut off."""
        others = self._effective("stop_strings") or ()
        check_stop(others)
        return (*self.sampling.stop_strings, *((others,) if isinstance(others, str) else others))

    def _decoder(self) -> SequenceDecoder:
        ends = end_token_ids(self.options, self.model.generation_config, self.tokenizer)
        return SequenceDecoder(self.tokenizer, self.stop, self.new_tokens, self.strip, ends)

    def _arguments(self) -> dict[str, Any]:
        """All arguments of transformers' `generate` but the hooks; the caller's keyword arguments come last and win."""
        pad = self.tokenizer.pad_token_id
        if pad is None:  # as in Falcon's own tokenizer; padding is masked, so any token will do
            pad = self.tokenizer.eos_token_id
        return {
            **_left_padded(self.prompts, pad, self.model.device),
            **self.sampling.generate_arguments(),
            "num_return_sequences": self.sampling.num_return_sequences,
            "max_new_tokens": self.new_tokens,
            "eos_token_id": end_token_ids(self.options, self.model.generation_config, self.tokenizer) or None,
            "pad_token_id": pad,
            "return_dict_in_generate": True,
            **self.options,
            "stop_strings": None,  # the decoders stop at them, and cut them off
        }

    def _generations(self, observer: GenerationObserver, cache_bytes: int) -> list[Generation]:
        stats = Stats(
            rows=len(observer.decoders),
            prompt_tokens=sum(map(len, self.prompts)),
            new_tokens=sum(len(decoder.tokens) for decoder in observer.decoders),
            first_token_seconds=observer.first_token_seconds,
            seconds=observer.seconds,
            cache_bytes=cache_bytes,
        )
        prompts = [
            str(self.tokenizer.decode(ids)) for ids in self.prompts for _ in range(self.sampling.num_return_sequences)
        ]
        return [
            Generation(
                prompt=prompt,
                text=decoder.text,
                tokens=tuple(decoder.tokens),
                logprobs=tuple(decoder.logprobs) if self.has_steps else None,
                finish_reason=decoder.finish_reason or ("cancelled" if self.cancelled.is_set() else "stop"),
                stats=stats,
                alternatives=tuple(decoder.alternatives) if self.sampling.alternatives and self.has_steps else None,
            )
            for prompt, decoder in zip(prompts, observer.decoders, strict=True)
        ]


def _left_padded(prompts: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both (B, T), padded on the left so that all rows end at the same position."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a transformers cache, also a quantised one; 0 without a cache."""
    layers = getattr(cache, "layers", ())
    values = [value for layer in layers for name, value in vars(layer).items() if name.endswith(("keys", "values"))]
    return sum(tensor.nbytes for tensor in _tensors(values))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)
