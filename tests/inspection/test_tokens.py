"""Tokens are shown as the tokenizer makes them, byte by byte, whatever the text."""

import copy
import os
import re
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import falcon_kit as fk
from falcon_kit.display.page import visible
from falcon_kit.explanation.parts import text_part
from falcon_kit.inspection.hooks import inspect_model
from falcon_kit.inspection.token import token_bytes, token_text
from falcon_kit.inspection.tokens import missing_bytes, tokens

PUBLISHED = os.environ.get("FALCON_TOKENIZER")
"""A directory with the published tokenizer, which the kit does not carry."""

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a\x00b\x16\x7f",
    "\u202etfel\u202c \u200f",
    "</span></div><!-- ",
    "नमस्ते 🦅👩\u200d🚀",
    "&lt; &amp;",
    "\ud7ff\ue000\U0010ffff",
    " a\n\n\tb ",
    "\u0301x",
]
TYPED = "Hello<|endoftext|>>>QUESTION<< World"


@pytest.fixture(scope="session", params=["falconet", "published"])
def each_tokenizer(request, tokenizer):
    """Falconet's tokenizer, and the published one where there is one."""
    if request.param == "falconet":
        return tokenizer
    if not PUBLISHED:
        pytest.skip("FALCON_TOKENIZER names no directory with the published tokenizer")
    return AutoTokenizer.from_pretrained(PUBLISHED)


@pytest.fixture(scope="session")
def gappy():
    """A byte-level tokenizer without a token for "X" and for byte 0x16, in which "a" and "b" merge."""
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {"X", "Ė"})
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, "ab"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


# Exact


@given(TEXTS)
@example("".join(HOSTILE))
@example(TYPED)
def test_the_bytes_of_the_tokens_are_the_text(each_tokenizer, text):
    view = tokens(text, each_tokenizer)
    assert sum(len(token.bytes) for token in view.tokens) + sum(map(len, view.lost.values())) == len(text.encode())
    if not view.lost:
        assert b"".join(token.bytes for token in view.tokens) == text.encode()


@given(TEXTS)
@example("".join(HOSTILE))
@example(TYPED)
def test_ids_and_spans_are_the_tokenizers_own(each_tokenizer, text):
    view = tokens(text, each_tokenizer)
    encoded = each_tokenizer(text, return_offsets_mapping=True)
    assert list(view.ids) == encoded["input_ids"]
    if not view.lost:  # the tokenizer counts some neighbours of what it drops to a token
        assert [token.span for token in view.tokens] == encoded["offset_mapping"]


@given(TEXTS)
def test_what_is_lost_is_what_the_vocabulary_does_not_have(each_tokenizer, text):
    view, missing = tokens(text, each_tokenizer), missing_bytes(each_tokenizer)
    kept = bytes(byte for byte in text.encode() if byte not in missing)
    assert b"".join(token.bytes for token in view.tokens) == kept


@given(TEXTS)
def test_a_token_without_parts_of_characters_is_what_the_tokenizer_decodes(each_tokenizer, text):
    for token in tokens(text, each_tokenizer).tokens:
        if not token.partial:
            assert token.text == each_tokenizer.decode([token.id])


def test_falconets_vocabulary_has_every_byte(tokenizer):
    assert missing_bytes(tokenizer) == frozenset()
    assert tokens("\x00\x16", tokenizer).lost == {}


# Characters that are split


def test_a_split_character_is_shown_whole_and_linked(tokenizer):
    view = tokens("a🦅", tokenizer)
    parts = [token for token in view.tokens if token.partial]
    assert [token.text for token in parts] == ["🦅"] * 4
    assert b"".join(token.bytes for token in parts) == "🦅".encode()
    assert view.split_characters() == {1: (1, 2, 3, 4)}


# What vanishes


