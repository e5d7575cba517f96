"""A text in a form in which different spellings of a character are equal, with each character's place in the original.

Each character is replaced on its own, so that a text may arrive in any pieces. `plain` keeps upper and lower case:
compatibility forms are resolved (full-width letters and digits, ligatures), accents, Arabic vowel marks and invisible
characters are removed. `folded` also removes case and turns the Cyrillic and Greek letters that look like Latin ones
into these.
"""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache

# After case folding. Letters that look like a Latin letter in one case only are left alone: Russian words stay whole.
_LOOK_ALIKES = str.maketrans("аеорсухіјѕԁһӏԛԝкαινορυχκøłđħı", "aeopcyxijsdhlqwkaivopuxkoldhi")
_DROPPED = re.compile(
    r"[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"  # accents of Latin, Greek and Cyrillic
    r"\u0610-\u061a\u0640\u064b-\u065f\u0670"  # Arabic vowel marks and tatweel
    r"\ufe00-\ufe0f\U000e0100-\U000e01ef"  # variation selectors
    r"\u115f\u1160\u3164]"  # empty Hangul letters
)


@lru_cache(maxsize=65536)
def plain(character: str) -> str:
    """The characters that stand for one character; none for an invisible one."""
    resolved = _DROPPED.sub("", unicodedata.normalize("NFKD", character))
    return "".join(each for each in resolved if unicodedata.category(each) != "Cf")


@lru_cache(maxsize=65536)
def folded(character: str) -> str:
    """As `plain`, without case and look-alike letters."""
    return plain(character).casefold().translate(_LOOK_ALIKES)


def fold(text: str) -> str:
    """A whole text, folded."""
    return "".join(map(folded, text))


class View:
    """A text that grows at its end and may be forgotten at its beginning, in one of the two forms.

    Places in it are counted from the first character that it ever had.
    """

    def __init__(self, form: Callable[[str], str]) -> None:
        self.text, self.start = "", 0
        self._form, self._origins, self._length = form, [0], 0  # the last origin is where the next character will be

    def add(self, characters: str) -> None:
        """Appends characters of the original text."""
        first = self._length
        self._length += len(characters)
        self._origins.pop()
        if characters.isascii():
            self.text += characters if self._form is plain else characters.lower()
            self._origins.extend(range(first, self._length))
        else:
            formed = [self._form(character) for character in characters]
            self.text += "".join(formed)  # once, since it copies the whole text
            for origin, part in enumerate(formed, first):
                self._origins.extend([origin] * len(part))
        self._origins.append(self._length)

    @property
    def end(self) -> int:
        """The place after the last character."""
        return self.start + len(self.text)

    def origin(self, place: int) -> int:
        """Where the character at a place begins in the original; for the end of the view, the original's end."""
        return self._origins[place - self.start]

    def place(self, origin: int) -> int:
        """The first place whose character is not before `origin` in the original."""
        return self.start + bisect_left(self._origins, origin)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """The span in the original of the characters from `first` to before `last`."""
        return self.origin(first), self.origin(last - 1) + 1 if last > first else self.origin(first)

    def forget(self, place: int) -> None:
        """Drops what stands before a place."""
        dropped = max(place - self.start, 0)
        self.text, self._origins, self.start = self.text[dropped:], self._origins[dropped:], self.start + dropped
