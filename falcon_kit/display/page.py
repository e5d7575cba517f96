"""`Page`, an HTML view: a fragment for a notebook cell, or a complete HTML file. `text_html` escapes text for it.

A view is isolated from the surrounding notebook and from the text that it displays:

- its style and script apply to one element, whose class is a hash of the view, so that a notebook can hold many views;
- text goes through `text_html`, which escapes it, isolates its direction and makes invisible characters visible;
- data for the script goes through `Page.data`, as JSON in which `<`, `>` and `&` are escaped;
- the HTML file has a Content-Security-Policy that allows only this style and this script.
"""

import hashlib
import json
import math
import os
import unicodedata
from base64 import b64encode
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from falcon_kit.display.figure import PALETTE
from falcon_kit.display.saving import write_text
from falcon_kit.display.tables import counted

_BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0\ufe0e\ufe0f\u034f"  # invisible letters and marks


def static_text(module: str, name: str) -> str:
    """A stylesheet or script from the folder `static` beside the module with that `__file__`."""
    return Path(module).with_name("static").joinpath(name).read_text(encoding="utf-8")


DOM_SCRIPT = static_text(__file__, "dom.js")
"""JavaScript functions that widgets share: elements, and values as text."""
WIDGET_STYLE = static_text(__file__, "widget.css")
"""The look that widgets share."""
_STYLE, _SCRIPT = static_text(__file__, "page.css"), static_text(__file__, "page.js")
_PAGE_STYLE = ":root { color-scheme: light dark; } body { margin: 1em auto; max-width: 75em; padding: 0 1em; }"


@dataclass(frozen=True, repr=False)
class Page:
    """One HTML view. Jupyter displays it; `write` saves it as a file."""

    title: str
    """Plain text: the heading of the view and the title of the file."""
    body: str
    """HTML. All text in it is already escaped with `text_html` or `html.escape`."""
    style: str = ""
    """CSS nested in the view's element: `& .cell { ... }`, or declarations for the element itself."""
    script: str = ""
    """Body of a JavaScript function of `root` (the element) and `data`. It only adds interaction, no content."""
    data: Any = None
    """Data for the script; it must be serialisable as JSON."""

    def __post_init__(self) -> None:
        if "</" in self.script or "</" in self.style:
            raise ValueError("'</' in a view's script or style could close its element: write '<\\/' instead")

    def __repr__(self) -> str:
        return f"Page({visible(self.title)!r}, {counted(len(self.body), 'character')})"

    @property
    def scope(self) -> str:
        """The class of the view's element. It depends on the content only, so that saved outputs do not change."""
        parts = json.dumps([self.title, self.body, self.style, self.script, self.data])
        return f"fk-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"

    def _repr_html_(self) -> str:
        """The view as a fragment, for a notebook cell."""
        return self._fragment(self._source())

    def document(self) -> str:
        """The view as a complete HTML page. It loads nothing and runs only its own script."""
        source = self._source()
        allowed = b64encode(hashlib.sha256(source.encode()).digest()).decode()
        policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width">\n'
            f"<title>{escape(visible(self.title))}</title>\n<style>{_PAGE_STYLE}</style>\n</head>\n"
            f"<body>\n<main>{self._fragment(source)}</main>\n</body>\n</html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes the complete page to a file and returns the path. Raises OSError if the file cannot be written."""
        return write_text(path, self.document())

    def _source(self) -> str:
        return _SCRIPT.replace("SCOPE", self.scope).replace("SOURCE", self.script) if self.script else ""

    def _fragment(self, source: str) -> str:
        scope = self.scope
        palette = "".join(f"--c{number}: {colour}; " for number, colour in enumerate(PALETTE))
        style = f"<style>.{scope} {{ {palette}{_STYLE}{self.style} }}</style>"
        script = f"{_data(self.data)}<script>{source}</script>" if source else ""
        heading = f"<h2>{text_html(self.title)}</h2>" if self.title else ""
        return f'<div class="{scope}">{style}{heading}{self.body}{script}</div>'


class HasPage:
    """Base of results that a page shows, in Jupyter and as a file."""

    def page(self) -> Page:
        """The view of this result."""
        raise NotImplementedError

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page to a file and returns its path."""
        return self.page().write(path)

    def _repr_html_(self) -> str:
        return self.page()._repr_html_()


def _data(value: Any) -> str:
    """The data as a JSON script element, escaped so that it contains no HTML tag, comment or entity."""
    text = json.dumps(value, separators=(",", ":"))  # ASCII only: lone surrogates and line separators are escaped too
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json">{text}</script>'


def text_html(text: str, spaces: bool = False) -> str:
    """Text as HTML: escaped, with its reading direction isolated, and with invisible characters made visible.

    spaces: show spaces as a raised dot.
    """
    pairs = ((each, _stand_in(each, spaces)) for each in text)
    escaped = "".join(escape(each) if mark is None else f'<i class="mark">{mark}</i>' for each, mark in pairs)
    return f"<bdi>{_base_for_mark(text)}{escaped}</bdi>"


def visible(text: str, spaces: bool = False) -> str:
    """The text with visible stand-ins for invisible and control characters: "a\\x00" is "a␀", U+202E is "[U+202E]".

    For plain text: labels of a figure, a title, an HTML attribute (after `html.escape`).
    """
    return _base_for_mark(text) + "".join(_stand_in(each, spaces) or each for each in text)


def percent(probability: float) -> str:
    """A probability in percent, rounded down: 0.9996 is "99.9%", not "100.0%"."""
    return f"{math.floor(1000 * probability + 1e-6) / 10:.1f}%"


def direction(text: str) -> str:
    """The value of the HTML attribute `dir`: "rtl" if the first letter that has a direction is right-to-left."""
    strong = (kind for each in text if (kind := unicodedata.bidirectional(each)) in ("L", "R", "AL"))
    return "ltr" if next(strong, "L") == "L" else "rtl"


def _base_for_mark(text: str) -> str:
    """A dotted circle if the text starts with a combining mark, which would combine with the text before it."""
    return "◌" if text and unicodedata.category(text[0]) in ("Mn", "Me", "Mc") and not _stand_in(text[0], False) else ""


@lru_cache(maxsize=4096)
def _stand_in(character: str, spaces: bool) -> str | None:
    """The visible stand-in for an invisible character; None for a visible one."""
    code = ord(character)
    if code < 0x20 or code == 0x7F:
        return {"\n": "↵", "\t": "⇥", "\x7f": "␡"}.get(character, chr(0x2400 + code % 0x20))
    if character == " ":
        return "·" if spaces else None
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp") or character in _BLANK_LETTERS
    return f"[U+{code:04X}]" if hidden else None
