"""Figures of predictions show the values and the tokens they get."""

import numpy as np

from falcon_kit.inspection.plots import lens as plots


def test_the_lens_has_a_row_for_the_embedding_and_each_layer():
    probabilities = np.array([[0.1, 0.9], [0.8, 0.2]])
    axes = plots.layers(["a", "$b$"], [["x", "y"], ["z", "a long word"]], probabilities, first=7).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), probabilities)
    assert [text.get_text() for text in axes.texts] == ["x", "y", "z", "a·long·w…"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a\n7", "$b$\n8"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["embedding", "layer 0"]


def test_contributions_add_up_in_the_line():
    axes = plots.contributions(1.0, np.array([2.0, -1.0]), np.array([0.5, 3.0]), "title").axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [1.0, 3.5, 5.5])
    assert [bar.get_height() for bar in axes.patches] == [1.0, 2.0, -1.0, 0.5, 3.0]


def test_surprisal_has_a_line_for_each_name_and_a_legend_for_several():
    axes = plots.surprisal(["a", "b"], {"on": np.array([np.nan, 2.0]), "off": np.array([np.nan, 5.0])}).axes[0]
    assert [line.get_ydata()[1] for line in axes.lines] == [2.0, 5.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["on", "off"]
    assert axes.get_ylabel() == "bits"
    assert axes.get_xlim()[0] < 0  # the first token is shown, although nothing predicts it


def test_a_short_text_is_written_below_and_a_long_one_numbered():
    short = plots.surprisal(["a", "b"], {"x": np.ones(2)}).axes[0]
    assert [label.get_text() for label in short.get_xticklabels()] == ["a", "b"]
    assert plots.surprisal(["a"] * 500, {"x": np.ones(500)}).axes[0].get_xlabel() == "position in the text, tokens"


def test_attribution_tells_for_from_against_by_colour():
    bars = plots.attribution(["a", "b"], np.array([1.0, -0.5]), "title").axes[0].patches
    assert [bar.get_height() for bar in bars] == [1.0, -0.5]
    assert bars[0].get_facecolor() != bars[1].get_facecolor()
