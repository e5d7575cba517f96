"""What the same sentences cost in different languages: "mainly English" as a table and a picture.

    python -m falcon_kit.inspection.languages DIRECTORY NAME

measures the tokenizer in a directory on the kit's own sentences and prints the figures, with the hash of its
tokenizer.json, as the JSON that `fk.published_tokens` reads; the published Falcon vocabulary's come with the kit.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.display.page import Page
from falcon_kit.inspection.plots import tokens as plots
from falcon_kit.inspection.tokens import TokenView, missing_bytes, tokenizer_of, tokens
from falcon_kit.inspection.views.tokens import comparison_page

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]  # it brings no types of its own
    from matplotlib.figure import Figure

Segmenter = Literal["spaces", "characters"]
Texts = Mapping[str, str | Sequence[str]]
"""Texts by name: each one text, or a list of sentences."""

_SENTENCES = Path(__file__).with_name("sentences.json")
_PUBLISHED = Path(__file__).with_name("published.json")
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
_RATIOS = ("tokens_per_word", "whole_share", "bytes_per_token", "byte_fallback")
_COLUMNS = ("text", "tokens", "tokens per word", "words by", "words whole", "bytes per token", "byte fallback")


@dataclass(frozen=True)
class TextFigures:
    """What one text costs."""

    name: str
    """Its name, such as its language."""
    sentences: int
    """How many sentences; 0 for a text that was given as one."""
    characters: int
    """Its length in characters."""
    bytes: int
    """Its length in UTF-8."""
    words: int
    """Runs of letters, marks, digits and symbols between anything else; or its characters, see `segmenter`."""
    segmenter: Segmenter
    """What counts as a word: most scripts put spaces between them; where a script does not, each character is one,
    with the accents and vowel signs that belong to it."""
    whole_words: int
    """Words that lie in one token each, which may hold more, such as the space before."""
    tokens: int
    """Its tokens, those of spaces and punctuation included."""
    partial_tokens: int
    """Tokens that hold only part of a character: the vocabulary has fallen back on bytes."""
    lost_bytes: int
    """Bytes that no token holds."""

    @property
    def tokens_per_word(self) -> float:
        """All tokens, over words; nan for a text without words."""
        return self.tokens / self.words if self.words else math.nan

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 that a token holds on average; nan for no tokens."""
        return self.bytes / self.tokens if self.tokens else math.nan

    @property
    def whole_share(self) -> float:
        """Share of words that are kept whole; nan for a text without words."""
        return self.whole_words / self.words if self.words else math.nan

    @property
    def byte_fallback(self) -> float:
        """Share of tokens that hold only part of a character; nan for no tokens."""
        return self.partial_tokens / self.tokens if self.tokens else math.nan


@dataclass(frozen=True, repr=False)
class TokenReport:
    """Texts compared by what they cost in tokens."""

    tokenizer: str
    """The tokenizer's name."""
    vocabulary: int
    """How many tokens it has."""
    missing_bytes: bytes
    """The bytes it has no token for, which vanish from any text."""
    rows: tuple[TextFigures, ...]
    """The figures of each text."""
    reference: str
    """The text that parity is relative to."""

    def parity(self, name: str) -> float:
        """Tokens of a text over those of the reference; nan unless both have the same number of sentences.

        Above 1, the same content costs more: time, memory, and room in the context.
        """
        found, reference = self[name], self[self.reference]
        parallel = found.sentences == reference.sentences and reference.tokens > 0
        return found.tokens / reference.tokens if parallel else math.nan

    def __getitem__(self, name: str) -> TextFigures:
        found = next((row for row in self.rows if row.name == name), None)
        if found is None:
            raise KeyError(f"no text {name!r}: there are {', '.join(row.name for row in self.rows)}")
        return found

    def figure(self, other: TokenReport | None = None) -> Figure:
        """Parity and bytes per token of each text, beside another tokenizer's of the same texts if there is one."""
        names, reports = self._ordered(), (self, other) if other else (self,)
        labels = [f"{report.tokenizer}, {report.vocabulary:,} tokens" for report in reports]
        pairs = list(zip(labels, reports, strict=True))
        parity = {label: [report.parity(name) for name in names] for label, report in pairs}
        sizes = {label: [report[name].bytes_per_token for name in names] for label, report in pairs}
        return plots.languages(names, parity, sizes, self.reference)

    def page(self) -> Page:
        """The figures as a table, with a bar for parity."""
        rows = [self[name] for name in self._ordered()]
        parity = [self.parity(row.name) for row in rows]
        most = max((each for each in parity if each > 0), default=1.0)
        cells = [(*_cells(row), _number(each)) for row, each in zip(rows, parity, strict=True)]
        bars = [0.0 if math.isnan(each) else each / most for each in parity]
        title = f"What texts cost in tokens: {self.tokenizer}, a vocabulary of {self.vocabulary:,}"
        return comparison_page(title, (*_COLUMNS, f"parity, {self.reference} = 1"), cells, bars)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the table as a page of its own and returns its path."""
        return self.page().write(path)

    def _repr_html_(self) -> str:
        return self.page()._repr_html_()

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each text, by name: all that was counted, and what follows from it."""
        import pandas as pd

        rows = [
            asdict(row) | {name: getattr(row, name) for name in _RATIOS} | {"parity": self.parity(row.name)}
            for row in self.rows
        ]
        return pd.DataFrame(rows).set_index("name")

    def __repr__(self) -> str:
        return f"TokenReport({self.tokenizer}, {self.vocabulary:,} tokens, {len(self.rows)} texts)"

    def _ordered(self) -> list[str]:
        """The names of the texts, those with a parity first, the cheapest first."""
        order = {row.name: self.parity(row.name) for row in self.rows}
        return sorted(order, key=lambda name: (math.isnan(order[name]), 0 if math.isnan(order[name]) else order[name]))


