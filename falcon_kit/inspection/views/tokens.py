"""A text with coloured tokens, and a table of token counts.

The page contains everything as text, so it is complete without JavaScript. The script only shows the details of a token
below the text for the pointer or the keyboard.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise

from falcon_kit.display.page import Page, direction, static_text, text_html, visible
from falcon_kit.inspection.views import tables, walk
from falcon_kit.inspection.views.tables import MAX_ROWS, bar, fitting, head, tokens_table

Span = tuple[int, int]
"""Character offsets: the first character, and the one after the last."""

_MAX_HTML_BYTES = 800_000  # for the tokens; the page stays below a megabyte
_MAX_CHARACTERS = 64  # of one token
_MAX_LOST = 8  # lost characters in the note
_INVALID = re.compile("([\udc80-\udcff]+)")  # bytes that are no character, as "surrogateescape" decodes them

_STYLE = static_text(__file__, "tokens.css")


def tokens_page(
    title: str,
    text: str,
    ids: Sequence[int],
    data: Sequence[bytes],
    spans: Sequence[Span],
    special: Sequence[bool],
    lost: Mapping[int, bytes],
) -> Page:
    """The page of a text of T tokens: their ids, bytes, spans, and whether each is special.

    lost: bytes that are in no token, by the position of their character.
    """
    spans_html = [_token(at, text, ids[at], data[at], spans[at], special[at]) for at in range(len(ids))]
    pieces = fitting(_grouped(text, spans_html, spans, lost), _MAX_HTML_BYTES)
    cut = f'<p class="note">The first {len(pieces):,} of {len(ids):,} tokens.</p>' if len(pieces) < len(ids) else ""
    body = (
        f"{_notes(text, spans, lost)}"
        f'<div class="tokens" dir="{direction(text)}">{"".join(pieces)}</div>{cut}'
        f"{walk.DESCRIPTION}"
        f"<details><summary>Tokens as a table</summary>{_table(text, ids, data, spans)}</details>"
    )
    script = f"{walk.SCRIPT}current = 0;{walk.SHOW_TITLE}"
    return Page(title, body, style=walk.STYLE + _STYLE, script=script)


def comparison_page(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], bars: Sequence[float]) -> Page:
    """A table with a bar at the end of each row: `bars` from 0 to 1."""
    header_html = head([escape(name) for name in (*header, "")])
    body = "".join(
        f'<tr><th scope="row">{text_html(row[0])}</th>'
        + "".join(f'<td class="number">{text_html(cell)}</td>' for cell in row[1:])
        + f'<td class="bars">{bar(10 * share)}</td></tr>'
        for row, share in zip(rows, bars, strict=True)
    )
    body = f"<table><thead>{header_html}</thead><tbody>{body}</tbody></table>"
    return Page(title, body, style=tables.STYLE + _STYLE)


def _token(at: int, text: str, number: int, data: bytes, span: Span, special: bool) -> str:
    description = escape(_description(at, text, number, data, span, special))
    kind = f"t{at % 4} special" if special else f"t{at % 4}"
    return f'<span tabindex="{-1 if at else 0}" class="{kind}" title="{description}">{_content(data)}</span>'


def _description(at: int, text: str, number: int, data: bytes, span: Span, special: bool) -> str:
    part = "" if data == text[slice(*span)].encode() else "part of "
    name = visible(_short(text, span), spaces=True)
    return (
        f"token {at}, {part}{name}: id {number}{', special' if special else ''}; {_hex(data)}; "
        f"{_characters(span)} of the text"
    )


def _short(text: str, span: Span) -> str:
    shown = text[span[0] : min(span[1], span[0] + _MAX_CHARACTERS)]
    return shown if span[1] - span[0] <= _MAX_CHARACTERS else f"{shown}…"


def _hex(data: bytes) -> str:
    return f"{'byte' if len(data) == 1 else 'bytes'} {data[:24].hex(' ').upper()}{' …' if len(data) > 24 else ''}"


def _characters(span: Span) -> str:
    first, last = span[0], span[1] - 1
    return f"character {first}" if first == last else f"characters {first} to {last}"


def _content(data: bytes) -> str:
    """The content of a token as HTML: whole characters as text, parts of a character as bytes."""
    parts = _INVALID.split(data.decode(errors="surrogateescape"))  # parts with an odd index are bytes
    shown = (
        f"<code>{part.encode(errors='surrogateescape').hex(' ').upper()}</code>" if at % 2 else _text(part)
        for at, part in enumerate(parts)
        if part
    )
    return "".join(shown)


def _text(text: str) -> str:
    return text_html(text, spaces=True)


def _grouped(
    text: str, spans_html: Sequence[str], spans: Sequence[Span], lost: Mapping[int, bytes]
) -> Iterator[list[str]]:
    """The HTML of the tokens in groups. The tokens of a split character are one group, in a box.

    Lost characters are marked between the tokens.
    """
    first = 0
    while first < len(spans):
        end = first + 1
        while end < len(spans) and spans[end][0] < spans[end - 1][1]:
            end += 1
        before = range(spans[first - 1][1] if first else 0, spans[first][0])
        group = list(spans_html[first:end])
        if end - first > 1:
            group[0] = f'<b class="split">{_split_characters(text, spans[first:end])} {group[0]}'
            group[-1] += "</b>"
        group[0] = f"<wbr>{_lost_characters(text, before, lost)}{group[0]}"
        if end == len(spans):
            group[-1] += _lost_characters(text, range(spans[-1][1], len(text)), lost)
        group[-1] += "<br>" if text[spans[end - 1][1] - 1] == "\n" else ""
        yield group
        first = end


def _split_characters(text: str, spans: Sequence[Span]) -> str:
    """The characters that are split over the tokens of these spans."""
    shared = dict.fromkeys(span[0] for span in spans[1:])
    return text_html("".join(text[at] for at in shared))


def _lost_characters(text: str, places: range, lost: Mapping[int, bytes]) -> str:
    characters = "".join(text[at] for at in places if at in lost)[:_MAX_CHARACTERS]
    return f'<del title="in no token">{text_html(characters)}</del>' if characters else ""


def _notes(text: str, spans: Sequence[Span], lost: Mapping[int, bytes]) -> str:
    """Explains the boxes, and names lost characters."""
    notes = []
    if any(after[0] < before[1] for before, after in pairwise(spans)):
        notes.append(
            "A box contains a character that is split over several tokens: first the character, then its bytes."
        )
    if lost:
        some = ", ".join(
            f"U+{ord(text[at]):04X} at character {at} ({_hex(data)})" for at, data in list(lost.items())[:_MAX_LOST]
        )
        more = f" and {len(lost) - _MAX_LOST:,} more" if len(lost) > _MAX_LOST else ""
        notes.append(f"The vocabulary has no token for some bytes, so the model does not get them: {some}{more}.")
    return "".join(f'<p class="note">{note}</p>' for note in notes)


def _table(text: str, ids: Sequence[int], data: Sequence[bytes], spans: Sequence[Span]) -> str:
    rows = [
        (str(at), _text(_short(text, spans[at])), str(ids[at]), escape(_hex(data[at])), _characters(spans[at]))
        for at in range(min(MAX_ROWS, len(ids)))
    ]
    return tokens_table(("position", "token", "id", "bytes", "characters"), rows, len(ids))
