"""Attention maps linked to the text: thumbnails of heads, one large map, and tokens that show what they attend to.

A page has at most a megabyte, whatever the length of the text: thumbnails are small images, and only the largest
attention probabilities of each token are kept, as many as fit. Without JavaScript the page shows the thumbnails, the
large map and a table of attended tokens.

Shapes: T time, K probabilities kept per token.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from falcon_kit.display.page import Page, text_html
from falcon_kit.inspection.plots.attention import pool
from falcon_kit.inspection.views import walk
from falcon_kit.inspection.views.tables import MAX_ROWS, tokens_table

Floats = NDArray[np.floating[Any]]
Row = Mapping[str, tuple[str, Floats]]
"""Maps by their full names, each with the short name below its thumbnail."""

_WEIGHT_BYTES = 440_000  # for the attention probabilities, in base64
_THUMBNAIL_BYTES = 280_000  # for the thumbnails, in base64
_THUMBNAIL_SIDES = (256, 128, 96, 64, 48, 32, 16)  # cells; the largest that fits is used
_MAX_KEPT = 64  # probabilities kept per token

_STYLE = """
  & .heads { display: grid; gap: .4em; overflow: auto; justify-content: start; max-height: 24em; padding: 4px; }
  & .heads > div { display: flex; gap: .4em; align-items: center; }
  & .heads .name { width: 11em; flex: none; }
  & .heads button { padding: .2em; line-height: 1.2; font-size: .8em; }
  & .heads button[aria-pressed=true] { outline: 3px solid var(--c5); }
  & img { display: block; image-rendering: pixelated; background: #440154; }
  & .heads img { width: 72px; height: 72px; }
  & .large img { width: min(100%, 420px); aspect-ratio: 1; }
  & .both { display: flex; flex-wrap: wrap; gap: 1.2em; margin-top: 1em; }
  & .text { flex: 1 1 22em; min-width: 0; }
  & .description code { white-space: pre; background: var(--faint); border-radius: 3px; }
"""

# For each map the data has `keys`, 16-bit positions of the K largest probabilities of each query, and `weights`, these
# probabilities in 255ths, both (T, K) in base64. Only the coloured tokens are cleared, for speed in long texts.
_SCRIPT = r"""
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const maps = data.maps.map(map => (
  {keys: new Uint16Array(bytes(map.keys).buffer), weights: bytes(map.weights), name: map.name}
));
const buttons = [...root.querySelectorAll(".heads button")];
const large = root.querySelector(".large"), description = root.querySelector(".description"), K = data.kept;
let shown = 0, coloured = [];
const percent = share => (share < .01 ? "<1" : Math.round(100 * share)) + "%";
function quote(token) {
  const mark = document.createElement("code");
  mark.append(...[...token.childNodes].map(node => node.cloneNode(true)));
  return mark;
}
function showAttention() {
  for (const token of coloured) token.style.background = "";
  const map = maps[shown], found = [];
  for (let k = current * K; k < (current + 1) * K; k++)
    if (map.weights[k]) found.push([map.keys[k], map.weights[k] / 255]);
  coloured = found.map(([at, share]) => {
    tokens[at].style.background = `color-mix(in srgb, var(--c1) ${Math.round(15 + 75 * share)}%, transparent)`;
    return tokens[at];
  });
  const top = found.sort((a, b) => b[1] - a[1]).slice(0, 5);
  description.replaceChildren(`${map.name}: token ${current}, `, quote(tokens[current]), " attends to ");
  top.forEach(([at, share], index) =>
    description.append(index ? ", " : "", quote(tokens[at]), ` ${at} (${percent(share)})`));
  if (!top.length) description.append("no token with more than 0.2%");
}
function selectMap(index) {
  shown = index;
  buttons.forEach((button, at) => button.setAttribute("aria-pressed", at === index));
  const small = buttons[index].querySelector("img"), big = large.querySelector("img");
  big.src = small.src;
  big.alt = small.alt;
  large.querySelector("figcaption").textContent = maps[index].name;
  showAttention();
}
buttons.forEach((button, index) => {
  button.disabled = false;
  button.addEventListener("click", () => selectMap(index));
});
root.querySelector(".hint").hidden = false;
walk(showAttention);
selectMap(0);
"""


def attention_page(title: str, tokens: Sequence[str], rows: Mapping[str, Row]) -> Page:
    """The page of a text of T tokens and of maps (T, T). `rows` are the rows of thumbnails, one for each KV group.

    Raises ValueError for no maps, or for more than fit into a megabyte.
    """
    maps = {name: each for row in rows.values() for name, (_, each) in row.items()}
    kept = _count_kept(len(maps), len(tokens))
    if not (maps and kept):
        raise ValueError(
            f"a page of {len(maps)} maps over {len(tokens)} tokens is not possible: give at least one, at most "
            f"{_WEIGHT_BYTES // (4 * len(tokens))}, or a shorter text"
        )
    pictures = dict(zip(maps, _thumbnails(list(maps.values())), strict=True))
    data = {"kept": kept, "maps": [{"name": name, **_largest(each, kept)} for name, each in maps.items()]}
    first, found = next(iter(maps.items()))
    body = (
        f'<div class="heads">{"".join(_row(name, row, pictures) for name, row in rows.items())}</div>'
        f'<div class="both"><figure class="large" style="margin:0">{_image(first, pictures[first])}'
        f"<figcaption>{escape(first)}</figcaption>"
        '<p class="note">Rows are the attending tokens, columns the attended tokens; brighter is more.</p></figure>'
        f'<div class="text">{walk.tokens_html(tokens)}{walk.DESCRIPTION}'
        '<p class="note hint" hidden>Point at a token, or select it with the arrow keys: the tokens that it attends to '
        f"are coloured ({_selection(kept, len(tokens))}). A thumbnail selects the head.</p></div></div>"
        f"<details><summary>Attended tokens, {escape(first)}, as a table</summary>{_table(tokens, found)}</details>"
    )
    return Page(title, body, style=walk.STYLE + _STYLE, script=walk.SCRIPT + _SCRIPT, data=data)


def _count_kept(maps: int, time: int) -> int:
    """The number of probabilities per token that fit: three bytes each, four in base64."""
    return min(time, _MAX_KEPT, _WEIGHT_BYTES // (4 * maps * time)) if maps else 0


def _selection(kept: int, time: int) -> str:
    return "all of them" if kept >= time else f"the {kept} largest probabilities"


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
