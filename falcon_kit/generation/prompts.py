"""Prompts become token ids, checked, and leave room for an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from falcon_kit.display.errors import require
from falcon_kit.generation.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[str] | Sequence[int]
"""One text, several texts, or one text already turned into token ids."""
DEFAULT_NEW_TOKENS = 200


def check_prompt(prompt: Prompt) -> tuple[list[Any], bool]:
    """Each prompt, a text or token ids, and whether the caller gave only one.

    Raises ValueError for anything else, for an empty prompt, and for half a surrogate pair.
    """
    kinds = "a prompt is a text, a list of texts, or one list of token ids"
    require(isinstance(prompt, str | list | tuple), f"{kinds}; got {type(prompt).__name__}")
    prompts: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    require(bool(prompts), "the prompt is empty: give the model something to continue")
    if all(isinstance(each, int) for each in prompts):
        return [prompts], True
    others = [type(each).__name__ for each in prompts if not isinstance(each, str)]
    require(not others, f"{kinds}; got a list with {', '.join(others[:3])}")
    for number, text in enumerate(prompts, 1):
        which = _which(number, prompts)
        require(text != "", f"{which} is empty: give the model something to continue")
        require(
            not any("\ud800" <= character <= "\udfff" for character in text),
            f"{which} has a lone surrogate, which is no text and has no UTF-8: "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') joins pairs and replaces the rest",
        )
    return prompts, isinstance(prompt, str)


def token_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> list[list[int]]:
    """The token ids of each prompt that `check_prompt` returned."""
    # verbose: transformers would warn of a prompt over the context, which `room` refuses in clearer words
    return [list(tokenizer(each, verbose=False)["input_ids"]) if isinstance(each, str) else each for each in prompts]


def check_tokens(prompts: list[list[int]], vocabulary: int) -> None:
    """Raises ValueError for a token id that the model has no row for."""
    if wrong := [token for ids in prompts for token in ids if not 0 <= token < vocabulary]:
        raise ValueError(f"{wrong[0]!r} is no token id of this model: they go from 0 to {vocabulary - 1}")


def room(prompts: list[list[int]], context: int, sampling: Sampling) -> int:
    """How many tokens may be generated so that neither the request nor the context is exceeded."""
    longest = max(map(len, prompts))
    which = _which(next(number for number, ids in enumerate(prompts, 1) if len(ids) == longest), prompts)
    if sampling.max_length is not None:
        require(
            longest < sampling.max_length,
            f"max_length={sampling.max_length} leaves no room: {which} has {longest} tokens",
        )
    wanted = sampling.max_length - longest if sampling.max_length else sampling.max_new_tokens or DEFAULT_NEW_TOKENS
    if sampling.truncate == "left":
        return min(wanted, max(context - longest, context // 2))  # of a long prompt, half the context stays at least
    require(
        longest < context,
        f"{which} has {longest} tokens, the model's context is {context}, and the answer needs at least one: "
        f'shorten it, or give truncate="left" to drop its beginning',
    )
    return min(wanted, context - longest)


def _which(number: int, prompts: Sequence[Any]) -> str:
    """A prompt by its number from 1, where there are several."""
    return "the prompt" if len(prompts) == 1 else f"prompt {number} of {len(prompts)}"
