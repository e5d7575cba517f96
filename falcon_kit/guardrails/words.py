"""Blocked words: whole words, however they are spelled in case, accents, width, invisible or look-alike letters.

A word's first and last letter must stand at a border: beside something that is no letter, digit or underscore.
"ass" is not found in "grass". Scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese)
have no such borders: there a word is found inside longer words too. A letter of these scripts is a border for words of
other scripts.
"""

import re
from collections.abc import Sequence

import regex

from falcon_kit.display.errors import require
from falcon_kit.guardrails.folding import fold
from falcon_kit.guardrails.matching import Pattern

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""The letters of scripts without spaces between words, for a character class of the `regex` package."""
_LONGEST = 100


def word_patterns(words: Sequence[str]) -> list[Pattern]:
    """The pattern of this check; none without words. Raises ValueError for a word without letters, or a long one."""
    folded = [" ".join(fold(word).split()) for word in words]
    for number, word in enumerate(folded, 1):
        require(any(map(str.isalnum, word)), f"blocked word {number} has no letter or digit")
        require(len(word) <= _LONGEST, f"blocked word {number} has {len(word)} characters; the limit is {_LONGEST}")
    expression = "|".join(map(_expression, sorted(set(folded), key=lambda word: (-len(word), word))))
    return [Pattern("blocked_words", "a blocked word", expression, folded=True)] if words else []


def _expression(word: str) -> str:
    """One word with its borders; parts of a phrase may stand further apart."""
    left = rf"(?<![^\W{UNSPACED}])" if _needs_border(word[0]) else ""
    right = rf"(?=[\W{UNSPACED}])" if _needs_border(word[-1]) else ""
    return left + r"[\W_]{1,8}".join(map(re.escape, word.split())) + right


def _needs_border(letter: str) -> bool:
    """Whether a word may not go on beside this letter: not for punctuation, nor in scripts without spaces."""
    return regex.match(rf"[^\W{UNSPACED}]", letter) is not None
