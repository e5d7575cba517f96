"""Figures of tokens show the values and the names they get."""

import warnings

import numpy as np

from falcon_kit.inspection.plots import tokens as plots


def test_each_token_has_a_bar_in_the_colour_of_its_kind():
    axes = plots.lengths(["a", b"\xf0\x9f", "<|end|>"], [1, 2, 7], ["whole", "part", "special"]).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [1, 2, 7]
    assert len({bar.get_facecolor() for bar in axes.patches}) == 3
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "F0 9F", "<|end|>"]


def test_a_long_text_is_numbered():
    axes = plots.lengths(["a"] * 500, [1] * 500, ["whole"] * 500).axes[0]
    assert axes.get_xlabel() == "position in the text, tokens"


def test_what_the_font_lacks_is_named_by_its_number():
    figure = plots.lengths(["🦅", "$x$"], [4, 3], ["whole", "whole"])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["[U+1F985]", "$x$"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()


def test_languages_have_a_bar_for_each_tokenizer_and_a_name():
    parity, sizes = {"A": [1, 2, np.nan], "B": [1, 3, np.nan]}, {"A": [4, 3, 2], "B": [2, 1, 1]}
    left, right = (figure := plots.languages(["English", "Thai", "Code"], parity, sizes, "English")).axes
    assert [bar.get_width() for bar in left.patches] == [1, 2, 0, 1, 3, 0]
    assert [bar.get_width() for bar in right.patches] == [4, 3, 2, 2, 1, 1]
    assert [label.get_text() for label in left.get_yticklabels()] == ["English", "Thai", "Code"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A", "B"]
    assert left.get_ylim()[0] > left.get_ylim()[1]  # the first on top


def test_pictures_of_tokens_show_themselves_in_a_notebook():
    for figure in (plots.lengths(["a"], [1], ["whole"]), plots.languages(["x"], {"A": [1]}, {"A": [1]}, "x")):
        assert figure._repr_png_().startswith(b"\x89PNG")
