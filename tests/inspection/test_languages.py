"""Texts are compared by what they cost in tokens: counts that anybody can check by hand, and recorded ones."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

import falcon_kit as fk
from falcon_kit.display.page import text_html
from falcon_kit.inspection import languages
from falcon_kit.inspection.languages import compare_tokens, published_tokens, sample_texts

FOLDER = Path(languages.__file__).parent
RECORD = json.loads((FOLDER / "published.json").read_text())
PUBLISHED = os.environ.get("FALCON_TOKENIZER")
"""A directory with the published tokenizer, which the kit does not carry."""

SCRIPTS = ["LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "HANGUL", "CJK", "HIRAGANA", "THAI"]


def words(text, segmenter="spaces"):
    return [text[each.start : each.stop] for each in languages._words(text, segmenter)]


# Words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, world!", ["Hello", "world"]),
        ("l'eau snake_case", ["l", "eau", "snake", "case"]),
        ("बाज़ दूर से", ["बाज़", "दूर", "से"]),
        ("👩\u200d🚀 ❤\ufe0f", ["👩\u200d🚀", "❤\ufe0f"]),
        (" \u0301 ", []),
        ("3.14", ["3", "14"]),
    ],
)
def test_words_stand_between_spaces_and_punctuation(text, expected):
    assert words(text) == expected


def test_a_script_without_spaces_is_counted_by_characters_with_their_marks():
    assert words("ที่ไกล", "characters") == ["ที่", "ไ", "ก", "ล"]
    assert words("水在。一", "characters") == ["水", "在", "一"]


@pytest.mark.parametrize(
    ("name", "segmenter"), [("English", "spaces"), ("Korean", "spaces"), ("Hindi", "spaces")]
    + [(name, "characters") for name in ("Chinese", "Japanese", "Thai")],
)  # fmt: skip
def test_the_segmenter_is_named(tokenizer, name, segmenter):
    assert compare_tokens({name: sample_texts()[name]}, tokenizer)[name].segmenter == segmenter


# Counts


def test_counts_are_those_of_the_tokenizer(tokenizer):
    row = compare_tokens({"x": "The giraffe 🦅é"}, tokenizer)["x"]
    ids = tokenizer("The giraffe 🦅é")["input_ids"]
    assert (row.tokens, row.characters, row.bytes, row.words) == (len(ids), 14, 18, 3)
    assert row.partial_tokens == 6  # four bytes and two, one token each
    assert row.tokens_per_word == len(ids) / 3
    assert row.bytes_per_token == 18 / len(ids)
    assert row.byte_fallback == 6 / len(ids)


def test_a_word_that_is_one_character_in_several_tokens_is_not_whole(tokenizer):
    assert compare_tokens({"x": "🦅"}, tokenizer)["x"].whole_words == 0


def test_a_word_is_whole_if_one_token_holds_it(tokenizer):
    row = compare_tokens({"x": "The giraffe zyx"}, tokenizer)["x"]
    pieces = [tokenizer.decode([each]).strip() for each in tokenizer("The giraffe zyx")["input_ids"]]
    assert row.whole_words == sum(word in pieces for word in ("The", "giraffe", "zyx")) == 2


def test_parity_compares_translations_and_nothing_else(tokenizer):
    report = compare_tokens({"a": ["Hello", "a"], "b": ["a a", "a"], "code": "x = 1", "c": ["a"]}, tokenizer)
    count = {name: report[name].tokens for name in "ab"}
    assert report.parity("a") == 1
    assert report.parity("b") == count["b"] / count["a"]
    assert math.isnan(report.parity("code"))
    assert math.isnan(report.parity("c"))


def test_single_texts_are_translations_of_each_other(tokenizer):
    report = compare_tokens({"en": "Hello", "de": "Hallo Welt"}, tokenizer, reference="de")
    assert report.parity("en") == report["en"].tokens / report["de"].tokens


def test_a_text_without_words_has_no_ratio_to_them(tokenizer):
    row = compare_tokens({"x": "..."}, tokenizer)["x"]
    assert math.isnan(row.tokens_per_word)
    assert math.isnan(row.whole_share)


# Bad input


@pytest.mark.parametrize("texts", [{}, {"x": ""}, {"x": []}, {"x": ["a", ""]}])
def test_nothing_to_compare_is_refused(tokenizer, texts):
    with pytest.raises(ValueError, match=r"no texts|'x' is empty"):
        compare_tokens(texts, tokenizer)


def test_texts_have_names(tokenizer):
    with pytest.raises(TypeError, match="by name"):
        compare_tokens(["a"], tokenizer)


def test_a_reference_that_is_not_there_is_named(tokenizer):
    with pytest.raises(KeyError, match="no text 'en': there are x"):
        compare_tokens({"x": "a"}, tokenizer, reference="en")


# The kit's own texts, and what was recorded of them


def test_the_sentences_are_parallel_in_many_languages_and_scripts():
    parallel = json.loads((FOLDER / "sentences.json").read_text(encoding="utf-8"))["parallel"]
    assert len(parallel) >= 12
    assert {len(sentences) for sentences in parallel.values()} == {5}
    letters = {each for sentences in parallel.values() for each in "".join(sentences) if each.isalpha()}
    found = {unicodedata.name(each).split()[0] for each in letters}
    assert [script for script in SCRIPTS if script not in {name.partition("-")[0] for name in found}] == []


def test_the_recorded_figures_are_of_todays_sentences():
    today = hashlib.sha256((FOLDER / "sentences.json").read_bytes()).hexdigest()
    assert RECORD["sentences_sha256"] == today, f"run again: {RECORD['made_by']}"


def test_the_recorded_figures_fit_their_texts(tokenizer):
    ours, recorded = compare_tokens(sample_texts(), tokenizer), published_tokens()
    same = ("name", "sentences", "characters", "bytes", "words", "segmenter")
    assert [[getattr(row, name) for name in same] for row in recorded.rows] == [
        [getattr(row, name) for name in same] for row in ours.rows
    ]
    assert (recorded.vocabulary, recorded.reference) == (65024, "English")
    assert all(0 < row.tokens <= row.bytes and 0 <= row.whole_words <= row.words for row in recorded.rows)


def test_the_recorded_vocabulary_lacks_28_bytes():
    missing = published_tokens().missing_bytes
    assert len(missing) == 28
    assert {*missing} >= {0xC0, 0xC1, *range(0xF5, 0x100)}  # those that UTF-8 never has


@pytest.mark.skipif(not PUBLISHED, reason="FALCON_TOKENIZER names no directory with the published tokenizer")
def test_the_recorded_figures_are_those_of_the_published_tokenizer():
    assert json.loads(json.dumps(languages.record(PUBLISHED, "Falcon"))) == RECORD


def test_english_is_what_the_published_vocabulary_was_made_for():
    report = published_tokens()
    assert [row.name for row in report.rows if report.parity(row.name) <= 1] == ["English"]
    assert max(report.rows, key=lambda row: row.whole_share).name == "English"


# How it looks


def test_the_table_has_a_row_for_each_text(tokenizer):
    report = compare_tokens({"a": ["Hello"], "b": ["<b>"]}, tokenizer)
    table = report.to_dataframe()
    assert table.index.tolist() == ["a", "b"]
    assert table.loc["b", "parity"] == report.parity("b")
    assert table.loc["a", "tokens_per_word"] == report["a"].tokens_per_word


def test_the_page_has_the_counts_of_each_text_and_a_bar_for_its_parity(tokenizer):
    texts = {"b": ["zyx zyx 🦅"], "code": "x = 1", "a": ["Hello giraffe"]}
    report = compare_tokens(texts, tokenizer, reference="a")
    found = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', report.page().body)
    assert [name for name, _ in found] == [text_html(name) for name in ("a", "b", "code")]  # without a parity: last
    for name, cells in zip(("a", "b", "code"), (cells for _, cells in found), strict=True):
        row, parity = report[name], report.parity(name)
        expected = [
            *(f"{row.tokens}", f"{row.tokens_per_word:.2f}", "spaces", f"{row.whole_share:.0%}"),
            *(f"{row.bytes_per_token:.2f}", f"{row.byte_fallback:.0%}", "" if math.isnan(parity) else f"{parity:.2f}"),
        ]
        assert re.findall('<td class="number">(.*?)</td>', cells) == [text_html(cell) for cell in expected]
        width = 0 if math.isnan(parity) else 10 * parity / report.parity("b")  # of the longest bar
        assert f"width:{width:.2f}em" in cells


def test_names_stay_text_in_the_page(tokenizer, tmp_path):
    report = compare_tokens({"<b>&": "Hello", "x": "."}, tokenizer)
    for page in (report._repr_html_(), report.to_html(tmp_path / "page.html").read_text(encoding="utf-8")):
        assert ("<b>&" in page, "&lt;b&gt;&amp;" in page) == (False, True)


def test_the_figure_shows_two_tokenizers_side_by_side(tokenizer):
    report = compare_tokens(sample_texts(), tokenizer)
    left, right = published_tokens().figure(report).axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names[0] == "English"
    parities = [each.parity(name) for each in (published_tokens(), report) for name in names]
    assert [bar.get_width() for bar in left.patches] == [0 if math.isnan(each) else each for each in parities]
    sizes = [each[name].bytes_per_token for each in (published_tokens(), report) for name in names]
    assert [bar.get_width() for bar in right.patches] == sizes


def test_a_falcon_stands_for_its_tokenizer(instruct):
    report = fk.compare_tokens({"a": "Hello"}, instruct)
    assert repr(report) == "TokenReport(falconet-instruct, 2,048 tokens, 1 text)"


def test_an_embedded_tokenizer_goes_by_its_models_name():
    tokenizer = fk.load("falconet").tokenizer
    assert repr(fk.compare_tokens({"a": "Hello"}, tokenizer)) == "TokenReport(falconet, 2,048 tokens, 1 text)"


def test_two_reports_of_one_name_have_a_bar_each(tokenizer):
    report = fk.compare_tokens({"a": "one", "b": "two"}, tokenizer)
    axes = report.figure(report).axes[0]
    assert len(axes.patches) == 2 * 2
    assert [each[:3] for each in axes.get_legend_handles_labels()[1]] == ["1: ", "2: "]


def test_a_figure_of_reports_with_different_references_is_refused(tokenizer):
    first, second = (fk.compare_tokens({"a": "one", "b": "two"}, tokenizer, reference=each) for each in "ab")
    with pytest.raises(ValueError, match="relative to different texts, a and b: give both the same reference"):
        first.figure(second)


def test_the_command_without_arguments_says_how_it_is_called():
    found = subprocess.run([sys.executable, "-m", "falcon_kit.inspection.languages"], capture_output=True, text=True)
    assert found.stderr == "usage: python -m falcon_kit.inspection.languages DIRECTORY NAME\n"
