"""What the tokenizer makes of a text: every token with its id, its bytes and the characters it stands for.

A Falcon's tokenizer is a byte-level BPE (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
section 2.2): it splits the text's UTF-8, not its characters, so that one character may be spread over several tokens.
Tokens are followed byte by byte through the text, which shows exactly where each one begins and ends, and which bytes
of the text no token holds: a vocabulary without a symbol for a byte, and without an unknown token, drops it silently.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_kit.display.page import Page, visible
from falcon_kit.inspection.plots import tokens as plots
from falcon_kit.inspection.views.tokens import tokens_page

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]  # it brings no types of its own
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

Bytes = bytes  # the type, where a field has its name


@dataclass(frozen=True)
class Token:
    """One token of a text."""

    id: int
    """Its id in the vocabulary."""
    text: str
    """The characters of the text that it holds, in full even where it holds only part of one."""
    bytes: Bytes
    """The bytes of the text's UTF-8 that it holds."""
    span: tuple[int, int]
    """Where its characters stand in the text: the first, and the one after the last."""
    special: bool
    """Whether it is a control token, such as the end of a text, rather than something to read."""

    @property
    def partial(self) -> bool:
        """Whether it holds only part of its characters."""
        return self.bytes != self.text.encode()


@dataclass(frozen=True, repr=False)
class TokenView:
    """A text as its tokenizer splits it. The tokens' bytes, joined, are the text's UTF-8, less what is `lost`."""

    text: str
    """The text."""
    tokens: tuple[Token, ...]
    """Its tokens, first to last."""
    lost: Mapping[int, Bytes]
    """Bytes that no token holds, since the vocabulary does not have them, by the character they belong to."""

    @property
    def ids(self) -> tuple[int, ...]:
        """The token ids: what the model reads."""
        return tuple(token.id for token in self.tokens)

    def split_characters(self) -> dict[int, tuple[int, ...]]:
        """The characters that are spread over several tokens: their places in the text, and their tokens' positions."""
        holders: dict[int, tuple[int, ...]] = {}
        for position, token in enumerate(self.tokens):
            for at in range(*token.span):
                holders[at] = (*holders.get(at, ()), position)
        return {at: found for at, found in holders.items() if len(found) > 1}

    def figure(self) -> Figure:
        """How many bytes each token holds."""
        words = [each.bytes if each.partial else visible(each.text, spaces=True) for each in self.tokens]
        kinds = ["special" if each.special else "part" if each.partial else "whole" for each in self.tokens]
        return plots.lengths(words, [len(token.bytes) for token in self.tokens], kinds)

    def page(self) -> Page:
        """The text with each token in a colour of its own; a token tells its id, bytes and characters."""
        return tokens_page(
            repr(self)[len("TokenView(") : -1],
            self.text,
            self.ids,
            [token.bytes for token in self.tokens],
            [token.span for token in self.tokens],
            [token.special for token in self.tokens],
            self.lost,
        )

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the view as a page of its own, at most a megabyte, and returns its path."""
        return self.page().write(path)

    def _repr_html_(self) -> str:
        return self.page()._repr_html_()

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each token: text, id, bytes in hexadecimal, its span, and whether it is special or partial."""
        import pandas as pd

        rows = [(t.text, t.id, t.bytes.hex(" "), *t.span, t.special, t.partial) for t in self.tokens]
        return pd.DataFrame(rows, columns=["token", "id", "bytes", "start", "end", "special", "partial"])

    def __repr__(self) -> str:
        special, lost = sum(token.special for token in self.tokens), sum(map(len, self.lost.values()))
        return (
            f"TokenView({len(self.tokens):,} tokens, {len(self.text):,} characters, {len(self.text.encode()):,} bytes"
            + (f", {special:,} special" if special else "")
            + (f", {lost:,} bytes lost" if lost else "")
            + ")"
        )


