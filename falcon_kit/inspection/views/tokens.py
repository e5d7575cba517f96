"""A text with each of its tokens in a colour, and texts compared by what their tokens cost.

Everything stands in the page as text, so it reads without JavaScript; the script only repeats what belongs to a token
below the text when one points at it, or goes there by keyboard.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise

from falcon_kit.display.page import Page, direction, text_html, visible
from falcon_kit.inspection.views import walk

Span = tuple[int, int]
"""Characters of the text: the first, and the one after the last."""

_ROOM = 800_000  # bytes of HTML for the tokens, so that the page stays below a megabyte
_ROWS = 120  # rows of the table
_LONG = 64  # characters of one token that are told
_NAMED = 8  # lost characters that are named
_INVALID = re.compile("([\udc80-\udcff]+)")  # bytes that are no character, as "surrogateescape" decodes them

_STYLE = """
  & .tokens span { padding: .15em 1px; }
  & .t0 { background: color-mix(in srgb, var(--c0) 30%, transparent); }
  & .t1 { background: color-mix(in srgb, var(--c1) 35%, transparent); }
  & .t2 { background: color-mix(in srgb, var(--c2) 30%, transparent); }
  & .t3 { background: color-mix(in srgb, var(--c3) 35%, transparent); }
  & .special { font-weight: bold; box-shadow: inset 0 -2px currentColor; }
  & b.split { font-weight: normal; border: 1px dashed var(--dim); border-radius: 4px; padding: .15em 2px; }
  & b.split:hover, & b.split:focus-within { border-style: solid; }
  & b.split span code { font-size: .8em; background: none; border: 0; padding: 0; }
  & del { text-decoration: line-through; color: var(--c5); }
  & .says { min-height: 3em; }
  & .bar { display: inline-block; height: .8em; background: var(--c0); vertical-align: middle; }
  & tr td.bars { text-align: left; }
  & td.number { text-align: right; font-variant-numeric: tabular-nums; }
