"""Attention maps linked to the text: thumbnails of heads, one large map, and tokens that show what they attend to.

A page has at most a megabyte, whatever the length of the text: thumbnails are small images, and only the largest
attention probabilities of each token are kept, as many as fit. Without JavaScript the page shows the thumbnails, the
large map and a table of attended tokens.

Shapes: T time, K probabilities kept per token.
"""

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from falcon_kit.display.page import Page, static_text, text_html
from falcon_kit.inspection.plots.attention import pool
from falcon_kit.inspection.plots.labels import Floats
from falcon_kit.inspection.views import walk
from falcon_kit.inspection.views.tables import MAX_ROWS, tokens_table

Row = Mapping[str, tuple[str, Floats]]
"""Maps by their full names, each with the short name below its thumbnail."""

_WEIGHT_BYTES = 440_000  # for the attention probabilities, in base64
_THUMBNAIL_BYTES = 280_000  # for the thumbnails, in base64
_THUMBNAIL_SIDES = (256, 128, 96, 64, 48, 32, 16)  # cells; the largest that fits is used
_MAX_KEPT = 64  # probabilities kept per token

_STYLE = static_text(__file__, "attention.css")

# For each map the data has `keys`, 16-bit positions of the K largest probabilities of each query, and `weights`, these
# probabilities in 255ths, both (T, K) in base64. Only the coloured tokens are cleared, for speed in long texts.
_SCRIPT = static_text(__file__, "attention.js")


def attention_page(title: str, tokens: Sequence[str], rows: Mapping[str, Row]) -> Page:
    """The page of a text of T tokens and of maps (T, T). `rows` are the rows of thumbnails, one for each KV group.

    Raises ValueError for no maps, or for more than fit into a megabyte.
    """
    maps = {name: each for row in rows.values() for name, (_, each) in row.items()}
    time = len(tokens)
    kept = min(time, _MAX_KEPT, most_maps(time) // len(maps)) if maps else 0
    if not (maps and kept):
        raise ValueError(
            f"a page of {len(maps)} maps over {time} tokens is not possible: give at least one, at most "
            f"{most_maps(time)}, or a shorter text"
        )
    pictures = dict(zip(maps, _thumbnails(list(maps.values())), strict=True))
    data = {"kept": kept, "maps": [{"name": name, **_largest(each, kept)} for name, each in maps.items()]}
    first, found = next(iter(maps.items()))
    coloured = "all of them" if kept >= time else f"the {kept} largest probabilities"
    body = (
        f'<div class="heads">{"".join(_row(name, row, pictures) for name, row in rows.items())}</div>'
        f'<div class="both"><figure class="large" style="margin:0">{_image(first, pictures[first])}'
        f"<figcaption>{escape(first)}</figcaption>"
        '<p class="note">Rows are the attending tokens, columns the attended tokens; brighter is more.</p></figure>'
        f'<div class="text">{walk.tokens_html(tokens)}{walk.DESCRIPTION}'
        '<p class="note hint" hidden>Point at a token, or select it with the arrow keys: the tokens that it attends to '
        f"are coloured ({coloured}). A thumbnail selects the head.</p></div></div>"
        f"<details><summary>Attended tokens, {escape(first)}, as a table</summary>{_table(tokens, found)}</details>"
    )
    return Page(title, body, style=walk.STYLE + _STYLE, script=walk.SCRIPT + _SCRIPT, data=data)


def most_maps(time: int) -> int:
    """The largest number of maps of a text of T tokens that fits into a page.

    A probability takes three bytes, four in base64, and a map keeps at least one for each token.
    """
    return _WEIGHT_BYTES // (4 * time)


def _largest(probabilities: Floats, kept: int) -> dict[str, str]:
    """The keys with the `kept` largest probabilities of each query, and these probabilities in 255ths, in base64."""
    keys = np.argpartition(-probabilities, kept - 1, axis=1)[:, :kept]
    weights = np.round(255 * np.take_along_axis(probabilities, keys, axis=1).clip(0, 1))
    arrays = {"keys": keys.astype("<u2"), "weights": weights.astype("u1")}
    return {name: b64encode(array.tobytes()).decode() for name, array in arrays.items()}


def _thumbnails(maps: list[Floats]) -> list[str]:
    """Each map as a data URL, with as many cells as fit."""
    for side in _THUMBNAIL_SIDES:
        images = [_png(pool(each, side)) for each in maps]
        if sum(map(len, images)) <= _THUMBNAIL_BYTES:
            break
    return images


def _png(probabilities: Floats) -> str:
    """A map in viridis on a square-root scale, because most probabilities are small."""
    from matplotlib import colormaps
    from PIL import Image

    palette = (colormaps["viridis"](np.arange(256), bytes=True))[:, :3]
    picture = Image.fromarray(np.round(255 * np.sqrt(probabilities.clip(0, 1))).astype(np.uint8), mode="P")
    picture.putpalette(palette.tobytes())
    written = io.BytesIO()
    picture.save(written, "PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(written.getvalue()).decode()}"


def _row(name: str, row: Row, pictures: Mapping[str, str]) -> str:
    thumbnails = "".join(
        f'<button type="button" disabled aria-pressed="false" title="{escape(each)}">{_image(each, pictures[each])}'
        f"{escape(short)}</button>"
        for each, (short, _) in row.items()
    )
    return f'<div><span class="name note">{escape(name)}</span>{thumbnails}</div>'


def _image(name: str, source: str) -> str:
    return f'<img src="{source}" alt="attention map of {escape(name)}">'


def _table(tokens: Sequence[str], probabilities: Floats) -> str:
    """The most attended tokens of the first tokens, for readers without JavaScript."""
    rows = [
        (str(at), text_html(token, spaces=True), _most_attended(tokens, probabilities[at]))
        for at, token in enumerate(tokens[:MAX_ROWS])
    ]
    return tokens_table(("position", "token", "attends to"), rows, len(tokens))


def _most_attended(tokens: Sequence[str], row: Floats) -> str:
    best = [at for at in np.argsort(-row)[:3].tolist() if row[at] >= 0.005]
    return ", ".join(f"{text_html(tokens[at], spaces=True)} {at} ({row[at]:.0%})" for at in best)
