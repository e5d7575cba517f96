"""The keyword arguments of `generate`: generation configs expanded, names checked.

A value counts as in transformers: the caller's keyword, else the caller's `generation_config`, else the checkpoint's
generation_config.json, else the default. None is no value: an argument that is None counts as not given.
"""

import math
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

import numpy as np
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    FalconForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from falcon_kit.display.errors import check_flag, check_whole, is_number, is_whole, plain_scalar, require, shown
from falcon_kit.generation.sampling import OTHER_NAMES, SAMPLING_FIELDS, Sampling, unknown_setting

CACHE = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__)
"""transformers' name for the cache of keys and values: "cache" from 5.24 on, "past_key_values" before. The kit takes
both."""
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens")
"""The arguments of transformers' `generate` that turn on assisted generation."""
OWN_LOOP = (
    *("custom_generate", "synced_gpus", "penalty_alpha", "dola_layers", "constraints", "force_words_ids"),
    *("assistant_ensemble_weight", "use_mtp", "speculation_type"),
)
"""Arguments that choose a loop which the kit does not have step by step (see steps.py)."""
_LOOPS_ON_THE_HUB = ("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "num_beam_groups")
"""Arguments that choose a loop whose code transformers fetches from the hub."""

_PROMPTS = ("inputs", "input_ids", "inputs_embeds")
_SAMPLING_ONLY = ("min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
_PROBABILITIES = "a Generation has .logprobs, and with alternatives=N the most probable tokens of each step"
_INSTEAD = {
    "output_scores": _PROBABILITIES,
    "output_logits": _PROBABILITIES,
    "output_attentions": "fk.attention(falcon, text) returns the attention of a text",
    "output_hidden_states": "fk.lens(falcon, text) reads the hidden states, and model(ids, output_hidden_states=True) "
    "returns them",
    "assistant_early_exit": "Falcon has no early exit. Give assistant_model or prompt_lookup_num_tokens",
    "token_healing": "it changes the end of the prompt: leave a space at the end of the prompt out instead",
}
"""Arguments that are refused, and what to do instead."""
_DISTRIBUTION = ("temperature", "top_k", "top_p")
_LENGTH = ("max_new_tokens", "max_length")
_NOT_SHOWN = {"use_cache", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id"}
_OF_THE_DRAFT = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")

_WHOLE = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "prefill_chunk_size": 1,
    "min_new_tokens": 0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "assistant_early_exit": 0,
}
"""Arguments that are whole numbers, and the least of each."""
_PENALTIES = ("repetition_penalty", "encoder_repetition_penalty")
_NUMBERS = (
    *(*_PENALTIES, "length_penalty", "diversity_penalty", "guidance_scale", "max_time", "penalty_alpha"),
    *("assistant_ensemble_weight", *_SAMPLING_ONLY),
)
_SWITCHES = (
    "use_cache renormalize_logits remove_invalid_values low_memory token_healing return_dict_in_generate "
    "output_scores output_logits output_attentions output_hidden_states is_assistant disable_compile use_mtp "
    "synced_gpus"
).split()
_LISTS = ("logits_processor", "stopping_criteria")


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with numbers as transformers takes them: Python's own, and floats where it refuses whole ones.

    Raises ValueError for a value of another kind, which would fail inside transformers or count as another.
    """
    plain = {name: plain_scalar(value) for name, value in options.items()}
    for name, least in _WHOLE.items():
        if plain.get(name) is not None:
            check_whole(name, plain[name], least)
    for name in _NUMBERS:
        if plain.get(name) is not None:
            given = plain[name]
            is_infinite = isinstance(given, float) and math.isinf(given)
            fits = is_infinite or is_number(given, -sys.float_info.max, sys.float_info.max)
            require(fits, f"{name} must be a number, got {shown(given)}")
            plain[name] = float(given)
    for name in _SWITCHES:
        check_flag(name, plain.get(name), None)
    check_flag("early_stopping", plain.get("early_stopping"), None, "never")
    for name in _LISTS:
        given = plain.get(name)
        require(
            given is None or (isinstance(given, list | tuple) and all(map(callable, given))),
            f"{name} must be a list of functions or of transformers' objects, got {shown(given)}",
        )
    _check_objects(plain)
    return plain


def whole_penalties(config: GenerationConfig) -> dict[str, float]:
    """The penalties of a checkpoint that are whole numbers, as the floats that transformers takes."""
    values: dict[str, Any] = {name: getattr(config, name, None) for name in _PENALTIES}
    return {name: float(value) for name, value in values.items() if is_whole(value, 1)}


def _check_objects(options: Mapping[str, Any]) -> None:
    """Raises ValueError for a streamer or a cache of another kind."""
    streamer, cache = options.get("streamer"), options.get(CACHE)
    require(
        streamer is None or (hasattr(streamer, "put") and hasattr(streamer, "end")),
        f"streamer must be an object with put and end, as transformers.TextStreamer; got {shown(streamer)}. Call your "
        "own function for each piece of falcon.stream(...)",
    )
    require(isinstance(cache, Cache | None), f"{CACHE} must be a transformers.Cache or None, got {shown(cache)}")


def expand_generation_config(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the values of a `generation_config` among them as keyword arguments; given keywords win.

    What is None is left out, and the cache gets the name that this transformers has for it.
    Raises ValueError for one that is neither a GenerationConfig nor a mapping, and for a cache under both names.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    rename_cache(settings)
    config = settings.pop("generation_config", None)
    if config is None:
        return settings
    require(
        isinstance(config, GenerationConfig | Mapping),
        f"generation_config must be a transformers.GenerationConfig or a dict, got {shown(config)}",
    )
    dropped = ("transformers_version", *(_LENGTH if any(name in settings for name in _LENGTH) else ()))
    values = {
        name: value
        for name, value in (config if isinstance(config, Mapping) else vars(config)).items()
        if value is not None and not name.startswith("_") and name not in dropped
    }
    return values | settings


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache of keys and values of a call, which may have either name. Raises ValueError for both at once."""
    require(cache is None or past_key_values is None, "past_key_values is the former name of cache: give cache alone")
    return past_key_values if cache is None else cache


def rename_cache(settings: dict[str, Any]) -> None:
    """Gives a cache among the settings the name that this transformers has for it."""
    if (cache := one_cache(settings.pop("cache", None), settings.pop("past_key_values", None))) is not None:
        settings[CACHE] = cache


def without_tokenizer(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The settings without `tokenizer`, which transformers needs beside stop_strings and the kit has already.

    Raises ValueError for another tokenizer.
    """
    given = settings.get("tokenizer")
    require(
        given is None or given is tokenizer,
        f"tokenizer is another one than the Falcon's own, falcon.tokenizer: leave it out (got {shown(given)})",
    )
    return {name: value for name, value in settings.items() if name != "tokenizer"}


def checkpoint_settings(config: GenerationConfig) -> dict[str, Any]:
    """The settings of generation that a checkpoint's generation_config.json contains; token ids are left out."""
    names = [name for name in vars(GenerationConfig()) if not name.startswith(("_", "output_", "return_"))]
    values = {name: getattr(config, name, None) for name in names if name not in _NOT_SHOWN}
    return {name: value for name, value in values.items() if value is not None}


def add_checkpoint_settings(settings: dict[str, Any], config: GenerationConfig) -> dict[str, Any]:
    """The settings, and of the fields of `Sampling` that they do not name those of the checkpoint.

    transformers' generate adds the checkpoint's other settings itself.
    """
    values = {name: value for name, value in checkpoint_settings(config).items() if name in SAMPLING_FIELDS}
    if values.get("max_new_tokens") or any(name in settings for name in _LENGTH):
        values.pop("max_length", None)  # transformers prefers max_new_tokens
    if "max_length" in settings:
        values.pop("max_new_tokens", None)
    if not _samples(settings, bool(values.pop("do_sample", False))):
        values = {name: value for name, value in values.items() if name not in _DISTRIBUTION}
    elif "do_sample" not in settings:
        values["do_sample"] = True
    return values | settings


def _samples(settings: dict[str, Any], by_default: bool) -> bool:
    """Whether tokens are sampled: as the caller's settings require, else by the checkpoint's default."""
    chosen = {name: settings[name] for name in ("do_sample", *_DISTRIBUTION) if name in settings}
    return Sampling(**chosen).samples if chosen else by_default


def end_token_ids(options: dict[str, Any], config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the caller's, else the checkpoint's, else the tokenizer's; possibly none.

    Raises ValueError for what the caller gives and is no token.
    """
    given = options.get("eos_token_id")
    ends: Any = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    require(
        ends is None or all(is_whole(each, -1) for each in (ends if isinstance(ends, list | tuple) else [ends])),
        f"eos_token_id must be the number of a token or a list of them, got {shown(given)}; a text that ends an answer "
        "is given as stop",
    )
    for ids in (plain_scalar(ends), config.eos_token_id, tokenizer.eos_token_id):
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def check_names(options: dict[str, Any], model: FalconForCausalLM) -> None:
    """Raises ValueError for an argument that neither the kit nor transformers has; the error says what to give."""
    sampling = set(SAMPLING_FIELDS)
    inside = getattr(model, "get_base_model", lambda: model)()  # a PEFT model names no arguments of its own
    known = (
        sampling
        | {"assistant_tokenizer"}
        | set(vars(GenerationConfig()))
        | set(signature(GenerationMixin.generate).parameters)
        | set(signature(type(inside).forward).parameters)
    )
    for name in options:
        if name not in known:
            near = get_close_matches(name, known) or name in OTHER_NAMES
            listed = known if near else sampling  # all of transformers' are too many to list
            raise ValueError(unknown_setting(name, sorted(listed)))


def check_effects(options: Mapping[str, Any], samples: bool) -> None:
    """Raises ValueError for arguments of transformers' generate that would have no effect here, or a wrong one.

    samples: whether tokens are sampled.
    """
    for name in _PROMPTS:
        require(options.get(name) is None, f"{name} would replace the prompt: give token ids as the prompt itself")
    for name, advice in _INSTEAD.items():
        require(not options.get(name), f"{name} has no effect here: {advice}")
    for name in _SAMPLING_ONLY:
        require(samples or options.get(name) is None, f"{name} has no effect without sampling: give do_sample=True too")
    require(
        options.get("cache_implementation") != "paged",
        "cache_implementation='paged' is for transformers' generate_batch: leave it out",
    )


def check_no_remote_code(options: Mapping[str, Any], config: GenerationConfig) -> None:
    """Raises ValueError for a loop whose code transformers would fetch from the hub, or from a folder, and run.

    config: the model's own, which counts where the caller's options name nothing.
    """
    loop = options.get("custom_generate")
    require(
        not isinstance(loop, str),
        f"custom_generate={shown(loop)} names code that would be fetched and run, which the kit never does: give a "
        "function of your own",
    )
    for name in _LOOPS_ON_THE_HUB:
        value = plain_scalar(options.get(name, getattr(config, name, None)))
        if value is None or (name == "num_beam_groups" and value == 1):
            continue
        where = "" if name in options else f", with falcon.model.generation_config.{name} = None"
        raise ValueError(
            f"{name}={shown(value)} needs code that transformers fetches from the hub and runs, which the kit never "
            f"does: leave it out{where}"
        )


def check_assisted(options: Mapping[str, Any], model: FalconForCausalLM, rows: int, samples: bool) -> None:
    """Raises ValueError for what assisted generation cannot do, and for a draft model of another vocabulary.

    model: the one that accepts or rejects the draft. rows: the number of texts to generate. samples: whether tokens are
    sampled.
    """
    _check_draft(options)
    require(rows == 1, f"assisted generation is of one text, and this call asks for {rows}: call it for each")
    _check_cache(options, model)
    require(
        options.get("guidance_scale", model.generation_config.guidance_scale) in (None, 1),
        "with a draft, guidance_scale gives other text, since transformers counts rejected tokens as text: "
        "give guidance_scale=1, or neither assistant_model nor prompt_lookup_num_tokens",
    )
    if (draft := options.get("assistant_model")) is None:
        return
    for name in _OF_THE_DRAFT:
        require(
            options.get(name) is None,
            f"transformers reads {name} from the draft model only: set it there, as generation_config.{name} of the "
            "draft's model",
        )
    sizes, other = [each.config.vocab_size for each in (model, draft)], options.get("assistant_tokenizer")
    require(
        not samples or (sizes[0] == sizes[1] and other is None),
        "a draft with another tokenizer is for do_sample=False, since transformers cuts the draft's head for sampling: "
        "give that without temperature, top_k and top_p, or choose a draft model with the same tokenizer",
    )
    require(
        sizes[0] == sizes[1] or other is not None,
        f"the draft model has a vocabulary of {sizes[1]} tokens and the model one of {sizes[0]}: choose a draft model "
        "with the same tokenizer, or give assistant_tokenizer=, its own",
    )


def _check_cache(options: Mapping[str, Any], model: FalconForCausalLM) -> None:
    """Raises ValueError for a cache from which assisted generation cannot take back tokens.

    A draft model would get cache_implementation beside the cache that it already has, which transformers refuses.
    """
    own = model.generation_config
    kind = options.get("cache_implementation", own.cache_implementation)
    kinds = (None,) if options.get("assistant_model") is not None else (None, "dynamic", "offloaded")
    require(
        options.get("use_cache", own.use_cache) is not False and kind in kinds,
        "assisted generation takes back the keys and values of rejected tokens: leave use_cache and "
        "cache_implementation out, here and in the model's generation_config",
    )
    cache = options.get(CACHE)
    require(
        isinstance(cache, DynamicCache | None),
        f"assisted generation takes back the keys and values of rejected tokens: {CACHE} may be a DynamicCache, "
        f"got {shown(cache)}",
    )


def _check_draft(options: Mapping[str, Any]) -> None:
    """Raises ValueError for two drafts at once, of which transformers takes one, and for a draft of another type."""
    drafts = [name for name in ASSISTED if options.get(name) is not None]
    require(len(drafts) < 2, f"{' and '.join(drafts)} are two ways to get a draft: give one of them")
    for name in ("prompt_lookup_num_tokens", "max_matching_ngram_size"):
        if (value := plain_scalar(options.get(name))) is not None:
            check_whole(name, value, 1)
    draft = options.get("assistant_model")
    require(
        draft is None or hasattr(draft, "config"),
        f"assistant_model is a loaded model, such as fk.load('falconet'); got {shown(draft)}",
    )
