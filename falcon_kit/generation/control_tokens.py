"""Control tokens: those that a chat template writes become tokens, those that a message contains stay text.

transformers' `apply_chat_template(..., sanitize_control_tokens=True)` does so too, but cannot mark the answers at the
same time, as training needs, and sets the backend that all threads share.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

Offsets = list[tuple[int, int]]
"""The span of each token in the text, in characters."""


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """The special tokens, and other added tokens that the template contains; the longest first."""
    added = [each for each in tokenizer.added_tokens_decoder.values() if len(each.content.strip()) > 1]
    control = [each.content for each in added if each.special or each.content in template]
    return sorted(control, key=len, reverse=True)


class Marks:
    """Marks control tokens in messages: a character that occurs nowhere else replaces their first one.

    Marked texts are as long as the unmarked ones, so that positions in a rendered conversation stay the same.
    """

    def __init__(self, control: Sequence[str], texts: Iterable[str]) -> None:
        used = set().union(*texts)
        unused = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)  # a private use area
        self._mark = dict(zip(sorted({token[0] for token in control}), unused, strict=False))
        self._unmarked = str.maketrans({mark: first for first, mark in self._mark.items()})
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")  # (?!) matches nothing

    def mark(self, text: str) -> str:
        """The text with all control tokens marked."""
        while self._control.search(text):  # again for tokens that overlap
            text = self._control.sub(lambda token: self._mark[token[0][0]] + token[0][1:], text)
        return text

    def pieces(self, text: str) -> list[str]:
        """The unmarked text, split after each mark: no piece contains a marked control token."""
        marks = "".join(self._mark.values())
        pieces = re.split(f"(?<=[{marks}])", text) if marks else [text]
        return [each.translate(self._unmarked) for each in pieces if each]


def encode_marked(text: str, marks: Marks, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], Offsets]:
    """Token ids of a rendered conversation; a control token in it becomes a token, unless it is marked."""
    ids: list[int] = []
    offsets: Offsets = []
    position = 0
    for piece in marks.pieces(text):
        encoded = encoding(piece, tokenizer, split_special_tokens=False)
        ids += encoded.ids
        offsets += [(position + start, position + end) for start, end in encoded.offsets]
        position += len(piece)
    return ids, offsets


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text. Special tokens in it are encoded as text: "<|endoftext|>" becomes several ordinary ids."""
    return list(encoding(text, tokenizer, split_special_tokens=True).ids)


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text as `tokenizer(text)` returns them, by the tokenizer's own settings of special tokens."""
    return list(encoding(text, tokenizer, add_special_tokens=True).ids)


def encode_prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """`encode_prompt` of each text, on all threads of the tokenizer."""
    return [list(each.ids) for each in _own_backend(tokenizer).encode_batch(list(texts))]


def encoding(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    split_special_tokens: bool | None = None,
    add_special_tokens: bool = False,
) -> Encoding:
    """The tokens of a text with their spans. The arguments are those of transformers; None is the tokenizer's own."""
    return _own_backend(tokenizer, split_special_tokens).encode(text, add_special_tokens=add_special_tokens)


def _own_backend(tokenizer: PreTrainedTokenizerBase, split_special_tokens: bool | None = None) -> Tokenizer:
    """A backend for one call, which shares the vocabulary and takes microseconds to make.

    `tokenizer(text)` sets its arguments, padding and truncation on a backend that all threads share, and keeps them
    there, in place of what the user has set.
    """
    from tokenizers import Tokenizer

    shared = tokenizer.backend_tokenizer
    own = Tokenizer(shared.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if (value := getattr(shared, part)) is not None:
            setattr(own, part, value)
    own.add_tokens([token for _, token in sorted(shared.get_added_tokens_decoder().items())])
    own.encode_special_tokens = tokenizer.split_special_tokens if split_special_tokens is None else split_special_tokens
    return own
