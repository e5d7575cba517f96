"""Linked attention: heads as thumbnails with one large, and a text in which each token shows what it looks at.

A view holds at most a megabyte, however long the text: thumbnails are small pictures, and of each token's row only the
strongest weights are kept, as many as there is room for. Without JavaScript the thumbnails, the large map and a table
of what tokens look at remain.

Shapes: T time, K weights kept per token, C maps (heads, and means over KV groups).
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

Floats = NDArray[np.floating[Any]]
Row = Mapping[str, tuple[str, Floats]]
"""Maps by their full names, each with the short one that stands below its thumbnail."""

_LINKS = 440_000  # bytes for the weights, in base64
_PICTURES = 280_000  # bytes for the thumbnails, in base64
_SIDES = (256, 128, 96, 64, 48, 32, 16)  # cells a side of a thumbnail: the largest that fits
_MOST = 64  # weights kept per token at most: nobody looks at more
_ROWS = 120  # rows of the table without JavaScript

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
  & .says { min-height: 3em; }
  & .says code { white-space: pre; background: var(--faint); border-radius: 3px; }
"""

# For each map the data has `at`, 16-bit positions of the K strongest keys of each query, and `by`, their weights in
# 255ths, both (T, K) in base64. Only the tokens that were lit are cleared, so that a long text stays quick.
_SCRIPT = r"""
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const maps = data.maps.map(map => ({at: new Uint16Array(bytes(map.at).buffer), by: bytes(map.by), name: map.name}));
const buttons = [...root.querySelectorAll(".heads button")];
const large = root.querySelector(".large"), says = root.querySelector(".says"), K = data.kept;
let shown = 0, lit = [];
const percent = share => (share < .01 ? "<1" : Math.round(100 * share)) + "%";
function quote(token) {
  const mark = document.createElement("code");
  mark.append(...[...token.childNodes].map(node => node.cloneNode(true)));
  return mark;
}
function look() {
  for (const token of lit) token.style.background = "";
  const map = maps[shown], found = [];
  for (let k = here * K; k < (here + 1) * K; k++)
    if (map.by[k]) found.push([map.at[k], map.by[k] / 255]);
  lit = found.map(([at, share]) => {
    tokens[at].style.background = `color-mix(in srgb, var(--c1) ${Math.round(15 + 75 * share)}%, transparent)`;
    return tokens[at];
  });
  const most = found.sort((a, b) => b[1] - a[1]).slice(0, 5);
  says.replaceChildren(`${map.name}: token ${here}, `, quote(tokens[here]), " looks at ");
  most.forEach(([at, share], index) => says.append(index ? ", " : "", quote(tokens[at]), ` ${at} (${percent(share)})`));
  if (!most.length) says.append("nothing in particular: its weights are too even to show");
}
function choose(index) {
  shown = index;
  buttons.forEach((button, at) => button.setAttribute("aria-pressed", at === index));
  const small = buttons[index].querySelector("img"), big = large.querySelector("img");
  big.src = small.src;
  big.alt = small.alt;
  large.querySelector("figcaption").textContent = maps[index].name;
  look();
}
buttons.forEach((button, index) => {
  button.disabled = false;
  button.addEventListener("click", () => choose(index));
});
root.querySelector(".hint").hidden = false;
walk(look);
choose(0);
"""


def attention_page(title: str, words: Sequence[str], rows: Mapping[str, Row]) -> Page:
    """The view of a text of T `words` and of maps (T, T), in rows under their names: the KV groups.

    Raises ValueError for no maps, or more than a megabyte holds.
    """
    maps = {name: each for row in rows.values() for name, (_, each) in row.items()}
    kept = _kept(len(maps), len(words))
    if not (maps and kept):
        raise ValueError(
            f"a view of {len(maps)} maps over {len(words)} tokens cannot be: give at least one, at most "
            f"{_LINKS // (4 * len(words))}, or a shorter text"
        )
    pictures = dict(zip(maps, _pictures(list(maps.values())), strict=True))
    data = {"kept": kept, "maps": [{"name": name, **_strongest(each, kept)} for name, each in maps.items()]}
    first, found = next(iter(maps.items()))
    body = (
        f'<div class="heads">{"".join(_row(name, row, pictures) for name, row in rows.items())}</div>'
        f'<div class="both"><figure class="large" style="margin:0">{_image(first, pictures[first])}'
        f"<figcaption>{escape(first)}</figcaption>"
        '<p class="note">Rows are the tokens that look, columns the tokens looked at; brighter is more.</p></figure>'
        f'<div class="text">{walk.tokens_html(words)}<p class="says" aria-live="polite"></p>'
        f'<p class="note hint" hidden>Point at a token, or go there with the arrow keys: what it looks at lights up '
        f"({_strength(kept, len(words))}). A thumbnail chooses the head.</p></div></div>"
        f"<details><summary>What tokens look at, {escape(first)}, as a table</summary>{_table(words, found)}</details>"
    )
    return Page(title, body, style=walk.STYLE + _STYLE, script=walk.SCRIPT + _SCRIPT, data=data)


def _kept(maps: int, time: int) -> int:
    """Weights of each token for which there is room: three bytes each, four in base64."""
    return min(time, _MOST, _LINKS // (4 * maps * time)) if maps else 0


def _strength(kept: int, time: int) -> str:
    return "all of it" if kept >= time else f"its {kept} strongest weights"


def _strongest(found: Floats, kept: int) -> dict[str, str]:
    """The `kept` strongest keys of each query, and their weights in 255ths, in base64."""
    at = np.argpartition(-found, kept - 1, axis=1)[:, :kept]
    by = np.round(255 * np.take_along_axis(found, at, axis=1).clip(0, 1))
    return {"at": b64encode(at.astype("<u2").tobytes()).decode(), "by": b64encode(by.astype("u1").tobytes()).decode()}


def _pictures(maps: list[Floats]) -> list[str]:
    """Each map as a data URL, with as many cells as there is room for."""
    for side in _SIDES:
        found = [_png(pool(each, side)) for each in maps]
        if sum(map(len, found)) <= _PICTURES:
            break
    return found


def _png(found: Floats) -> str:
    """A map in viridis on a square-root scale, since most weights are small."""
    from matplotlib import colormaps
    from PIL import Image

    palette = (colormaps["viridis"](np.arange(256), bytes=True))[:, :3]
    picture = Image.fromarray(np.round(255 * np.sqrt(found.clip(0, 1))).astype(np.uint8), mode="P")
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


def _table(words: Sequence[str], found: Floats) -> str:
    """What the first tokens look at most, for readers without JavaScript."""
    rows = "".join(
        f"<tr><td>{at}</td><td>{text_html(word, spaces=True)}</td><td>{_most(words, found[at])}</td></tr>"
        for at, word in enumerate(words[:_ROWS])
    )
    more = f'<p class="note">The first {_ROWS} of {len(words)} tokens.</p>' if len(words) > _ROWS else ""
    head = '<tr><th scope="col">position</th><th scope="col">token</th><th scope="col">looks at</th></tr>'
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>{more}'


def _most(words: Sequence[str], row: Floats) -> str:
    best = [at for at in np.argsort(-row)[:3].tolist() if row[at] >= 0.005]
    return ", ".join(f"{text_html(words[at], spaces=True)} {at} ({row[at]:.0%})" for at in best)
