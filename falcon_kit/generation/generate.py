"""Text out of a Falcon: single, in batches, streamed, with log-probabilities and statistics.

Works on a plain transformers model and tokenizer, through transformers' own `generate`, so that every argument of it
(`repetition_penalty`, `num_beams`, `cache_implementation`, ...) can be given too. `falcon.Falcon` is the usual door.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch
from transformers import FalconForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from falcon_kit.display.errors import require, unknown_name
from falcon_kit.generation.decoding import Row, SamplingRNG, Watch
from falcon_kit.generation.prompts import Prompt, check_prompt, check_tokens, room, token_ids
from falcon_kit.generation.ranks import SharedEvent, shared_seed
from falcon_kit.generation.sampling import SAMPLING_FIELDS, split_settings
from falcon_kit.generation.stream import Stream
from falcon_kit.generation.text import Generation, Piece, Stats

ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


def generate(
    model: FalconForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    strip: bool = False,
    **settings: Any,
) -> Generation | list[Generation]:
    """Continues `prompt`: one Generation for one text, else a list in the order of the prompts, sequences side by side.

    `settings` are the fields of `Sampling` and any other argument of transformers' `generate`. `strip` drops white
    space before the first word, which an answer in a chat brings along.
    Raises ValueError for an empty prompt, one that is longer than the context, or settings out of range.
    """
    run = _Run(model, tokenizer, prompt, settings, strip)
    generations = run()
    return generations if run.many else generations[0]


def stream(
    model: FalconForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    strip: bool = False,
    **settings: Any,
) -> "Stream":
    """Continues one prompt piece by piece: iterate over what comes back. Arguments as for `generate`."""
    run = _Run(model, tokenizer, prompt, settings, strip)
    require(not run.many, "a stream carries one text: give one prompt and num_return_sequences=1, or use generate()")
    require(not run.whole, "beam search and assisted generation cannot stream token by token: use generate()")
    return Stream(run)


class _Run:
    """One call of transformers' `generate`, checked beforehand and watched token by token."""

    def __init__(
        self,
        model: FalconForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        settings: dict[str, Any],
        strip: bool,
    ) -> None:
        self.sampling, self.options = split_settings(spelled_out(settings))
        _check_names(self.options, model)
        self.model, self.tokenizer, self.strip = model, tokenizer, strip
        self.beams = (self._effective("num_beams") or 1) > 1
        # An assistant, or the prompt, proposes several tokens at a time: nothing to watch token by token there either.
        self.whole = self.beams or any(self._effective(name) for name in ASSISTED)
        ranks = getattr(getattr(model, "transformer", None), "ranks", None)
        self.cancelled = threading.Event() if ranks is None else SharedEvent(ranks, model.device)
        copies = self.sampling.num_return_sequences
        require(
            copies == 1 or self.sampling.samples or self.beams,
            f"num_return_sequences={copies} without sampling would give {copies} equal texts: set do_sample=True",
        )
        given, single = check_prompt(prompt)
        prompts = token_ids(tokenizer, given)
        check_tokens(prompts, model.config.vocab_size)
        self.new_tokens = room(prompts, model.config.max_position_embeddings, self.sampling)
        longest = model.config.max_position_embeddings - self.new_tokens
        self.prompts = [ids[-longest:] for ids in prompts]
        self.many = not single or copies > 1
        if ranks is not None and self.sampling.samples and self.sampling.seed is None:
            self.sampling = replace(self.sampling, seed=shared_seed(ranks, model.device))

    def _effective(self, name: str) -> Any:
        """What an argument of transformers' `generate` comes to: as given, else as the checkpoint has it."""
        return self.options.get(name, getattr(self.model.generation_config, name, None))

    def __call__(self, emit: Callable[[Piece], None] | None = None) -> list[Generation]:
        """Generates; `emit` gets each piece of a single row as it comes."""
        rows = [self._row() for _ in self.prompts for _ in range(self.sampling.num_return_sequences)]
        random = SamplingRNG(self.sampling.seed, self.model.device)
        watch = Watch(rows, random, self.cancelled, emit, self.sampling.alternatives)
        try:
            if self.whole:  # hooks see candidates there, not texts; the random state is borrowed for all of it
                random.swap_in()
            hooks = {} if self.whole else watch.hooks(self.options)
            output: Any = self.model.generate(**self._arguments() | hooks)  # type: ignore[misc]  # its self is misdeclared
        finally:
            random.swap_out()
        if self.whole:
            watch.read(output.sequences[:, max(map(len, self.prompts)) :])
        return self._generations(rows, watch, _cache_bytes(output.past_key_values))

    def _arguments(self) -> dict[str, Any]:
        """Everything for transformers' `generate` but the hooks; what the caller gave by name comes last and wins."""
        return {
            **self._inputs(self.model.device),
            **self.sampling.choice(),
            "num_return_sequences": self.sampling.num_return_sequences,
            "max_new_tokens": self.new_tokens,
            "eos_token_id": self.tokenizer.eos_token_id,  # configs of 2023 name id 2 here, the model ends with 11
            "pad_token_id": self._pad,
            "return_dict_in_generate": True,
            **self.options,
        }

    @property
    def _pad(self) -> int:
        """Masked, so any id does: Falcon's own tokenizer has no pad token."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _row(self) -> "Row":
        ends = self.options.get("eos_token_id", self.tokenizer.eos_token_id)
        ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
        return Row(self.tokenizer, self.sampling.stop_strings, self.new_tokens, self.strip, ends)

    def _inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Token ids and mask, both (B, T), padded on the left so that every row ends where the new text begins."""
        longest = max(map(len, self.prompts))
        ids = [[self._pad] * (longest - len(prompt)) + prompt for prompt in self.prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in self.prompts]
        return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}

    def _generations(self, rows: list["Row"], watch: "Watch", cache_bytes: int) -> list[Generation]:
        stats = Stats(
            rows=len(rows),
            prompt_tokens=sum(map(len, self.prompts)),
            new_tokens=sum(len(row.tokens) for row in rows),
            first_token_seconds=watch.first - watch.start,
            seconds=watch.last - watch.start,
            cache_bytes=cache_bytes,
        )
        prompts = [
            str(self.tokenizer.decode(ids)) for ids in self.prompts for _ in range(self.sampling.num_return_sequences)
        ]
        return [
            Generation(
                prompt=prompt,
                text=row.text,
                tokens=tuple(row.tokens),
                logprobs=None if self.whole else tuple(row.logprobs),
                finish_reason=row.finish_reason or ("cancelled" if self.cancelled.is_set() else "stop"),
                stats=stats,
                alternatives=tuple(row.alternatives) if self.sampling.alternatives and not self.whole else None,
            )
            for prompt, row in zip(prompts, rows, strict=True)
        ]


