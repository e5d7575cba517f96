"""HTML tables of a page."""

from collections.abc import Iterable, Sequence

from falcon_kit.display.page import static_text

STYLE = static_text(__file__, "tables.css")
MAX_ROWS = 120
"""Rows of a table of tokens; a longer text is cut."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead>{head(header)}</thead><tbody>{body}</tbody></table>"


def head(header: Sequence[str]) -> str:
    """The header row of a table, from HTML."""
    cells = "".join(f'<th scope="col">{name}</th>' for name in header)
    return f"<tr>{cells}</tr>"


def bar(width: float) -> str:
    """A horizontal bar, `width` em wide."""
    return f'<span class="bar" style="width:{width:.2f}em"></span>'


def fitting(groups: Iterable[Sequence[str]], room: int) -> list[str]:
    """The pieces of as many groups of HTML as fit into `room` bytes."""
    pieces: list[str] = []
    for group in groups:
        room -= sum(len(piece.encode()) for piece in group)
        if room < 0:
            break
        pieces += group
    return pieces


def tokens_table(header: Sequence[str], rows: Sequence[Sequence[str]], count: int) -> str:
    """A scrolling table of the first of `count` tokens, with a note if there are more."""
    note = f'<p class="note">The first {len(rows)} of {count:,} tokens.</p>' if count > len(rows) else ""
    return f'<div class="scroll">{table(header, rows)}</div>{note}'