def compare_tokens(texts: Texts, tokenizer: Any, *, reference: str | None = None) -> TokenReport:
    """What texts cost in tokens, side by side.

    texts: by name, each one text or a list of sentences; `fk.sample_texts()` has languages, code, numbers and emoji.
    tokenizer: a tokenizer, or what `fk.load` gives. reference: the text that parity is relative to, the first unless
    told; texts with as many sentences are taken for its translations.

    Raises ValueError for no texts or an empty one, KeyError for a reference that is not there, TypeError for what is
    not texts by name; and whatever `fk.tokens` raises.
    """
    if not isinstance(texts, Mapping):
        raise TypeError(f"give texts by name, such as {{'English': 'Hello'}}; got {type(texts).__name__}")
    if not texts:
        raise ValueError("there are no texts: give at least one, or fk.sample_texts()")
    found = tokenizer_of(tokenizer)
    spec = getattr(tokenizer, "spec", None)
    name = spec.name if spec else _name(Path(str(found.name_or_path)))
    rows = tuple(_measure(each, text, found) for each, text in texts.items())
    missing = bytes(sorted(missing_bytes(found)))
    report = TokenReport(name, len(found), missing, rows, next(iter(texts)) if reference is None else reference)
    report[report.reference]  # raises
    return report


def _name(directory: Path) -> str:
    """The last part of a directory, or the name of an embedded model, whose directory is called otherwise."""
    embedded = ("falconet", "falconet-instruct")
    return next((name for name in embedded if directory == embedded_directory(name)), directory.name)


def sample_texts() -> dict[str, str | list[str]]:
    """Five sentences in each of 23 languages, translations of each other, written for the kit; code, numbers, emoji."""
    found = json.loads(_SENTENCES.read_text(encoding="utf-8"))
    return {**found["parallel"], **found["other"]}


def published_tokens() -> TokenReport:
    """What the published Falcon vocabulary, 65,024 tokens, makes of `sample_texts`: recorded, so no download."""
    found = json.loads(_PUBLISHED.read_text(encoding="utf-8"))["report"]
    missing, rows = bytes.fromhex(found["missing_bytes"]), tuple(TextFigures(**row) for row in found["rows"])
    return TokenReport(**found | {"missing_bytes": missing, "rows": rows})


def record(directory: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Figures of the tokenizer in a directory on `sample_texts`, with what they were made of."""
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


def _measure(name: str, text: str | Sequence[str], tokenizer: Any) -> TextFigures:
    sentences = [text] if isinstance(text, str) else list(text)
    if not sentences or not all(sentences):
        raise ValueError(f"text {name!r} is empty, or has an empty sentence: leave it out")
    views = [tokens(sentence, tokenizer) for sentence in sentences]
    segmenter = _segmenter("".join(sentences))
    return TextFigures(
        name=name,
        sentences=0 if isinstance(text, str) else len(sentences),
        characters=sum(len(view.text) for view in views),
        bytes=sum(len(view.text.encode()) for view in views),
        words=sum(len(list(_words(view.text, segmenter))) for view in views),
        segmenter=segmenter,
        whole_words=sum(len(_whole_words(view, segmenter)) for view in views),
        tokens=sum(len(view.tokens) for view in views),
        partial_tokens=sum(token.partial for view in views for token in view.tokens),
        lost_bytes=sum(len(each) for view in views for each in view.lost.values()),
    )


def _segmenter(text: str) -> Segmenter:
    """Characters, if most letters are of scripts that put no spaces between words."""
    letters = [each for each in text if each.isalpha()]
    unspaced = sum(unicodedata.name(each, "").startswith(_UNSPACED) for each in letters)
    return "characters" if 2 * unspaced > len(letters) else "spaces"


def _words(text: str, segmenter: Segmenter) -> Iterator[range]:
    """The words of a text, each as the places of its characters."""
    start = None
    for at, each in enumerate(f"{text} "):
        begins, goes_on = unicodedata.category(each)[0] in "LNS", _joins(each)
        if start is not None and (not (begins or goes_on) or (begins and segmenter == "characters")):
            yield range(start, at)
            start = None
        start = at if begins and start is None else start


def _joins(character: str) -> bool:
    """Whether it belongs to the character before: accents, vowel signs, joiners within emoji."""
    return unicodedata.category(character)[0] == "M" or character in "\u200c\u200d"


def _whole_words(view: TokenView, segmenter: Segmenter) -> list[range]:
    """The words of which one token holds all."""
    inside = [range(*token.span) for token in view.tokens if not token.partial]
    owner = {at: position for position, places in enumerate(inside) for at in places}
    words = _words(view.text, segmenter)
    return [word for word in words if word[0] in owner and {owner.get(at) for at in word} == {owner[word[0]]}]


def _cells(row: TextFigures) -> tuple[str, ...]:
    """What the table says of a text, less its parity."""
    whole, fallback = (_number(share, ".0%") for share in (row.whole_share, row.byte_fallback))
    sizes = (_number(row.tokens_per_word), row.segmenter, whole, _number(row.bytes_per_token), fallback)
    return (row.name, f"{row.tokens:,}", *sizes)


def _number(value: float, style: str = ".2f") -> str:
    return "" if math.isnan(value) else format(value, style)


if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps(record(*sys.argv[1:]), indent=1)}\n")