def tokens(text: str, tokenizer: Any, *, split_special_tokens: bool | None = None) -> TokenView:
    """How a tokenizer splits a text.

    tokenizer: a tokenizer, or what `fk.load` gives. split_special_tokens: True spells special tokens that are typed in
    the text letter by letter, as text from strangers should be; False has them become what they name; unset, what
    the tokenizer is set to (False, unless somebody changed it). Nothing is added that is not in the text.

    Raises ValueError for an empty text, one that is no valid Unicode (lone surrogates), and a tokenizer that is not
    byte-level or changes the text; TypeError for what is no text or no tokenizer.
    """
    found = tokenizer_of(tokenizer)
    _check(text)
    options = {} if split_special_tokens is None else {"split_special_tokens": split_special_tokens}
    encoded = found(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **options)
    ids, added = encoded["input_ids"], found.added_tokens_decoder
    pieces = [
        text[slice(*span)].encode() if each in added else _bytes(name)
        for each, name, span in zip(ids, found.convert_ids_to_tokens(ids), encoded["offset_mapping"], strict=True)
    ]
    held = _follow(text.encode(), pieces, missing_bytes(found))
    owner = [at for at, each in enumerate(text) for _ in each.encode()]  # the character that each byte belongs to
    spans = [(owner[places[0]], owner[places[-1]] + 1) for places in held]
    rows = (
        Token(each, text[slice(*span)], piece, span, each in added and added[each].special)
        for each, piece, span in zip(ids, pieces, spans, strict=True)
    )
    return TokenView(text, tuple(rows), _lost(text.encode(), owner, held))


def tokenizer_of(given: Any) -> PreTrainedTokenizerBase:
    """A tokenizer, or a Falcon's. Raises TypeError for anything else, and for a tokenizer that is not a fast one."""
    from transformers import PreTrainedTokenizerBase

    found = getattr(given, "tokenizer", given)
    if not isinstance(found, PreTrainedTokenizerBase):
        raise TypeError(f"give a tokenizer, or what fk.load returns; got {type(given).__name__}")
    if not found.is_fast:
        raise TypeError(f"{type(found).__name__} does not say where its tokens stand: load one with AutoTokenizer")
    return found


def missing_bytes(tokenizer: Any) -> frozenset[int]:
    """The bytes that a byte-level vocabulary has no token for: where they occur in a text, they vanish."""
    backend = tokenizer_of(tokenizer).backend_tokenizer
    return frozenset(byte for symbol, byte in _alphabet().items() if backend.token_to_id(symbol) is None)


def _check(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"give a text; got {type(text).__name__}. tokenizer.decode makes one of token ids")
    if not text:
        raise ValueError("the text is empty: give the tokenizer something to split")
    lone = next((at for at, each in enumerate(text) if "\ud800" <= each <= "\udfff"), None)
    if lone is not None:
        raise ValueError(
            f"character {lone} is a lone surrogate, U+{ord(text[lone]):04X}, which is no text and has no UTF-8: "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') joins pairs and replaces the rest"
        )


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """The 256 characters in which a byte-level vocabulary writes bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {symbol: byte for byte, symbol in bytes_to_unicode().items()}


def _bytes(name: str) -> bytes:
    """The bytes of a token, by its name in the vocabulary: "Ġa" is b" a"."""
    try:
        return bytes(_alphabet()[symbol] for symbol in name)
    except KeyError:
        raise ValueError(f"token {name!r} is not written in bytes: this is no byte-level tokenizer") from None


def _follow(data: bytes, pieces: list[bytes], missing: frozenset[int]) -> list[list[int]]:
    """For each piece the places of its bytes in the text's UTF-8, `data`; missing bytes are passed over."""
    cursor, held = 0, []
    for piece in pieces:
        places = []
        for byte in piece:
            cursor = _next(data, cursor, byte, missing)
            places.append(cursor)
            cursor += 1
        held.append(places)
    _next(data, cursor, None, missing)
    return held


def _next(data: bytes, cursor: int, byte: int | None, missing: frozenset[int]) -> int:
    """The place of the next byte of a piece, or with None the end, from `cursor` on."""
    while cursor < len(data) and data[cursor] != byte and data[cursor] in missing:
        cursor += 1
    if (data[cursor] if cursor < len(data) else None) != byte:
        raise ValueError(f"the tokenizer changes the text at byte {cursor}: its tokens cannot be placed in it")
    return cursor


def _lost(data: bytes, owner: list[int], held: list[list[int]]) -> dict[int, bytes]:
    """The bytes that are in no token, by the character they belong to."""
    found: dict[int, bytes] = {}
    for at in sorted(set(range(len(data))).difference(*held)):
        found[owner[at]] = found.get(owner[at], b"") + data[at : at + 1]
    return found
