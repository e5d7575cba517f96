"""Token counts of the same sentences in different languages, as a table and a figure.

    python -m falcon_kit.inspection.languages DIRECTORY NAME

measures the tokenizer in a directory on the kit's own sentences. It prints the counts, with the hash of
tokenizer.json, as the JSON that `fk.published_tokens` reads. The counts of the published Falcon vocabulary are part of
the kit.

Tokens per word is the fertility of Rust et al. 2021 ("How Good is Your Tokenizer?"); parity over parallel
sentences is that of Petrov et al. 2023 ("Language Model Tokenizers Introduce Unfairness Between Languages").
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import regex

from falcon_kit.catalogue.names import embedded_name
from falcon_kit.display.documented import documented
from falcon_kit.display.errors import printable, require
from falcon_kit.display.page import HasPage, Page
from falcon_kit.display.tables import counted
from falcon_kit.inspection.plots import tokens as plots
from falcon_kit.inspection.tokens import TokenView, fast_tokenizer, missing_bytes, tokens
from falcon_kit.inspection.views.tokens import comparison_page

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Segmenter = Literal["spaces", "characters"]
Texts = Mapping[str, str | Sequence[str]]
"""Texts by name: each is one text or a list of sentences."""

_SENTENCES = Path(__file__).with_name("sentences.json")
_PUBLISHED = Path(__file__).with_name("published.json")
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
_WORD: Mapping[Segmenter, Any] = {
    "spaces": regex.compile(r"[\p{L}\p{N}\p{S}][\p{L}\p{N}\p{S}\p{M}\u200c\u200d]*"),
    "characters": regex.compile(r"[\p{L}\p{N}\p{S}][\p{M}\u200c\u200d]*"),
}
"""Letters, digits and symbols with what belongs to them: marks (accents, vowel signs) and joiners within emoji."""
_RATIOS = ("tokens_per_word", "whole_share", "bytes_per_token", "byte_fallback")
_COLUMNS = ("text", "tokens", "tokens per word", "words by", "words whole", "bytes per token", "byte fallback")


@dataclass(frozen=True)
class TokenCounts:
    """Counts of tokens, words and bytes in one text."""

    name: str
    """The name of the text, such as its language."""
    sentences: int
    """The number of sentences; 0 for a text that was given as one string."""
    characters: int
    bytes: int
    """Its length in UTF-8 bytes."""
    words: int
    """Words: runs of letters, marks, digits and symbols; or characters, see `segmenter`."""
    segmenter: Segmenter
    """What counts as a word. Most scripts put spaces between words. In a script without spaces each character counts as
    a word, together with its accents and vowel signs."""
    whole_words: int
    """Words that are contained in one token; the token may contain more, such as the space before the word."""
    tokens: int
    """Tokens, those of spaces and punctuation included."""
    partial_tokens: int
    """Tokens that contain only some bytes of a character (byte fallback)."""
    lost_bytes: int
    """Bytes that are in no token."""

    @property
    def tokens_per_word(self) -> float:
        """Tokens per word (fertility); nan for a text without words."""
        return self.tokens / self.words if self.words else math.nan

    @property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes per token; nan for a text without tokens."""
        return self.bytes / self.tokens if self.tokens else math.nan

    @property
    def whole_share(self) -> float:
        """Share of words that are contained in one token; nan for a text without words."""
        return self.whole_words / self.words if self.words else math.nan

    @property
    def byte_fallback(self) -> float:
        """Share of tokens that contain only some bytes of a character; nan for a text without tokens."""
        return self.partial_tokens / self.tokens if self.tokens else math.nan


