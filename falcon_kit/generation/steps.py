"""The loops of transformers' `generate` as generators, so that a stream needs no thread.

transformers calls a function that is passed as `custom_generate` in place of its own loop, with all that `generate` has
prepared. The functions here follow its loops (`GenerationMixin._sample` and `_assisted_decoding` of transformers 5.23)
with the model's own methods, and give each step to their caller before the next one begins. The caller sends back which
sequences are finished, (B,), or None.

Shapes: B sequences, T tokens, C tokens of a draft, N new tokens of a step, V vocabulary.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.candidate_generator import _prepare_attention_mask, _prepare_position_ids
from transformers.generation.utils import _speculative_sampling

from falcon_kit.catalogue.spec import context_limit
from falcon_kit.generation.arguments import CACHE
from falcon_kit.generation.decoding import Step

Steps = Generator[Step, Tensor | None, None]
Processor = Callable[[Tensor, Tensor], Tensor]
"""transformers' logits processors as one function, of the tokens (B, T) and the logits (B, V)."""


@torch.no_grad()
def token_by_token(
    model: Any,
    input_ids: Tensor,
    logits_processor: Processor,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    rng: AbstractContextManager[None],
    begin_reading: Callable[[Step], None] | None,
    **model_kwargs: Any,
) -> Steps:
    """One new token of each sequence at a time: the most probable one, or a sampled one. `rng` is entered to choose.

    begin_reading: starts to copy a step to the host. With it, the model begins its next step before the caller reads
    this one, so that a GPU does not wait for the host. If the caller then ends, that step was computed in vain.
    """
    compiles = model._valid_auto_compile_criteria(model_kwargs, generation_config)
    forward = model.get_compiled_call(generation_config.compile_config) if compiles else model

    def next_outputs() -> Any:
        length = 1 if model_kwargs["use_cache"] else None
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=length, **model_kwargs)
        return forward(**inputs, return_dict=True)

    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    finished: Tensor | None = None
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        del outputs  # the logits of a whole prompt may be large
        logprobs = _logprobs(logits)  # before a processor changes the logits in place
        with rng:
            tokens = _choose(logits_processor(input_ids, logits), generation_config)  # (B, 1)
        if finished is not None:
            tokens = tokens.masked_fill(finished[:, None], generation_config.pad_token_id)
        input_ids = torch.cat([input_ids, tokens], dim=-1)
        ended = stopping_criteria(input_ids, None)
        step = Step(tokens, logprobs[:, None], ended, model_kwargs.get(CACHE))
        if begin_reading is None or input_ids.shape[1] == generation_config.max_length:
            finished = yield step
            outputs = next_outputs()
            continue
        begin_reading(step)
        try:
            outputs = next_outputs()
        except Exception:  # such as one for lack of memory: the caller has this step first
            yield step
            raise
        finished = yield step