def test_bytes_that_no_token_holds_are_named_by_their_character(gappy):
    view = tokens("Xaé\x16X", gappy)
    assert view.lost == {0: b"X", 3: b"\x16", 4: b"X"}
    assert [token.bytes for token in view.tokens] == [b"a", b"\xc3", b"\xa9"]
    assert "3 bytes lost" in repr(view)
    assert fk.compare_tokens({"x": view.text}, gappy)["x"].lost_bytes == 3
    named = "U+0058 at character 0 (byte 58), U+0016 at character 3 (byte 16), U+0058 at character 4 (byte 58)."
    assert named in view.page().body


def test_a_token_may_reach_over_what_vanished(gappy):
    (token,) = tokens("aXb", gappy).tokens
    assert (token.bytes, token.span, token.partial) == (b"ab", (0, 3), True)


def test_a_text_of_which_nothing_is_left_is_still_shown(gappy):
    view = tokens("XX", gappy)
    assert (view.tokens, view.lost) == ((), {0: b"X", 1: b"X"})
    assert "U+0058" in view._repr_html_()
    assert view.figure().axes


# Special tokens


def test_special_tokens_typed_in_the_text_become_what_they_name(tokenizer):
    view = tokens(TYPED, tokenizer)
    assert {token.id: token.text for token in view.tokens if token.special} == {11: "<|endoftext|>", 6: ">>QUESTION<<"}
    assert "2 special" in repr(view)


def test_special_tokens_may_be_spelled_instead(tokenizer):
    view = tokens(TYPED, tokenizer, split_special_tokens=True)
    assert not any(token.special for token in view.tokens)
    assert view.ids == tuple(tokenizer(TYPED, split_special_tokens=True)["input_ids"])
    assert b"".join(token.bytes for token in view.tokens) == TYPED.encode()
    assert tokens(TYPED, tokenizer).ids[1:] != view.ids[1:]  # and only for this one text


# Bad input


def test_an_empty_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="empty"):
        tokens("", tokenizer)


@pytest.mark.parametrize("text", ["ab\ud83d", "ab\udd85c"])
def test_a_lone_surrogate_is_named(tokenizer, text):
    with pytest.raises(ValueError, match=rf"character 2 is a lone surrogate, U\+{ord(text[2]):04X}"):
        tokens(text, tokenizer)


def test_the_remedy_for_surrogates_works(tokenizer):
    text = "\ud83e\udd85 \ud83e"
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokens(mended, tokenizer).text == "🦅 \ufffd"


@pytest.mark.parametrize("text", [b"bytes", ["a"], None])
def test_what_is_no_text_is_refused(tokenizer, text):
    with pytest.raises(TypeError, match="give a text"):
        tokens(text, tokenizer)


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(TypeError, match="got str"):
        tokens("a", "falconet")


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    backend = Tokenizer(models.WordLevel({"▁a": 0}, unk_token="▁a"))
    with pytest.raises(ValueError, match="give a byte-level tokenizer"):
        tokens("a", PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_tokenizer_that_changes_the_text_is_refused(gappy):
    changing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(gappy.backend_tokenizer.to_str()))
    changing.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    with pytest.raises(ValueError, match="changes the text at byte 0"):
        tokens("ab", changing)


# How it looks