@documented
@dataclass(frozen=True, repr=False)
class TokenReport(HasPage):
    """Token counts of several texts, compared."""

    tokenizer: str
    """The tokenizer's name."""
    vocabulary: int
    """The number of tokens in its vocabulary."""
    missing_bytes: bytes
    """The bytes for which it has no token. It drops them from every text."""
    rows: tuple[TokenCounts, ...]
    reference: str
    """The name of the text that parity is relative to."""

    def parity(self, name: str) -> float:
        """Tokens of a text divided by those of the reference; nan unless both have the same number of sentences.

        Above 1, the same content needs more time, more memory and more of the context.
        """
        counts, reference = self[name], self[self.reference]
        parallel = counts.sentences == reference.sentences and reference.tokens > 0
        return counts.tokens / reference.tokens if parallel else math.nan

    def __getitem__(self, name: str) -> TokenCounts:
        counts = next((row for row in self.rows if row.name == name), None)
        if counts is None:
            raise KeyError(f"no text {name!r}: there are {', '.join(printable(row.name) for row in self.rows)}")
        return counts

    def figure(self, other: TokenReport | None = None) -> Figure:
        """Parity and bytes per token of each text; `other` is the report of another tokenizer on the same texts.

        Raises ValueError if the parity of the other report is relative to another text.
        """
        names, reports = self._ordered(), (self, other) if other else (self,)
        references = [printable(report.reference) for report in reports]
        require(
            len(set(references)) == 1,
            f"the reports are relative to different texts, {' and '.join(references)}: give both the same reference",
        )
        labels = [f"{report.tokenizer}, {report.vocabulary:,} tokens" for report in reports]
        if len(set(labels)) < len(labels):
            labels = [f"{number}: {label}" for number, label in enumerate(labels, 1)]
        pairs = list(zip(labels, reports, strict=True))
        parity = {label: [report.parity(name) for name in names] for label, report in pairs}
        sizes = {label: [report[name].bytes_per_token for name in names] for label, report in pairs}
        return plots.languages(names, parity, sizes, self.reference)

    def page(self) -> Page:
        """The counts as a table, with a bar for parity."""
        rows = [self[name] for name in self._ordered()]
        parity = [self.parity(row.name) for row in rows]
        most = max((each for each in parity if each > 0), default=1.0)
        cells = [(*_cells(row), _number(each)) for row, each in zip(rows, parity, strict=True)]
        bars = [0.0 if math.isnan(each) else each / most for each in parity]
        title = f"Token counts: {self.tokenizer}, a vocabulary of {self.vocabulary:,}"
        return comparison_page(title, (*_COLUMNS, f"parity, {self.reference} = 1"), cells, bars)

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each text, by name: the counts, the ratios and the parity."""
        import pandas as pd

        rows = [
            asdict(row) | {name: getattr(row, name) for name in _RATIOS} | {"parity": self.parity(row.name)}
            for row in self.rows
        ]
        return pd.DataFrame(rows).set_index("name")

    def __repr__(self) -> str:
        return (
            f"TokenReport({printable(self.tokenizer)}, {self.vocabulary:,} tokens, {counted(len(self.rows), 'text')})"
        )

    def _ordered(self) -> list[str]:
        """The names of the texts by parity, lowest first; texts without a parity come last."""
        order = {row.name: self.parity(row.name) for row in self.rows}
        return sorted(order, key=lambda name: math.inf if math.isnan(order[name]) else order[name])


def compare_tokens(texts: Texts, tokenizer: Any, *, reference: str | None = None) -> TokenReport:
    """Token counts of several texts, compared.

    texts: by name, each one text or a list of sentences; `fk.sample_texts()` has languages, code, numbers and emoji.
    tokenizer: a tokenizer, or what `fk.load` returns. reference: the name of the text that parity is relative to; None
    takes the first. Texts with the same number of sentences count as its translations.

    Raises ValueError if there are no texts or one is empty, KeyError for a reference that is not among them, TypeError
    if `texts` is not a mapping; and whatever `fk.tokens` raises.
    """
    if not isinstance(texts, Mapping):
        raise TypeError(f"give texts by name, such as {{'English': 'Hello'}}; got {type(texts).__name__}")
    if not texts:
        raise ValueError("there are no texts: give at least one, or fk.sample_texts()")
    fast = fast_tokenizer(tokenizer)
    spec = getattr(tokenizer, "spec", None)
    name = spec.name if spec else embedded_name(fast.name_or_path) or Path(fast.name_or_path).name
    rows = tuple(_count(each, text, fast) for each, text in texts.items())
    missing = bytes(sorted(missing_bytes(fast)))
    report = TokenReport(name, len(fast), missing, rows, next(iter(texts)) if reference is None else reference)
    report[report.reference]  # raises KeyError for an unknown one
    return report


def sample_texts() -> dict[str, str | list[str]]:
    """Five parallel sentences in 23 languages, written for the kit; and code, numbers and emoji."""
    texts = json.loads(_SENTENCES.read_text(encoding="utf-8"))
    return {**texts["parallel"], **texts["other"]}


def published_tokens() -> TokenReport:
    """Token counts of the published Falcon vocabulary, 65,024 tokens, on `sample_texts`. Recorded: no download."""
    report = json.loads(_PUBLISHED.read_text(encoding="utf-8"))["report"]
    missing, rows = bytes.fromhex(report["missing_bytes"]), tuple(TokenCounts(**row) for row in report["rows"])
    return TokenReport(**report | {"missing_bytes": missing, "rows": rows})


def record(directory: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Token counts of the tokenizer in a directory on `sample_texts`, with the hashes of both."""
    from transformers import AutoTokenizer

    report = compare_tokens(sample_texts(), AutoTokenizer.from_pretrained(directory))
    return {
        "made_by": "python -m falcon_kit.inspection.languages DIRECTORY NAME",
        "tokenizer_sha256": _sha256(Path(directory) / "tokenizer.json"),
        "sentences_sha256": _sha256(_SENTENCES),
        "report": asdict(report) | {"tokenizer": name, "missing_bytes": report.missing_bytes.hex(" ")},
    }


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _count(name: str, text: str | Sequence[str], tokenizer: Any) -> TokenCounts:
    sentences = [text] if isinstance(text, str) else list(text)
    if not sentences or not all(sentences):
        raise ValueError(f"text {name!r} is empty or has an empty sentence: remove it")
    views = [tokens(sentence, tokenizer) for sentence in sentences]
    segmenter = _segmenter("".join(sentences))
    return TokenCounts(
        name=name,
        sentences=0 if isinstance(text, str) else len(sentences),
        characters=sum(len(view.text) for view in views),
        bytes=sum(len(view.text.encode()) for view in views),
        words=sum(len(_words(view.text, segmenter)) for view in views),
        segmenter=segmenter,
        whole_words=sum(len(_whole_words(view, segmenter)) for view in views),
        tokens=sum(len(view.tokens) for view in views),
        partial_tokens=sum(token.partial for view in views for token in view.tokens),
        lost_bytes=sum(len(each) for view in views for each in view.lost.values()),
    )


