"""A text coloured by surprisal, the next tokens as a table, and the logit lens.

The page contains everything as text, so it is complete without JavaScript. The script only shows the details of a token
for the pointer or the keyboard.
"""

from collections.abc import Sequence
from html import escape

import numpy as np

from falcon_kit.display.page import Page, percent, static_text, text_html, visible
from falcon_kit.inspection.plots.labels import Floats
from falcon_kit.inspection.views import tables, walk
from falcon_kit.inspection.views.tables import bar, head, table

Expected = Sequence[tuple[str, float]]
"""Possible next tokens with their probabilities, most likely first."""

_MAX_HTML_BYTES = 800_000  # for the tokens; the page stays below a megabyte
_MAX_BITS = 12.0  # surprisal with the strongest colour

_STYLE = static_text(__file__, "lens.css")


def lens_page(
    title: str,
    tokens: Sequence[str],
    surprisal: Floats,
    expected: Sequence[Expected],
    following: Expected,
    predicted: Sequence[Sequence[str]],
    probabilities: Floats,
) -> Page:
    """The page of a text of T tokens.

    surprisal: (T,) in bits, nan for the first token. expected: the prediction for each position, empty for the first.
    following: the prediction after the last token. predicted, probabilities: (L + 1, t), the most likely next token of
    each layer after each of the last t tokens, and its probability.
    """
    scale = "".join(f'<span style="{_colour(bits)}">{bits:g}</span>' for bits in (0, 2, 4, 8, 12))
    body = (
        f'<p class="note scale">Surprisal in bits: {scale} or more</p>'
        f"{walk.tokens_html(tokens, _attributes(tokens, surprisal, expected), _MAX_HTML_BYTES)}{walk.DESCRIPTION}"
        f"<h3>Next token</h3>{_next_tokens(following)}"
        f"<h3>Most likely next token after each layer</h3>{_lens(tokens, predicted, probabilities)}"
    )
    return Page(title, body, style=walk.STYLE + tables.STYLE + _STYLE, script=walk.SCRIPT + walk.SHOW_TITLE)


def _colour(bits: float) -> str:
    share = 0 if np.isnan(bits) else min(1.0, bits / _MAX_BITS)
    return f"background:color-mix(in srgb,var(--c1) {round(60 * share)}%,transparent)"


def _attributes(tokens: Sequence[str], surprisal: Floats, expected: Sequence[Expected]) -> list[str]:
    """The colour and the title of each token."""
    rows = enumerate(zip(tokens, surprisal.tolist(), expected, strict=True))
    return [
        f' style="{_colour(bits)}" title="{escape(_description(at, token, bits, likely))}"'
        for at, (token, bits, likely) in rows
    ]


def _description(at: int, token: str, bits: float, likely: Expected) -> str:
    name = f"token {at}, {visible(token, spaces=True)}"
    if not likely:
        return f"{name}: the first token, not predicted"
    expected = ", ".join(f"{visible(each, spaces=True)} {percent(probability)}" for each, probability in likely)
    return f"{name}: {bits:.1f} bits; expected {expected}"


def _next_tokens(following: Expected) -> str:
    rows = (
        (str(rank), text_html(token, spaces=True), f"{probability:.2%}", bar(12 * probability))
        for rank, (token, probability) in enumerate(following)
    )
    return table(("rank", "token", "probability", ""), rows)


def _lens(tokens: Sequence[str], predicted: Sequence[Sequence[str]], probabilities: Floats) -> str:
    """A table with a row for each layer, the last at the top, and a column for each of the last t tokens."""
    time = probabilities.shape[1]
    header = ("", *(text_html(token, spaces=True) for token in tokens[-time:]))
    names = ["embedding", *(f"layer {layer}" for layer in range(len(predicted) - 1))]
    rows = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(_cell(predicted[row][at], float(probabilities[row, at])) for at in range(time))
        + "</tr>"
        for row, name in reversed(list(enumerate(names)))
    )
    note = f'<p class="note">After each of the last {time} tokens; a stronger colour is a higher probability.</p>'
    return f'{note}<div class="scroll lens"><table><thead>{head(header)}</thead><tbody>{rows}</tbody></table></div>'


def _cell(token: str, probability: float) -> str:
    colour = f"background:color-mix(in srgb,var(--c0) {round(65 * probability)}%,transparent)"
    return f'<td style="{colour}" title="{percent(probability)}">{text_html(token, spaces=True)}</td>'