def _logprobs(logits: Tensor) -> Tensor:
    """The log-probabilities of logits (..., V); nan for a row of logits with nan.

    The logits of such a row become 0, so that a token can be drawn: drawing from nan on CUDA would make the GPU
    unusable for this process. The reader of the step sees the nan and raises, without another wait for the GPU.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    logits.masked_fill_(logprobs[..., :1].isnan(), 0)
    return logprobs


def _choose(scores: Tensor, config: GenerationConfig) -> Tensor:
    """The next token (B, 1) for the processed logits (B, V)."""
    if config.do_sample:
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1)
    return scores.argmax(dim=-1, keepdim=True)


@torch.no_grad()
def assisted(
    model: Any,
    input_ids: Tensor,
    logits_processor: Processor,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    rng: AbstractContextManager[None],
    drafting: dict[str, Any],
    **model_kwargs: Any,
) -> Steps:
    """A draft of several tokens at a time, of which the model accepts the first ones and adds one.

    `drafting`: the models and tokenizers for transformers' candidate generator. `rng` is entered to draft and choose.
    """
    model_kwargs[CACHE].activate_past_recording()
    config, processor = generation_config, cast(Any, logits_processor)
    if drafting["assistant_tokenizer"] is not None:  # the draft has other tokens than those that the settings name
        config, processor = GenerationConfig(do_sample=False, min_length=0, max_length=config.max_length), []
    generator = model._get_candidate_generator(config, input_ids, input_ids, processor, model_kwargs, **drafting)
    _keep_to_its_context(generator)
    first = True
    while True:
        try:
            with rng:
                draft, draft_logits = generator.get_candidates(input_ids)
        except _DraftIsFullError:
            generator, draft, draft_logits = _NoDraft(), input_ids, None
        draft = draft.to(input_ids.device)[:, : context_limit(model.config)]  # (1, T + C)
        count, length = draft.shape[1] - input_ids.shape[1], input_ids.shape[1]
        outputs = model(**_verification_inputs(model, draft, count, first, model_kwargs))
        logits = outputs.logits[:, -count - 1 :].to(copy=True, dtype=torch.float32, device=input_ids.device)
        logprobs = _logprobs(logits)
        with rng:
            for i in range(count + 1):
                logits[:, i] = logits_processor(draft[:, : length + i], logits[:, i])
            tokens, accepted = _accepted(draft, draft_logits, logits, generation_config)
        tokens = _up_to_the_end(tokens, generation_config, length)
        input_ids, added = torch.cat([input_ids, tokens], dim=-1), tokens.shape[1]
        outputs[CACHE].crop(added - 1 - count)
        generator.update_candidate_strategy(input_ids, logits, added - 1)
        _store_draft_length(generator)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, num_new_tokens=added)
        ended, first = stopping_criteria(input_ids, None), False
        yield Step(tokens, logprobs[:, :added], ended, model_kwargs[CACHE], accepted)


class _DraftIsFullError(Exception):
    """The text fills the context of the draft model."""


class _NoDraft:
    """A candidate generator that proposes nothing, so that the model goes on alone."""

    def get_candidates(self, input_ids: Tensor) -> tuple[Tensor, None]:
        return input_ids, None

    def update_candidate_strategy(self, *given: Any) -> None:
        """Nothing adapts."""


def _keep_to_its_context(generator: Any) -> None:
    """Makes a draft model propose no more tokens than its context has room for, in the tokens of its own tokenizer.

    Once there is no room, the generator raises _DraftIsFullError.
    """
    config = getattr(getattr(generator, "assistant_model", None), "config", None)
    positions = getattr(config, "max_position_embeddings", None)  # GPT-2's config stores it under another name
    if positions is None:
        return
    prepare = generator._prepare_generation_args
    context = context_limit({**vars(config), "max_position_embeddings": positions})

    def prepared(input_ids: Tensor, least: int, most: int) -> Any:
        room = context - input_ids.shape[1]
        if room < 1:
            raise _DraftIsFullError
        return prepare(input_ids, min(least, room), min(most, room))

    generator._prepare_generation_args = prepared


def _verification_inputs(
    model: Any, draft: Tensor, count: int, first: bool, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The inputs of the forward pass over the last new token, or the prompt, and the `count` tokens of the draft."""
    kwargs = _prepare_attention_mask(copy(model_kwargs), draft.shape[1], False)
    if count and kwargs.get("position_ids") is not None:
        kwargs = _prepare_position_ids(kwargs, count + kwargs["position_ids"].shape[-1], False)
    inputs: dict[str, Any] = model.prepare_inputs_for_generation(
        draft, next_sequence_length=None if first else count + 1, is_first_iteration=first, **kwargs
    )
    return inputs | {"logits_to_keep": count + 1, "return_dict": True}


def _accepted(
    draft: Tensor, draft_logits: Tensor | None, logits: Tensor, config: GenerationConfig
) -> tuple[Tensor, int]:
    """The new tokens (1, N), and how many of them are the draft's: all but the last.

    A sampled draft is accepted with the probabilities of Leviathan et al. 2023 (arXiv 2211.17192, algorithm 1).
    """
    count = logits.shape[1] - 1
    if config.do_sample and draft_logits is not None:
        tokens, matches = _speculative_sampling(draft, draft_logits.to(logits.device), count, logits)
        return tokens, int(matches)
    chosen = _choose(logits[0], config)[:, 0]  # (C + 1,)
    matches = int((draft[0, draft.shape[1] - count :] == chosen[:count]).cumprod(dim=0).sum())
    return chosen[None, : matches + 1], matches


def _store_draft_length(generator: Any) -> None:
    """Stores how long the next draft is, where the draft model's generation config says that it adapts over calls."""
    config = getattr(getattr(generator, "assistant_model", None), "generation_config", None)
    if config is not None and config.num_assistant_tokens_schedule == "heuristic":
        config.num_assistant_tokens = generator.num_assistant_tokens


def _up_to_the_end(tokens: Tensor, config: GenerationConfig, length: int) -> Tensor:
    """The new tokens (1, N) up to `max_length` and an end-of-sequence token, which a draft may pass."""
    tokens = tokens[:, : config.max_length - length]
    if (end_ids := getattr(config, "_eos_token_tensor", None)) is None:
        return tokens
    ends = torch.isin(tokens[0], end_ids).nonzero()
    return tokens[:, : int(ends[0]) + 1] if len(ends) else tokens