def _segmenter(text: str) -> Segmenter:
    """ "characters" if most letters belong to scripts without spaces between words, otherwise "spaces"."""
    letters = [each for each in text if each.isalpha()]
    unspaced = sum(unicodedata.name(each, "").startswith(_UNSPACED) for each in letters)
    return "characters" if 2 * unspaced > len(letters) else "spaces"


def _words(text: str, segmenter: Segmenter) -> list[range]:
    """The words of a text, each as a range of characters."""
    return [range(*found.span()) for found in _WORD[segmenter].finditer(text)]


def _whole_words(view: TokenView, segmenter: Segmenter) -> list[range]:
    """The words that are contained in one token."""
    spans = [range(*token.span) for token in view.tokens if not token.partial]
    token_of = {at: position for position, span in enumerate(spans) for at in span}
    words = _words(view.text, segmenter)
    return [word for word in words if word[0] in token_of and {token_of.get(at) for at in word} == {token_of[word[0]]}]


def _cells(row: TokenCounts) -> tuple[str, ...]:
    """The cells of a text in the table, without its parity."""
    whole, fallback = (_number(share, ".0%") for share in (row.whole_share, row.byte_fallback))
    sizes = (_number(row.tokens_per_word), row.segmenter, whole, _number(row.bytes_per_token), fallback)
    return (row.name, f"{row.tokens:,}", *sizes)


def _number(value: float, style: str = ".2f") -> str:
    return "" if math.isnan(value) else format(value, style)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m falcon_kit.inspection.languages DIRECTORY NAME")
    sys.stdout.write(f"{json.dumps(record(*sys.argv[1:]), indent=1)}\n")
