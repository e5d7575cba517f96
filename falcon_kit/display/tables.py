"""Byte counts as text, and HTML tables."""

from collections.abc import Iterable, Sequence
from html import escape

from falcon_kit.display.errors import printable


def format_bytes(count: float) -> str:
    """A byte count in binary units with at least three digits: 122880 is "120 KiB", 4026531840 is "3.75 GiB"."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1023.5 and len(units) > 1:
        value /= 1024
        del units[0]
    digits = 0 if units[0] == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {units[0]}"


def html_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table with escaped text and visible control characters.

    It sets no colours, so that light and dark themes can both display it.
    """
    left = ' style="text-align: left"'
    head = "".join(f'<th scope="col"{left}>{_cell(text)}</th>' for text in header)
    body = "".join(
        f'<tr><th scope="row"{left}>{_cell(first)}</th>'
        + "".join(f"<td{left}>{_cell(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    head_row = f"<thead><tr>{head}</tr></thead>" if header else ""
    return f"<table><caption{left}>{_cell(title)}</caption>{head_row}<tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    return escape(printable(str(value), keep="\n"))
