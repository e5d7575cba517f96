"""Figures of attention show the values they get, with a row for each KV group."""

import numpy as np
import pytest

from falcon_kit.inspection.plots import attention as plots

RANDOM = np.random.default_rng(0)


def panels(figure):
    return [axes for axes in figure.axes if axes.get_title().startswith("layer ")]


@pytest.mark.parametrize(("layers", "heads", "groups"), [(6, 4, 2), (32, 71, 1), (60, 128, 8), (24, 32, 32)])
def test_heads_are_shown_with_a_panel_for_each_layer_and_a_row_for_each_kv_group(layers, heads, groups):
    values = RANDOM.random((layers, heads))
    found = panels(plots.heads(values, groups, "title", "label"))
    assert [axes.get_title() for axes in found] == [f"layer {layer}" for layer in range(layers)]
    for axes, expected in zip(found, values, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), expected.reshape(groups, heads // groups))


def test_all_layers_share_one_scale():
    values = np.array([[0.1, 0.2], [0.3, 0.9]])
    assert {axes.images[0].get_clim() for axes in panels(plots.heads(values, 1, "title", "label"))} == {(0, 0.9)}


def test_few_heads_have_their_numbers_written_in():
    found = panels(plots.heads(np.array([[0.25, 1e-9], [0.5, 0.75]]), 1, "title", "label"))
    numbers = [[text.get_text() for text in axes.texts] for axes in found]
    assert numbers == [["0.25", "0.00"], ["0.50", "0.75"]]


def test_the_chance_level_stands_in_the_title():
    assert "uniform attention: 0.0138" in plots.heads(np.ones((1, 2)), 1, "t", "l", 0.01376)._suptitle.get_text()


def test_heads_without_a_number_are_no_error():
    plots.heads(np.full((2, 4), np.nan), 2, "title", "label", float("nan"))


def test_a_map_is_labelled_with_its_tokens_as_they_are():
    words = ["$x$", "<b>", "·the"]
    figure = plots.one_map(np.tril(np.ones((3, 3))) / 3, words, "title")
    figure.draw_without_rendering()  # "$x$" is no formula
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == words
    assert [label.get_text() for label in axes.get_yticklabels()] == words
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("key: the attended token", "query: the attending token")


def test_a_long_map_is_pooled_and_says_so():
    figure = plots.one_map(np.eye(1500), ["a"] * 1500, "title")
    assert figure.axes[0].images[0].get_array().shape == (500, 500)
    assert "maximum of 3 x 3 tokens" in figure.axes[1].get_ylabel()


@pytest.mark.parametrize(("size", "most"), [(10, 10), (10, 4), (7, 3), (2048, 64)])
def test_pooling_keeps_the_highest_of_each_cell(size, most):
    values = RANDOM.random((size, size))
    step = -(-size // most)
    found = plots.pool(values, most)
    assert len(found) <= most
    for (row, column), value in np.ndenumerate(found):
        cell = values[row * step : (row + 1) * step, column * step : (column + 1) * step]
        assert value == cell.max()


def test_head_similarity_shows_every_group_and_the_mean_across():
    within, across = RANDOM.random((3, 2)), RANDOM.random(3)
    groups, mean, others = plots.head_similarity(within, across).axes[0].lines
    np.testing.assert_array_equal(groups.get_ydata(), within.ravel())
    np.testing.assert_allclose(mean.get_ydata(), within.mean(-1))
    np.testing.assert_array_equal(others.get_ydata(), across)