def spelled_out(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with what a `generation_config` among them says given by name; what already is by name wins."""
    settings = dict(settings)
    config = settings.pop("generation_config", None)
    if config is None:
        return settings
    said = {name: value for name in vars(GenerationConfig()) if (value := getattr(config, name, None)) is not None}
    if settings.get("max_new_tokens") or settings.get("max_length"):
        said = {name: value for name, value in said.items() if name not in ("max_new_tokens", "max_length")}
    return said | settings


def _check_names(options: dict[str, Any], model: FalconForCausalLM) -> None:
    """Refuses an argument that neither the kit nor transformers knows, and names the nearest."""
    own = set(SAMPLING_FIELDS)
    known = own | set(vars(GenerationConfig())) | set(signature(type(model).generate).parameters)
    known |= set(signature(type(model).forward).parameters)
    for name in options:
        shown = known if get_close_matches(name, known) else own  # all of transformers' would bury the reader
        require(name in known, unknown_name("setting", name, sorted(shown)))


def _cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a transformers cache holds, quantised ones included; 0 without a cache."""
    layers = getattr(cache, "layers", ())
    held = [value for layer in layers for name, value in vars(layer).items() if name.endswith(("keys", "values"))]
    return sum(tensor.nbytes for tensor in _tensors(held))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)
