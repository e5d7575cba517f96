"""Prompts are checked, become token ids, and leave room for new tokens in the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from falcon_kit.display.errors import plain_scalar, require
from falcon_kit.generation.control_tokens import encode_prompt
from falcon_kit.generation.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[str] | Sequence[int]
"""One text, several texts, or the token ids of one text."""
DEFAULT_NEW_TOKENS = 200


def check_prompt(prompt: Prompt) -> tuple[list[Any], bool]:
    """A list of prompts (texts, or one list of token ids), and whether `prompt` is a single one.

    Raises ValueError for another type, an empty prompt, or a text with a lone surrogate.
    """
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # an array of token ids
    kinds = "a prompt is a text, a list of texts, or one list of token ids"
    require(isinstance(prompt, str | list | tuple), f"{kinds}; got {type(prompt).__name__}")
    prompts: list[Any] = [prompt] if isinstance(prompt, str) else [plain_scalar(each) for each in prompt]
    require(bool(prompts), "the prompt is empty: give the model something to continue")
    if all(isinstance(each, int) for each in prompts):
        return [prompts], True
    wrong_types = [type(each).__name__ for each in prompts if not isinstance(each, str)]
    require(not wrong_types, f"{kinds}; got a list with {', '.join(wrong_types[:3])}")
    for number, text in enumerate(prompts, 1):
        label = _label(number, prompts)
        require(text != "", f"{label} is empty: give the model something to continue")
        require(
            not any("\ud800" <= character <= "\udfff" for character in text),
            f"{label} has a lone surrogate, which UTF-8 cannot encode: "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') joins pairs and replaces the rest",
        )
    return prompts, isinstance(prompt, str)


def token_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> list[list[int]]:
    """The token ids of each prompt that `check_prompt` returned."""
    return [encode_prompt(each, tokenizer) if isinstance(each, str) else each for each in prompts]


def vocabulary_size(model: Any) -> int:
    """The rows of a model's input embeddings as they are now, also after `resize_token_embeddings`.

    A rank of a tensor-parallel model has only some of them, so there it is the config's count.
    """
    if getattr(getattr(model, "transformer", model), "tp_mesh", None) is not None:
        return int(model.config.vocab_size)
    return len(model.get_input_embeddings().weight)


def check_tokens(prompts: list[list[int]], vocab_size: int) -> None:
    """Raises ValueError for a token id outside the vocabulary."""
    if wrong := [token for ids in prompts for token in ids if not 0 <= token < vocab_size]:
        raise ValueError(f"{wrong[0]!r} is no token id of this model: they go from 0 to {vocab_size - 1}")


def new_token_limit(prompts: list[list[int]], context: int, sampling: Sampling) -> int:
    """The largest number of new tokens that fits the settings and the context for every prompt.

    Raises ValueError for a prompt that fills `max_length` or the context, unless `truncate` is "left".
    """
    longest = max(map(len, prompts))
    label = _label(next(number for number, ids in enumerate(prompts, 1) if len(ids) == longest), prompts)
    if sampling.max_length is not None:
        if sampling.truncate == "left" and 2 <= sampling.max_length <= longest:
            return min(context, sampling.max_length) // 2
        require(
            longest < sampling.max_length,
            f"max_length={sampling.max_length} leaves no room: {label} has {longest} tokens",
        )
    wanted = sampling.max_length - longest if sampling.max_length else sampling.max_new_tokens or DEFAULT_NEW_TOKENS
    if sampling.truncate == "left":
        return min(wanted, max(context - longest, context // 2))  # at least half the context stays for the prompt
    require(
        longest < context,
        f"{label} has {longest} tokens, the model's context is {context}, and the answer needs at least one: "
        f'shorten it, or give truncate="left" to drop its beginning',
    )
    return min(wanted, context - longest)


def _label(number: int, prompts: Sequence[Any]) -> str:
    """The name of a prompt in an error: its number, counted from 1, if there are several."""
    return "the prompt" if len(prompts) == 1 else f"prompt {number} of {len(prompts)}"
