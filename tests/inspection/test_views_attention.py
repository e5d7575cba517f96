"""The page of attention maps, without a browser."""

import io
import json
import re
from base64 import b64decode
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from falcon_kit.inspection.views.attention import attention_page

NASTY = ["<script>alert(1)</script>", '"quoted"', "\x00", "\u202egnirts", " ", "\n", "</div>", "&lt;"]


@cache
def random_map(time: int, seed: int = 0) -> np.ndarray:
    """Attention that is far from even, as in a model."""
    scores = np.random.default_rng(seed).normal(0, 3, (time, time))
    weights = np.exp(scores) * np.tri(time)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def page(words, maps=2):
    """A page whose maps are four in turn."""
    heads = {f"layer 0, head {at}": (f"head {at}", random_map(len(words), at % 4)) for at in range(maps)}
    return attention_page("Attention", words, {"layer 0, KV group 0": heads})


def data(found):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', found._repr_html_())[1])


def weights(entry, kept) -> tuple[np.ndarray, np.ndarray]:
    at = np.frombuffer(b64decode(entry["keys"]), "<u2").reshape(-1, kept)
    return at, np.frombuffer(b64decode(entry["weights"]), np.uint8).reshape(-1, kept)


class Structure(HTMLParser):
    """Tags in order, and the text of each token."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.tokens, self.inside = [], [], False
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "div" and ("class", "tokens") in attributes:
            self.inside = True
        elif tag == "span" and self.inside:
            self.tokens.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "div"

    def handle_data(self, text):
        if self.inside and self.tokens:
            self.tokens[-1] += text


def test_the_weights_of_a_short_text_are_all_there():
    found = data(page(["a"] * 30))
    assert found["kept"] == 30
    expected = random_map(30)
    at, by = weights(found["maps"][0], 30)
    shown = np.zeros_like(expected)
    np.put_along_axis(shown, at.astype(int), by / 255, axis=1)
    np.testing.assert_allclose(shown, expected, atol=1 / 255)


def test_of_a_long_text_the_strongest_weights_are_kept():
    found, expected = data(page(["a"] * 500, maps=6)), random_map(500, 1)
    kept = found["kept"]
    at, by = weights(found["maps"][5], kept)
    for row, positions, strengths in zip(expected, at, by, strict=True):
        assert np.sort(row)[-kept:].sum() == pytest.approx(row[positions].sum(), abs=1e-5)
        np.testing.assert_allclose(strengths / 255, row[positions], atol=1 / 255)


@pytest.mark.parametrize(("time", "maps"), [(2048, 1), (2048, 12), (2048, 53), (300, 100), (16, 256)])
def test_a_view_is_at_most_a_megabyte(time, maps):
    words = ["\u202e"] * time  # one that is long in HTML
    assert len(page(words, maps).document().encode()) < 1_000_000


def test_more_maps_than_a_megabyte_holds_are_refused():
    with pytest.raises(
        ValueError, match="a page of 54 maps over 2048 tokens is not possible: give at least one, at most 53"
    ):
        page(["a"] * 2048, maps=54)
    with pytest.raises(ValueError, match="a page of 0 maps over 2 tokens is not possible"):
        attention_page("Attention", ["a", "b"], {})


def test_thumbnails_are_pictures_of_the_maps():
    source = page(["a"] * 40, maps=3)._repr_html_()
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="attention map of layer 0, head (\d)"', source)
    assert [head for _, head in pictures] == ["0", "1", "2", "0"]  # the last is the large one
    for picture, head in pictures:
        cells = np.asarray(Image.open(io.BytesIO(b64decode(picture))))
        np.testing.assert_allclose((cells / 255) ** 2, random_map(40, int(head)), atol=0.01)


def test_every_picture_has_a_text_and_every_head_a_button():
    source = page(["a"] * 5, maps=3)._repr_html_()
    assert re.findall(r'alt="([^"]*)"', source)[:3] == [f"attention map of layer 0, head {at}" for at in range(3)]
    assert source.count("<button type=") == 3


def test_text_stays_text():
    found = Structure(page(NASTY)._repr_html_())
    assert found.tags.count("script") == 2  # the data and the view's own
    assert [token.replace("·", " ") for token in found.tokens] == [
        "<script>alert(1)</script>",
        '"quoted"',
        "␀",
        "[U+202E]gnirts",
        " ",
        "↵",
        "</div>",
        "&lt;",
    ]


def test_one_token_is_reached_by_the_tab_key():
    assert re.findall(r'<span tabindex="(-?\d)"', page(["a", "b", "c"])._repr_html_()) == ["-1", "-1", "0"]


def test_without_javascript_a_table_says_what_tokens_attend_to():
    expected = random_map(3)
    source = page(["a", "b", "c"])._repr_html_()
    best = int(expected[2].argmax())
    row = re.search(r"<tr><td>2</td>.*?</tr>", source)[0]
    assert re.search(r"\d \(\d+%\)", row)[0] == f"{best} ({expected[2, best]:.0%})"


def test_a_view_asks_nothing_of_the_network():
    source = page(["a"] * 10).document()
    assert not re.search(r"(src|href)=\"(?!data:)", source)
    assert "http://" not in source
    assert "https://" not in source
