"""Counts and byte counts as text, and HTML tables with escaped text."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.display.tables import byte_column, counted, format_bytes, html_table
from falcon_kit.evaluation.tasks import make_task

HOSTILE = "</td><img src=x onerror=alert(1)>"


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (122_880, "120 KiB"),
        (240 * 2**20, "240 MiB"),
        (4_026_531_840, "3.75 GiB"),
        (83_671_941_120, "77.9 GiB"),
        (2**20 - 1, "1.00 MiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_bytes_are_written_in_binary_units(count: int, expected: str) -> None:
    assert expected == format_bytes(count)


@given(st.integers(0, 2**50))
def test_written_bytes_can_be_read_back_to_half_a_percent(count: int) -> None:
    number, unit = format_bytes(count).split()

    assert float(number) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit) == pytest.approx(count, rel=5e-3)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([3 * 2**29, 3 * 2**20, 0], ["1.50 GiB", "< 0.01 GiB", "0.00 GiB"]),
        ([2**20, 2**19], ["1.00 MiB", "0.50 MiB"]),
        ([7, 0], ["7 B", "0 B"]),
        ([], []),
    ],
)
def test_a_column_of_bytes_has_the_unit_of_its_largest(counts: list[int], expected: list[str]) -> None:
    assert byte_column(counts) == expected


def test_headings_and_cells_are_escaped_in_tables() -> None:
    page = html_table(HOSTILE, (HOSTILE,), [(HOSTILE, HOSTILE)])
    assert ("<img" in page, page.count("&lt;img")) == (False, 4)


KINDS = "token|text|head|document|row|map|item|character|byte"
ONES = re.compile(rf"(?<![\w.,])1 (?:(?!of )[a-z]+[ -])*(?:{KINDS})s\b(?!/s)")
REPRS = {
    "tokens": lambda instruct: fk.tokens("a", instruct.tokenizer),
    "generation": lambda instruct: instruct.generate("a", max_new_tokens=1),
    "stats": lambda instruct: str(instruct.generate("a", max_new_tokens=1).stats),
    "documents": lambda instruct: fk.dialogues([{"text": "a"}]),
    "packed": lambda instruct: fk.pack(fk.dialogues([{"text": "a"}]), instruct),
    "attention": lambda instruct: fk.attention(instruct, "a", layers=[0], heads=[0]),
    "lens": lambda instruct: fk.lens(instruct, "a"),
    "ablation": lambda instruct: fk.ablate(instruct, "a", [(0, 0)]),
    "explanation": lambda instruct: fk.explain(instruct, "a"),
    "task": lambda instruct: make_task("one", [("row 1", {"question": "a", "answer": "b"})]),
}


@pytest.mark.parametrize("make", REPRS.values(), ids=REPRS)
def test_one_thing_of_a_kind_is_named_in_the_singular(instruct, make):
    assert not ONES.findall(str(make(instruct)))


@pytest.mark.parametrize(("number", "shown"), [(0, "0 tokens"), (1, "1 token"), (2048, "2,048 tokens")])
def test_a_count_has_its_noun_in_the_right_number(number, shown):
    assert counted(number, "token") == shown


def test_a_table_keeps_the_line_breaks_of_a_cell():
    assert '<td style="text-align: left">one<br>&lt;two&gt;</td>' in html_table("", (), [("a", "one\n<two>")])
    assert "majesty of the giraffe.<br>Daniel: Hello, Girafatron!<br>Girafatron:" in fk.CARD._repr_html_()