"""

_SCRIPT = """
here = 0;
if (tokens.length) walk(() => { root.querySelector(".says").textContent = tokens[here].title; });
"""


def tokens_page(
    title: str,
    text: str,
    ids: Sequence[int],
    data: Sequence[bytes],
    spans: Sequence[Span],
    special: Sequence[bool],
    lost: Mapping[int, bytes],
) -> Page:
    """The view of a text of T tokens: their ids, bytes, spans, and whether each is special.

    lost: bytes that no token holds, by the character of the text they belong to.
    """
    shown = [_token(at, text, ids[at], data[at], spans[at], special[at]) for at in range(len(ids))]
    pieces = _fitting(_arranged(text, shown, spans, lost))
    cut = f'<p class="note">The first {len(pieces):,} of {len(ids):,} tokens.</p>' if len(pieces) < len(ids) else ""
    body = (
        f"{_notes(text, spans, lost)}"
        f'<div class="tokens" dir="{direction(text)}">{"".join(pieces)}</div>{cut}'
        '<p class="says" aria-live="polite"></p>'
        f"<details><summary>Tokens as a table</summary>{_table(text, ids, data, spans)}</details>"
    )
    return Page(title, body, style=walk.STYLE + _STYLE, script=walk.SCRIPT + _SCRIPT)


def comparison_page(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], bars: Sequence[float]) -> Page:
    """A table whose rows end with a bar: `bars` from 0 to 1."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in (*header, ""))
    body = "".join(
        f'<tr><th scope="row">{text_html(row[0])}</th>'
        + "".join(f'<td class="number">{text_html(cell)}</td>' for cell in row[1:])
        + f'<td class="bars"><span class="bar" style="width:{10 * bar:.2f}em"></span></td></tr>'
        for row, bar in zip(rows, bars, strict=True)
    )
    return Page(title, f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", style=_STYLE)


def _token(at: int, text: str, number: int, data: bytes, span: Span, special: bool) -> str:
    says = escape(_says(at, text, number, data, span, special))
    kind = f"t{at % 4} special" if special else f"t{at % 4}"
    return f'<span tabindex="{-1 if at else 0}" class="{kind}" title="{says}">{_held(data)}</span>'


def _says(at: int, text: str, number: int, data: bytes, span: Span, special: bool) -> str:
    """What belongs to a token, in words."""
    part = "" if data == text[slice(*span)].encode() else "part of "
    name = visible(_short(text, span), spaces=True)
    return (
        f"token {at}, {part}{name}: id {number}{', special' if special else ''}; {_hex(data)}; "
        f"{_characters(span)} of the text"
    )


def _short(text: str, span: Span) -> str:
    held = text[span[0] : min(span[1], span[0] + _LONG)]
    return held if span[1] - span[0] <= _LONG else f"{held}…"


def _hex(data: bytes) -> str:
    return f"{'byte' if len(data) == 1 else 'bytes'} {data[:24].hex(' ').upper()}{' …' if len(data) > 24 else ''}"


def _characters(span: Span) -> str:
    first, last = span[0], span[1] - 1
    return f"character {first}" if first == last else f"characters {first} to {last}"


def _held(data: bytes) -> str:
    """What a token holds: characters as such, parts of one as bytes."""
    parts = _INVALID.split(data.decode(errors="surrogateescape"))  # odd ones are bytes
    shown = (
        f"<code>{part.encode(errors='surrogateescape').hex(' ').upper()}</code>" if at % 2 else _text(part)
        for at, part in enumerate(parts)
        if part
    )
    return "".join(shown)


def _text(text: str) -> str:
    return text_html(text, spaces=True)


def _arranged(text: str, shown: Sequence[str], spans: Sequence[Span], lost: Mapping[int, bytes]) -> Iterator[list[str]]:
    """The tokens in groups, those of a character that is split over several in one box; with marks for what is lost.

    Each group is a list of HTML, one for each of its tokens.
    """
    first = 0
    while first < len(spans):
        end = first + 1
        while end < len(spans) and spans[end][0] < spans[end - 1][1]:
            end += 1
        before = range(spans[first - 1][1] if first else 0, spans[first][0])
        group = list(shown[first:end])
        if end - first > 1:
            group[0] = f'<b class="split">{_whole(text, spans[first:end])} {group[0]}'
            group[-1] += "</b>"
        group[0] = f"<wbr>{_gone(text, before, lost)}{group[0]}"
        if end == len(spans):
            group[-1] += _gone(text, range(spans[-1][1], len(text)), lost)
        group[-1] += "<br>" if text[spans[end - 1][1] - 1] == "\n" else ""
        yield group
        first = end


def _whole(text: str, spans: Sequence[Span]) -> str:
    """The characters that are split over these tokens."""
    shared = dict.fromkeys(span[0] for span in spans[1:])
    return text_html("".join(text[at] for at in shared))


def _gone(text: str, places: range, lost: Mapping[int, bytes]) -> str:
    gone = "".join(text[at] for at in places if at in lost)[:_LONG]
    return f'<del title="in no token">{text_html(gone)}</del>' if gone else ""


def _fitting(groups: Iterator[list[str]]) -> list[str]:
    """Tokens of as many groups as there is room for."""
    pieces: list[str] = []
    room = _ROOM
    for group in groups:
        room -= sum(len(piece.encode()) for piece in group)
        if room < 0:
            break
        pieces += group
    return pieces


def _notes(text: str, spans: Sequence[Span], lost: Mapping[int, bytes]) -> str:
    """What a reader should know before looking."""
    notes = []
    if any(after[0] < before[1] for before, after in pairwise(spans)):
        notes.append("A box holds a character that is split over several tokens: first whole, then byte by byte.")
    if lost:
        some = ", ".join(
            f"U+{ord(text[at]):04X} at character {at} ({_hex(gone)})" for at, gone in list(lost.items())[:_NAMED]
        )
        more = f" and {len(lost) - _NAMED:,} more" if len(lost) > _NAMED else ""
        notes.append(f"The vocabulary has no token for some bytes, and the model never sees them: {some}{more}.")
    return "".join(f'<p class="note">{note}</p>' for note in notes)


def _table(text: str, ids: Sequence[int], data: Sequence[bytes], spans: Sequence[Span]) -> str:
    rows = "".join(
        f"<tr><td>{at}</td><td>{_text(_short(text, spans[at]))}</td><td>{ids[at]}</td>"
        f"<td>{escape(_hex(data[at]))}</td><td>{_characters(spans[at])}</td></tr>"
        for at in range(min(_ROWS, len(ids)))
    )
    more = f'<p class="note">The first {_ROWS} of {len(ids):,} tokens.</p>' if len(ids) > _ROWS else ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("position", "token", "id", "bytes", "characters"))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{more}'
