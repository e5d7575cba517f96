"""A text with coloured tokens, and a table of token counts.

The page contains everything as text, so it is complete without JavaScript. The script only shows the details of a token
below the text for the pointer or the keyboard.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise

from falcon_kit.display.page import Page, direction, static_text, text_html, visible
from falcon_kit.inspection.token import Token
from falcon_kit.inspection.views import tables, walk
from falcon_kit.inspection.views.tables import MAX_ROWS, bar, fitting, head, tokens_table

_MAX_HTML_BYTES = 800_000  # for the tokens; the page stays below a megabyte
_MAX_CHARACTERS = 64  # of one token
_MAX_LOST = 8  # lost characters in the note
_INVALID = re.compile("([\udc80-\udcff]+)")  # bytes that are no character, as "surrogateescape" decodes them

_STYLE = static_text(__file__, "tokens.css")


def tokens_page(title: str, text: str, tokens: Sequence[Token], lost: Mapping[int, bytes]) -> Page:
    """The page of a text. lost: bytes that are in no token, by the position of their character."""
    count, pieces = len(tokens), fitting(_grouped(text, tokens, lost), _MAX_HTML_BYTES)
    cut = f'<p class="note">The first {len(pieces):,} of {count:,} tokens.</p>' if len(pieces) < count else ""
    body = (
        f"{_notes(text, tokens, lost)}"
        f'<div class="tokens" dir="{direction(text)}">{"".join(pieces)}</div>{cut}'
        f"{walk.DESCRIPTION}"
        f"<details><summary>Tokens as a table</summary>{_table(tokens)}</details>"
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


def _token(at: int, token: Token) -> str:
    description = escape(_description(at, token))
    kind = f"t{at % 4} special" if token.special else f"t{at % 4}"
    return f'<span tabindex="{-1 if at else 0}" class="{kind}" title="{description}">{_content(token.bytes)}</span>'


def _description(at: int, token: Token) -> str:
    part, special = "part of " if token.partial else "", ", special" if token.special else ""
    name = visible(_short(token.text), spaces=True)
    return f"token {at}, {part}{name}: id {token.id}{special}; {_hex(token.bytes)}; {_characters(token)} of the text"


def _short(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…"


def _hex(data: bytes) -> str:
    return f"{'byte' if len(data) == 1 else 'bytes'} {data[:24].hex(' ').upper()}{' …' if len(data) > 24 else ''}"


def _characters(token: Token) -> str:
    first, last = token.span[0], token.span[1] - 1
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


def _grouped(text: str, tokens: Sequence[Token], lost: Mapping[int, bytes]) -> Iterator[list[str]]:
    """The HTML of the tokens in groups. The tokens of a split character are one group, in a box.

    Lost characters are marked between the tokens.
    """
    first, spans = 0, [token.span for token in tokens]
    while first < len(spans):
        end = first + 1
        while end < len(spans) and spans[end][0] < spans[end - 1][1]:
            end += 1
        before = range(spans[first - 1][1] if first else 0, spans[first][0])
        group = [_token(at, tokens[at]) for at in range(first, end)]
        if end - first > 1:
            group[0] = f'<b class="split">{_split_characters(text, tokens[first:end])} {group[0]}'
            group[-1] += "</b>"
        group[0] = f"<wbr>{_lost_characters(text, before, lost)}{group[0]}"
        if end == len(spans):
            group[-1] += _lost_characters(text, range(spans[-1][1], len(text)), lost)
        group[-1] += "<br>" if text[spans[end - 1][1] - 1] == "\n" else ""
        yield group
        first = end


def _split_characters(text: str, tokens: Sequence[Token]) -> str:
    """The characters that are split over these tokens."""
    shared = dict.fromkeys(token.span[0] for token in tokens[1:])
    return text_html("".join(text[at] for at in shared))


def _lost_characters(text: str, places: range, lost: Mapping[int, bytes]) -> str:
    characters = "".join(text[at] for at in places if at in lost)[:_MAX_CHARACTERS]
    return f'<del title="in no token">{text_html(characters)}</del>' if characters else ""


def _notes(text: str, tokens: Sequence[Token], lost: Mapping[int, bytes]) -> str:
    """Explains the boxes, and names lost characters."""
    notes = []
    if any(after.span[0] < before.span[1] for before, after in pairwise(tokens)):
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


def _table(tokens: Sequence[Token]) -> str:
    rows = [
        (str(at), _text(_short(token.text)), str(token.id), escape(_hex(token.bytes)), _characters(token))
        for at, token in enumerate(tokens[:MAX_ROWS])
    ]
    return tokens_table(("position", "token", "id", "bytes", "characters"), rows, len(tokens))