class Reader(HTMLParser):
    """What a browser makes of a view: its elements, and the text of each token."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.tokens, self.open = set(), [], False
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.elements.add(tag)
        if tag == "span" and "tabindex" in dict(attributes):
            self.open = True
            self.tokens.append(["", dict(attributes)["title"]])

    def handle_endtag(self, tag):
        self.open = self.open and tag != "span"

    def handle_data(self, data):
        if self.open:
            self.tokens[-1][0] += data


@given(TEXTS)
@example("".join(HOSTILE))
def test_text_stays_text_in_the_view(tokenizer, text):
    view = tokens(text, tokenizer)
    read = Reader(view.page()._repr_html_())
    shown = [visible(each.text, spaces=True) for each in view.tokens if not each.partial]
    pairs = zip(read.tokens, view.tokens, strict=True)
    assert [found for (found, _), token in pairs if not token.partial] == shown
    known = {"div", "style", "h2", "bdi", "p", "wbr", "span", "b", "i", "code", "br", "details", "summary", "table"}
    assert read.elements - known <= {"thead", "tbody", "tr", "th", "td", "script", "del"}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_token_that_is_hostile_stays_text(tokenizer, text):
    learnt = copy.deepcopy(tokenizer)
    learnt.add_tokens([text])
    view = tokens(f"a{text}b", learnt)
    assert text in [token.text for token in view.tokens]
    found = [[shown, title] for shown, title in Reader(view.page().document()).tokens]
    assert [visible(text, spaces=True), True] in [
        [shown, visible(text, spaces=True) in title] for shown, title in found
    ]
    assert {"img"} & Reader(view.page().document()).elements == set()


def test_each_token_tells_its_id_bytes_and_characters(tokenizer):
    view = tokens("a 🦅<|endoftext|>", tokenizer)
    titles = [title for _, title in Reader(view.page().body).tokens]
    assert titles[0] == f"token 0, a: id {view.ids[0]}; byte 61; character 0 of the text"
    assert titles[2] == f"token 2, part of 🦅: id {view.ids[2]}; byte F0; character 2 of the text"
    assert titles[-1].startswith("token 6, <|endoftext|>: id 11, special; bytes 3C 7C")


def test_the_table_of_the_page_has_the_id_bytes_and_characters_of_each_token(tokenizer):
    view = tokens("a 🦅 giraffe", tokenizer)
    cells = r"<td>(\d+)</td><td>.*?</td><td>(\d+)</td><td>bytes? ([\dA-F ]+)</td><td>characters? ([\d to]+)</td>"
    expected = [
        (f"{at}", f"{each.id}", each.bytes.hex(" ").upper(), " to ".join(dict.fromkeys((f"{first}", f"{after - 1}"))))
        for at, each in enumerate(view.tokens)
        for first, after in [each.span]
    ]
    assert expected[-1][-1] == "3 to 10"
    assert re.findall(cells, view.page().body) == expected


def test_a_split_character_has_a_box_with_itself_and_its_bytes(tokenizer):
    box = re.search(r'<b class="split">(.*?)</b>', tokens("a🦅b", tokenizer).page().body)[1]
    assert unescape(re.sub("<[^>]*>", "", box)) == "🦅 F09FA685"


def test_lost_characters_are_struck_out_in_place(gappy):
    body = tokens("aXc\x16", gappy).page().body
    assert re.sub(' (tabindex|class|title)="[^"]*"|<wbr>', "", body.partition('class="tokens"')[2]).startswith(
        ' dir="ltr"><span><bdi>a</bdi></span><del><bdi>X</bdi></del><span><bdi>c</bdi></span><del>'
    )


@pytest.mark.parametrize("text", ["\u202e" * 1000, "giraffe <b>&" * 700, "🦅" * 600, "X" * 3000])
def test_a_view_is_at_most_a_megabyte(tokenizer, text):
    view = tokens(text, tokenizer)
    assert len(view.tokens) > 2048
    assert len(view.page().document().encode()) < 1_000_000


def test_a_view_of_2048_tokens_holds_them_all(tokenizer):
    view = tokens("🦅" * 512, tokenizer)
    assert len(Reader(view.page().body).tokens) == len(view.tokens) == 2048


def test_a_view_with_too_many_tokens_says_how_many_it_shows(tokenizer):
    body = tokens("🦅" * 4000, tokenizer).page().body
    shown = int(re.search(r"The first ([\d,]+) of 16,000 tokens", body)[1].replace(",", ""))
    assert len(Reader(body).tokens) == shown


def test_the_page_is_written_to_a_file(tokenizer, tmp_path):
    path = tokens("Hello", tokenizer).to_html(tmp_path / "page.html")
    assert "Hello" in path.read_text(encoding="utf-8")


def test_the_table_has_a_row_for_each_token(tokenizer):
    table = tokens("a 🦅", tokenizer).to_dataframe()
    assert table["bytes"].tolist() == ["61", "20", "f0", "9f", "a6", "85"]
    assert table["id"].tolist() == tokenizer("a 🦅")["input_ids"]
    assert table["partial"].tolist() == [False, False, True, True, True, True]
    assert table[["start", "end"]].to_numpy().tolist()[-1] == [2, 3]


def test_the_figure_shows_the_bytes_and_the_kind_of_each_token(tokenizer):
    learnt = copy.deepcopy(tokenizer)
    learnt.add_tokens(["長"])
    view = tokens("a長🦅<|endoftext|>", learnt)
    axes = view.figure().axes[0]
    kinds = {each.get_label(): [round(bar.get_center()[0]) for bar in each] for each in axes.containers}
    assert kinds == {"whole characters": [0, 1], "part of a character": [2, 3, 4, 5], "special": [6]}
    assert [bar.get_height() for bar in axes.patches] == [1, 3, 1, 1, 1, 1, 13]
    assert [label.get_text() for label in axes.get_xticklabels()][2:6] == ["F0", "9F", "A6", "85"]
    assert view.to_dataframe()["special"].tolist() == 6 * [False] + [True]


def test_a_falcon_stands_for_its_tokenizer(instruct):
    assert fk.tokens("Hello", instruct) == fk.tokens("Hello", instruct.tokenizer)


def test_the_repr_is_short(tokenizer):
    assert repr(tokens("é" * 500, tokenizer)) == "TokenView(1,000 tokens, 500 characters, 1,000 bytes)"


def test_len_counts_the_tokens(tokenizer):
    text = "Hello 世界 👍"
    assert len(fk.tokens(text, tokenizer)) == len(tokenizer(text)["input_ids"])


# A token by itself


def test_a_part_of_a_character_is_written_as_its_bytes_in_every_view(instruct):
    text = "Ж 长 \ufffd 🦅"
    expected = tuple(
        each.bytes.decode(errors="backslashreplace") if each.partial else each.text
        for each in tokens(text, instruct).tokens
    )
    assert r"\xe9" in "".join(expected)
    attention, ablation = fk.attention(instruct, text, layers=0), fk.ablate(instruct, text, heads=[(0, 0)])
    for found in (attention, ablation, fk.lens(instruct, text), fk.attribute(instruct, text, steps=1)):
        assert found.token_texts == expected
    inspected = inspect_model(instruct)
    part = text_part(inspected, inspected.encode(text), torch.zeros(inspected.spec.vocabulary))
    assert tuple(each["text"] for each in part["tokens"]) == expected


def test_the_bytes_of_a_part_have_one_backslash_in_a_table_and_a_repr(instruct):
    ids = instruct.tokenizer("A 🦅")["input_ids"]
    part = ids[-1]
    written = token_text(instruct.tokenizer, part)
    assert re.fullmatch(r"(\\x[0-9a-f]{2})+", written)
    found = fk.attribute(instruct, ids, target=part, steps=1)
    lens = fk.lens(instruct, ids, target=part)
    ablation = fk.ablate(instruct, ids, heads=[(0, 0)], top_k=instruct.spec.vocabulary)
    for text in (repr(found), unescape(found._repr_html_()), unescape(ablation._repr_html_())):
        assert f"'{written}'" in text
    assert f"'{written}'" in lens.contributions_figure().axes[0].get_title()


def test_a_token_by_itself_is_its_text_or_the_bytes_of_its_part(each_tokenizer):
    for token in range(len(each_tokenizer)):
        text, decoded = token_text(each_tokenizer, token), each_tokenizer.decode([token])
        name = each_tokenizer.convert_ids_to_tokens(token)
        if "\ufffd" in decoded:
            written = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), text.encode())
            assert written == token_bytes(name)
        else:
            assert text == decoded
