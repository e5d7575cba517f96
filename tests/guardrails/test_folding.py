"""Spellings of a character made equal, with its place in the original."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_kit.guardrails.folding import View, fold, folded, plain


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Straße", "strasse"),
        ("ＡＢ１２", "ab12"),
        ("dа\u0336mn", "damn"),
        ("a\u200bb\u00adc\ufeff", "abc"),
        ("Mo\u0308rder", "morder"),
        ("Mörder", "morder"),
        ("غَبِيّ", "غبي"),
        ("ﬁre", "fire"),
        ("炸弹", "炸弹"),
        ("が", "か\u3099"),
    ],
)
def test_spellings_become_one(text, expected):
    assert fold(text) == expected


@pytest.mark.parametrize("form", [plain, folded])
@given(pieces=st.lists(st.text(max_size=8), max_size=8))
def test_a_view_does_not_depend_on_the_pieces(form, pieces):
    whole, grown = View(form), View(form)
    whole.add("".join(pieces))
    for piece in pieces:
        grown.add(piece)
    assert (grown.text, grown._origins) == (whole.text, whole._origins)
    assert grown.text == "".join(map(form, "".join(pieces)))


def test_a_piece_is_appended_at_once():
    """Each time, the whole text is copied: a million letters with accents, one after the other, took 14 seconds."""

    class Counted(View):
        def __setattr__(self, name, value):
            written.append(name)
            super().__setattr__(name, value)

    written = []
    view = Counted(str.upper)
    written.clear()
    view.add("été")
    assert (view.text, written.count("text")) == ("ÉTÉ", 1)


def test_a_span_refers_to_the_original():
    view = View(folded)
    view.add("x\u200bﬁＮ\u0301e!")
    first = view.text.index("fine")
    assert view.span(first, first + 4) == (2, 6)


def test_places_stay_when_the_beginning_is_forgotten():
    view = View(folded)
    view.add("ÀÉ one two")
    place = view.text.index("two")
    view.forget(place - 1)
    assert view.text == " two"
    assert view.span(place, place + 3) == (7, 10)
    assert view.place(7) == place
