"""The tokens of a text: their ids, their bytes and their characters.

A Falcon's tokenizer is a byte-level BPE (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
section 2.2): it splits the UTF-8 bytes of a text, not its characters, so one character may be split over several
tokens. This module aligns tokens and text byte by byte. That gives the exact start and end of each token, and the bytes
of the text that are in no token: a vocabulary without a symbol for a byte, and without an unknown token, drops it
silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from falcon_kit.display.documented import documented
from falcon_kit.display.errors import JOIN_SURROGATES, check_flag, plain_scalar, require
from falcon_kit.display.page import HasPage, Page
from falcon_kit.display.tables import counted
from falcon_kit.generation.control_tokens import encoding
from falcon_kit.inspection.plots import tokens as plots
from falcon_kit.inspection.token import Token, alphabet, token_bytes
from falcon_kit.inspection.views.tokens import tokens_page

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase


@documented
@dataclass(frozen=True, repr=False)
class TokenView(HasPage):
    """The tokens of a text; `len` counts them. Their joined bytes are the UTF-8 text without the `lost` bytes."""

    text: str
    tokens: tuple[Token, ...]
    lost: Mapping[int, bytes]
    """The bytes that are in no token because the vocabulary lacks them, by the position of their character."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def ids(self) -> tuple[int, ...]:
        """The token ids, which are the input of the model."""
        return tuple(token.id for token in self.tokens)

    def split_characters(self) -> dict[int, tuple[int, ...]]:
        """The characters that are split over several tokens: their positions in the text, and those of their tokens."""
        holders: dict[int, tuple[int, ...]] = {}
        for position, token in enumerate(self.tokens):
            for at in range(*token.span):
                holders[at] = (*holders.get(at, ()), position)
        return {at: positions for at, positions in holders.items() if len(positions) > 1}

    def figure(self) -> Figure:
        """The number of bytes in each token."""
        texts = [each.bytes if each.partial else each.text for each in self.tokens]
        kinds = ["special" if each.special else "part" if each.partial else "whole" for each in self.tokens]
        return plots.lengths(texts, [len(token.bytes) for token in self.tokens], kinds)

    def page(self) -> Page:
        """The text with coloured tokens; pointing at a token shows its id, bytes and characters; at most a megabyte."""
        return tokens_page(self._summary, self.text, self.tokens, self.lost)

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each token: text, id, bytes in hexadecimal, span, and whether it is special or partial."""
        import pandas as pd

        rows = [(t.text, t.id, t.bytes.hex(" "), *t.span, t.special, t.partial) for t in self.tokens]
        return pd.DataFrame(rows, columns=["token", "id", "bytes", "start", "end", "special", "partial"])

    @property
    def _summary(self) -> str:
        special, lost = sum(token.special for token in self.tokens), sum(map(len, self.lost.values()))
        return (
            f"{counted(len(self.tokens), 'token')}, {counted(len(self.text), 'character')}, "
            f"{counted(len(self.text.encode()), 'byte')}"
            + (f", {special:,} special" if special else "")
            + (f", {counted(lost, 'byte')} lost" if lost else "")
        )

    def __repr__(self) -> str:
        return f"TokenView({self._summary})"


def tokens(text: str, tokenizer: Any, *, split_special_tokens: bool | None = None) -> TokenView:
    """The tokens of a text.

    tokenizer: a tokenizer, or what `fk.load` returns. split_special_tokens: True encodes the name of a special token in
    the text as ordinary text, which is safe for untrusted text; False encodes it as the special token; None takes the
    tokenizer's own setting (False by default). No special tokens are added.

    Raises ValueError for an empty text, a text with lone surrogates, and a tokenizer that is not byte-level or changes
    the text; TypeError for anything that is not a text or not a tokenizer.
    """
    fast = fast_tokenizer(tokenizer)
    _check(text)
    check_flag("split_special_tokens", split_special_tokens, None)
    encoded = encoding(text, fast, plain_scalar(split_special_tokens))
    ids, added = encoded.ids, fast.added_tokens_decoder
    pieces = [
        text[slice(*span)].encode() if each in added else token_bytes(name)
        for each, name, span in zip(ids, encoded.tokens, encoded.offsets, strict=True)
    ]
    offsets = _align(text.encode(), pieces, missing_bytes(fast))
    character_of = [at for at, each in enumerate(text) for _ in each.encode()]  # the character of each byte
    spans = [(character_of[places[0]], character_of[places[-1]] + 1) for places in offsets]
    rows = (
        Token(each, text[slice(*span)], piece, span, each in added and added[each].special)
        for each, piece, span in zip(ids, pieces, spans, strict=True)
    )
    return TokenView(text, tuple(rows), _lost(text.encode(), character_of, offsets))


def fast_tokenizer(given: Any) -> PreTrainedTokenizerBase:
    """A tokenizer, or that of what `fk.load` returns. Raises TypeError for anything else, and for a slow tokenizer."""
    from transformers import PreTrainedTokenizerBase

    found = getattr(given, "tokenizer", given)
    if not isinstance(found, PreTrainedTokenizerBase):
        raise TypeError(f"give a tokenizer, or what fk.load returns; got {type(given).__name__}")
    if not found.is_fast:
        raise TypeError(
            f"{type(found).__name__} is not a fast tokenizer, so it has no offsets: load one with AutoTokenizer"
        )
    return found


def missing_bytes(tokenizer: Any) -> frozenset[int]:
    """The bytes for which a byte-level vocabulary has no token. The tokenizer drops them from every text."""
    backend = fast_tokenizer(tokenizer).backend_tokenizer
    return frozenset(byte for symbol, byte in alphabet().items() if backend.token_to_id(symbol) is None)


def _check(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"give a text; got {type(text).__name__}. tokenizer.decode turns token ids into a text")
    require(bool(text), "the text is empty: give at least one character")
    lone = next((at for at, each in enumerate(text) if "\ud800" <= each <= "\udfff"), None)
    if lone is not None:
        raise ValueError(
            f"character {lone} is a lone surrogate, U+{ord(text[lone]):04X}, which cannot be encoded in UTF-8: "
            f"{JOIN_SURROGATES}"
        )


def _align(data: bytes, pieces: list[bytes], missing: frozenset[int]) -> list[list[int]]:
    """For each piece the offsets of its bytes in `data`, the UTF-8 text. Missing bytes are skipped."""
    cursor, offsets = 0, []
    for piece in pieces:
        places = []
        for byte in piece:
            cursor = _next(data, cursor, byte, missing)
            places.append(cursor)
            cursor += 1
        offsets.append(places)
    _next(data, cursor, None, missing)
    return offsets


def _next(data: bytes, cursor: int, byte: int | None, missing: frozenset[int]) -> int:
    """The offset of `byte` in `data`, from `cursor` on, where only missing bytes may stand before it.

    With None as `byte` it is the end of the text. Raises ValueError if another byte stands there.
    """
    while cursor < len(data) and data[cursor] != byte and data[cursor] in missing:
        cursor += 1
    if (data[cursor] if cursor < len(data) else None) != byte:
        raise ValueError(f"the tokenizer changes the text at byte {cursor}: its tokens cannot be aligned with it")
    return cursor


def _lost(data: bytes, character_of: list[int], offsets: list[list[int]]) -> dict[int, bytes]:
    """The bytes that are in no token, by the position of their character."""
    lost: dict[int, bytes] = {}
    for at in sorted(set(range(len(data))).difference(*offsets)):
        lost[character_of[at]] = lost.get(character_of[at], b"") + data[at : at + 1]
    return lost
