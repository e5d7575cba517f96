"""Control tokens: those that a chat template writes become tokens, those that a message contains stay text."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Offsets = list[tuple[int, int]]
"""The span of each token in the text, in characters."""
_encode_lock = threading.Lock()


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

    def unmark(self, text: str) -> str:
        """The text without marks."""
        return text.translate(self._unmarked)

    def pieces(self, text: str) -> list[str]:
        """The unmarked text, split after each mark: no piece contains a marked control token."""
        marks = "".join(self._mark.values())
        return [self.unmark(each) for each in (re.split(f"(?<=[{marks}])", text) if marks else [text]) if each]


def encode_marked(text: str, marks: Marks, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], Offsets]:
    """Token ids of a rendered conversation; a control token in it becomes a token, unless it is marked."""
    ids: list[int] = []
    offsets: Offsets = []
    position = 0
    for piece in marks.pieces(text):
        new, spans = _encode(piece, tokenizer, special_as_text=False)
        ids += new
        offsets += [(position + start, position + end) for start, end in spans]
        position += len(piece)
    return ids, offsets


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text. Special tokens in it are encoded as text: "<|endoftext|>" becomes several ordinary ids."""
    return encode_text_with_offsets(text, tokenizer)[0]


def encode_text_with_offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], Offsets]:
    """Token ids as from `encode_text`, and the span of each in the text, in characters."""
    return _encode(text, tokenizer, special_as_text=True)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, special_as_text: bool) -> tuple[list[int], Offsets]:
    options: dict[str, Any] = {"add_special_tokens": False, "return_offsets_mapping": True}
    backend = tokenizer.backend_tokenizer
    with _encode_lock:  # the setting belongs to the tokenizer, not to the thread
        before = backend.encode_special_tokens
        try:
            encoded = tokenizer(text, verbose=False, split_special_tokens=special_as_text, **options)
        finally:
            backend.encode_special_tokens = before  # the call changes the setting and does not restore it
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])
