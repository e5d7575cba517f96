"""A text as the model reads it: each token tinted by how much it surprised, the next one as a table, and what each
layer would have said.

Everything stands in the page as text, so it reads without JavaScript; the script only shows what belongs to a token
when one points at it, or goes there by keyboard.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from falcon_kit.display.page import Page, percent, text_html, visible
from falcon_kit.inspection.views import walk

Floats = NDArray[np.floating[Any]]
Expected = Sequence[tuple[str, float]]
"""Tokens that may come next with their probabilities, likeliest first."""

_BITS = 12.0  # surprisal at which the tint is full

_STYLE = """
  & .says { min-height: 3em; }
  & .bar { display: inline-block; height: .8em; background: var(--c0); vertical-align: middle; }
  & .lens td { font-family: ui-monospace, monospace; white-space: nowrap; border: 1px solid var(--faint); }
  & .scale span { display: inline-block; padding: 0 .6em; }
"""

_SCRIPT = """
walk(() => { root.querySelector(".says").textContent = tokens[here].title; });
"""


def lens_page(
    title: str,
    words: Sequence[str],
    surprisal: Floats,
    expected: Sequence[Expected],
    following: Expected,
    read: Sequence[Sequence[str]],
    probabilities: Floats,
) -> Page:
    """The view of a text of T `words`.

    surprisal: (T,) in bits, nan for the first. expected: for each token, what was expected in its place, nothing for
    the first. following: what may come after the last. read, probabilities: (L + 1, t) what each layer would say after
    each of the last t tokens, and how sure it is.
    """
    scale = "".join(f'<span style="{_tint(bits)}">{bits:g}</span>' for bits in (0, 2, 4, 8, 12))
    body = (
        f'<p class="note scale">Surprisal in bits: {scale} or more</p>'
        f"{walk.tokens_html(words, _attributes(words, surprisal, expected))}"
        '<p class="says" aria-live="polite"></p>'
        f"<h3>What may come next</h3>{_next(following)}"
        f"<h3>What each layer would say</h3>{_lens(words, read, probabilities)}"
    )
    return Page(title, body, style=walk.STYLE + _STYLE, script=walk.SCRIPT + _SCRIPT)


def _tint(bits: float) -> str:
    share = 0 if np.isnan(bits) else min(1.0, bits / _BITS)
    return f"background:color-mix(in srgb,var(--c1) {round(60 * share)}%,transparent)"


def _attributes(words: Sequence[str], surprisal: Floats, expected: Sequence[Expected]) -> list[str]:
    """Each token's tint, and what belongs to it in words."""
    rows = enumerate(zip(words, surprisal.tolist(), expected, strict=True))
    return [
        f' style="{_tint(bits)}" title="{escape(_says(at, word, bits, before))}"' for at, (word, bits, before) in rows
    ]


def _says(at: int, word: str, bits: float, before: Expected) -> str:
    """What belongs to a token, in words."""
    name = f"token {at}, {visible(word, spaces=True)}"
    if not before:
        return f"{name}: the first, nothing was expected"
    likely = ", ".join(f"{visible(each, spaces=True)} {percent(probability)}" for each, probability in before)
    return f"{name}: {bits:.1f} bits; expected {likely}"


def _next(following: Expected) -> str:
    rows = "".join(
        f"<tr><td>{rank}</td><td>{text_html(word, spaces=True)}</td><td>{probability:.2%}</td>"
        f'<td><span class="bar" style="width:{12 * probability:.2f}em"></span></td></tr>'
        for rank, (word, probability) in enumerate(following)
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("rank", "token", "probability", ""))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _lens(words: Sequence[str], read: Sequence[Sequence[str]], probabilities: Floats) -> str:
    """A table: a row for each layer, the last at the top, and a column for each of the last t tokens."""
    time = probabilities.shape[1]
    columns = "".join(f'<th scope="col">{text_html(word, spaces=True)}</th>' for word in words[-time:])
    names = ["embedding", *(f"layer {layer}" for layer in range(len(read) - 1))]
    rows = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(_cell(read[row][at], float(probabilities[row, at])) for at in range(time))
        + "</tr>"
        for row, name in reversed(list(enumerate(names)))
    )
    note = f'<p class="note">After each of the last {time} tokens; a stronger tint is surer.</p>'
    table = f"<table><thead><tr><th></th>{columns}</tr></thead><tbody>{rows}</tbody></table>"
    return f'{note}<div class="scroll lens">{table}</div>'


def _cell(word: str, probability: float) -> str:
    tint = f"background:color-mix(in srgb,var(--c0) {round(65 * probability)}%,transparent)"
    return f'<td style="{tint}" title="{percent(probability)}">{text_html(word, spaces=True)}</td>'
