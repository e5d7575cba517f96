"""Prompts are checked, become token ids, and leave room for new tokens in the context."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from falcon_kit.display.errors import check_encodable, plain_scalar, require, shown
from falcon_kit.generation.chat import Message
from falcon_kit.generation.control_tokens import encode_prompt
from falcon_kit.generation.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[str] | Sequence[int]
"""One text, several texts, or the token ids of one text."""
DEFAULT_NEW_TOKENS = 200
_ENCODED_AT_ONCE = 100_000


def check_several(prompts: Any) -> None:
    """Raises ValueError for what is no list or iterator of prompts: iterating over it would give something else."""
    require(not isinstance(prompts, str), "give a list of prompts, also for one: [prompt]")
    table = isinstance(prompts, Mapping) or hasattr(prompts, "columns")
    require(not table, f"give a list of prompts, such as one column, not a {type(prompts).__name__}")
    require(not is_conversation(prompts), "give a list of conversations, also for one: [messages]")


def is_conversation(prompt: Any) -> TypeGuard[Sequence[Message]]:
    """Whether a prompt is a list of messages, which the chat template renders; they are not checked."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], Mapping)


def check_prompt(prompt: Any) -> tuple[list[Any], bool]:
    """A list of prompts (texts, or one list of token ids), and whether `prompt` is a single one.

    Raises ValueError for another type, an empty prompt, or a text with a lone surrogate.
    """
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # an array of token ids
    kinds = "a prompt is a text, a list of texts, or one list of token ids"
    require(isinstance(prompt, str | list | tuple), f"{kinds}; got {type(prompt).__name__}{_inside(prompt)}")
    prompts: list[Any] = [prompt] if isinstance(prompt, str) else [plain_scalar(each) for each in prompt]
    require(bool(prompts), "the prompt is empty: give the model something to continue")
    if all(isinstance(each, int) and not isinstance(each, bool) for each in prompts):
        return [prompts], True
    wrong_types = [type(each).__name__ for each in prompts if not isinstance(each, str)]
    instead = ""
    if "dict" in wrong_types:
        instead = ": chat and stream take messages"
    elif {*wrong_types} == {"list"}:
        instead = ": give the ids of one text, such as ids[0]"
    require(not wrong_types, f"{kinds}; got a list with {', '.join(wrong_types[:3])}{instead}")
    for number, text in enumerate(prompts, 1):
        label = prompt_label(number, len(prompts))
        require(text != "", f"{label} is empty: give the model something to continue")
        check_encodable(label, text)
    return prompts, isinstance(prompt, str)


def _inside(prompt: Any) -> str:
    """Where the token ids are in what a tokenizer returns, for an error."""
    if not isinstance(prompt, Mapping) or "input_ids" not in prompt:
        return ""
    several = getattr(prompt["input_ids"], "ndim", 1) > 1 or isinstance(next(iter(prompt["input_ids"]), 0), list)
    return ": give its ['input_ids'][0]" if several else ": give its ['input_ids']"


def least_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """A lower bound for the number of tokens of a long text, without encoding it.

    It follows from the longest name in the vocabulary: a name has a character for each byte of its token. The bound is
    0 for a text of at most `_ENCODED_AT_ONCE` characters, which takes a fraction of a second to encode.
    """
    if len(text) <= _ENCODED_AT_ONCE:
        return 0
    return math.ceil(len(text) / max(map(len, tokenizer.get_vocab())))


def check_length(text: str, tokenizer: PreTrainedTokenizerBase, context: int, label: str) -> None:
    """Raises ValueError for a text that is certainly longer than the context. Ten million characters take a minute to
    encode, so this comes first."""
    least = least_tokens(text, tokenizer)
    require(
        least <= context,
        f"{label} has {len(text):,} characters, which are at least {least:,} tokens; the model's context is {context}: "
        "shorten it",
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> list[list[int]]:
    """The token ids of each prompt that `check_prompt` returned."""
    return [encode_prompt(each, tokenizer) if isinstance(each, str) else each for each in prompts]


def vocabulary_size(model: Any) -> int:
    """The rows of a model's input embeddings as they are now, also after `resize_token_embeddings`.

    A rank of a tensor-parallel model has only some of them, so there it is the config's count.
    """
    if tensor_parallel_mesh(model) is not None:
        return int(model.config.vocab_size)
    return len(model.get_input_embeddings().weight)


def tensor_parallel_mesh(model: Any) -> Any:
    """The device mesh of a model, or of its decoder, that is split into ranks; None for any other."""
    return getattr(getattr(model, "transformer", model), "tp_mesh", None)


def has_soft_prompt(model: Any) -> bool:
    """Whether PEFT puts a learned prompt before the text, which it does inside its own `generate` only."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def check_tokens(prompts: list[list[int]], vocab_size: int) -> None:
    """Raises ValueError for a token id outside the vocabulary."""
    if wrong := [token for ids in prompts for token in ids if not 0 <= token < vocab_size]:
        raise ValueError(f"{shown(wrong[0])} is no token id of this model, whose ids are 0 to {vocab_size - 1}")


def new_token_limit(prompts: Sequence[Sequence[int]], context: int, sampling: Sampling) -> int:
    """The largest number of new tokens that fits the settings and the context for every prompt.

    Raises ValueError for a prompt that fills `max_length` or the context, unless `truncate` is "left".
    """
    lengths = [*map(len, prompts)]
    longest = max(lengths)
    label = prompt_label(lengths.index(longest) + 1, len(prompts))
    if sampling.max_length is None:
        wanted = sampling.max_new_tokens or DEFAULT_NEW_TOKENS
    else:
        half = min(context, sampling.max_length) // 2
        if sampling.truncate == "left" and longest >= sampling.max_length and half:
            return half  # the other half is for the end of the prompt
        require(
            longest < sampling.max_length,
            f"max_length={sampling.max_length} leaves no room: {label} has {longest} tokens",
        )
        wanted = sampling.max_length - longest
    if sampling.truncate == "left":
        return min(wanted, max(context - longest, context // 2))  # at least half the context stays for the prompt
    require(
        longest < context,
        f"{label} has {longest} tokens, the model's context is {context}, and the answer needs at least one: "
        f'shorten it, or give truncate="left" to drop its beginning',
    )
    return min(wanted, context - longest)


def kept_tokens(new_tokens: int, context: int, sampling: Sampling) -> int:
    """How many tokens of a prompt are kept beside the limit of new tokens; `truncate` drops those before them."""
    return min(context, sampling.max_length or context) - new_tokens


def is_cut(ids: Sequence[int], context: int, sampling: Sampling) -> bool:
    """Whether a prompt loses its first tokens to `truncate`."""
    return len(ids) > kept_tokens(new_token_limit([ids], context, sampling), context, sampling)


def numbered(kind: str, number: int, count: int) -> str:
    """The name of a text in an error: with its number, counted from 1, if there are several."""
    return kind if count == 1 else f"{kind} {number} of {count}"


def prompt_label(number: int, count: int) -> str:
    """The name of a prompt in an error."""
    return "the prompt" if count == 1 else numbered("prompt", number, count)
