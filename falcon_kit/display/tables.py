"""Counts as text, byte counts alone and in a column of one unit, and HTML tables."""

from collections.abc import Iterable, Sequence
from html import escape

from falcon_kit.display.errors import printable

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 token", "2,048 tokens". plural: where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def format_bytes(count: float) -> str:
    """A byte count in binary units with at least three digits: 122880 is "120 KiB", 4026531840 is "3.75 GiB"."""
    value, units = float(count), list(_UNITS)
    while value >= 1023.5 and len(units) > 1:
        value /= 1024
        del units[0]
    digits = 0 if units[0] == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {units[0]}"


def byte_column(counts: Sequence[float]) -> list[str]:
    """Byte counts in the unit of the largest, so that a column can be added up: 1.5 GiB and 3 MiB are "1.50 GiB" and
    "< 0.01 GiB"."""
    unit = format_bytes(max(counts, default=0)).split()[1]
    size = 1024 ** _UNITS.index(unit)
    digits = 0 if unit == "B" else 2
    small = f"< {10**-digits:.{digits}f} {unit}"
    return [small if 0 < count < size / 10**digits else f"{count / size:.{digits}f} {unit}" for count in counts]


def html_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table with escaped text, the line breaks of each cell, and visible control characters.

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
    return escape(printable(str(value), keep="\n")).replace("\n", "<br>")
