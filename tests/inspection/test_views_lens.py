"""The page of predictions, without a browser."""

import re
from html import unescape

import numpy as np
import pytest

from falcon_kit.display.page import percent
from falcon_kit.inspection.views.lens import lens_page


def page(words, following=((" next", 0.75), ("</td>", 0.2))):
    time, layers = len(words), 3
    surprisal = np.array([np.nan, *np.linspace(0, 30, time - 1)])
    expected = [[], *([("<b>", 0.5), (" x", 0.25)] for _ in words[1:])]
    read = [["<i>"] * min(16, time) for _ in range(layers)]
    return lens_page("Lens", words, surprisal, expected, following, read, np.full((layers, min(16, time)), 0.5))


def test_each_token_says_what_was_expected_in_its_place():
    titles = [
        unescape(each)
        for each in re.findall(r'<span tabindex="-?\d"[^>]* title="([^"]*)"', page(["a", " b", "c"])._repr_html_())
    ]
    assert titles[0] == "token 0, a: the first token, not predicted"
    assert titles[1] == "token 1, ·b: 0.0 bits; expected <b> 50.0%, ·x 25.0%"


def test_the_colour_grows_with_surprisal_up_to_a_limit():
    shares = [
        int(each)
        for each in re.findall(r'style="background:color-mix\(in srgb,var\(--c1\) (\d+)%', page(["a"] * 11).body)
    ]
    tokens = shares[-11:]
    assert tokens[0] == 0  # the first token is not predicted
    assert tokens == sorted(tokens)
    assert max(tokens) == shares[4] < 100  # as in the scale at 12 bits


def test_the_next_tokens_stand_in_a_table_with_their_probabilities():
    rows = re.findall(r"<tr><td>(\d)</td><td>(.*?)</td><td>([\d.]+%)</td>", page(["a", "b"]).body)
    assert [(rank, probability) for rank, _, probability in rows] == [("0", "75.00%"), ("1", "20.00%")]
    assert "&lt;/td&gt;" in rows[1][1]


def test_the_lens_has_the_last_layer_at_the_top():
    assert re.findall(r'<th scope="row">([^<]*)<', page(["a", "b"]).body) == ["layer 1", "layer 0", "embedding"]


def test_text_stays_text():
    source = page(["<script>alert(1)</script>", '" onload="x', "\x00"])._repr_html_()
    assert "<script>alert" not in source
    assert '" onload="x' not in source
    assert "alert(1)" in source
    assert "onload=" in source
    assert "␀" in source
    assert "<i>" not in source.replace('<i class="mark">', "")


@pytest.mark.parametrize("time", [2048, 8192])
def test_a_view_of_any_length_is_at_most_a_megabyte(time):
    found = page([*["\u202e"] * (time - 1), "end"])
    assert len(found.document().encode()) < 1_000_000
    assert f'title="token {time - 1}, end' in found.body
    assert (f"of {time:,} tokens" in found.body) == (time == 8192)


@pytest.mark.parametrize(
    ("probability", "shown"), [(0.9964, "99.6%"), (0.99999, "99.9%"), (1, "100.0%"), (0.29, "29.0%")]
)
def test_nothing_is_certain_by_rounding(probability, shown):
    assert percent(probability) == shown
