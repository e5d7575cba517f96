"""Pairs of sentences are compared by their log-likelihood."""

import json
import re

import datasets
import pandas as pd
import pytest
import torch

import falcon_kit as fk
from falcon_kit.evaluation.bias import PAIRS, BiasReport, PairResult


@pytest.fixture(scope="module")
def report(instruct):
    return fk.bias(instruct)


def likelihood(falcon, text):
    ids = [11, *falcon.tokenizer(text)["input_ids"]]
    with torch.inference_mode():
        logprobs = falcon.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(logprobs[at - 1, ids[at]]) for at in range(1, len(ids)))


def test_a_difference_is_that_of_the_sums_of_all_tokens(report, instruct):
    for pair in report.pairs[:3]:
        expected = likelihood(instruct, pair.stereotype) - likelihood(instruct, pair.counterpart)
        assert pair.difference == pytest.approx(expected, abs=1e-2)


def test_there_are_ten_pairs_on_each_axis_and_ten_controls(report):
    assert {axis: sum(pair.axis == axis for pair in report.pairs) for axis in report.axes} == dict.fromkeys(
        ["gender", "age", "origin", "religion", "disability", "class", "control"], 10
    )


def test_the_sentences_of_a_pair_differ_in_one_word():
    for row in map(json.loads, PAIRS.read_text().splitlines()):
        first, second = row["stereotype"].split(), row["counterpart"].split()
        assert sum(one != two for one, two in zip(first, second, strict=True)) == 1


def test_a_share_has_an_interval_and_the_report_states_its_limits(report):
    table, html = report.to_dataframe(), report._repr_html_()
    assert ((table["low"] <= table["share"]) & (table["share"] <= table["high"])).all()
    assert "it does not show that there is no bias" in html
    assert "as the controls show" in html
    assert len(repr(report)) < 250


def test_shares_count_the_pairs_in_which_the_stereotype_is_more_likely():
    pairs = [PairResult("age", "old", "young", each) for each in (1.0, 2.0, -1.0, 0.0)]
    assert BiasReport("falcon", tuple(pairs)).share("age").value == 0.5
    assert BiasReport("falcon", tuple(pairs)).difference("age").value == 0.5


def test_the_csv_of_crows_pairs_is_read(instruct, tmp_path):
    file = tmp_path / "crows_pairs_anonymized.csv"
    file.write_text(",sent_more,sent_less,stereo_antistereo,bias_type\n0,He is tall.,She is tall.,stereo,gender\n")
    (pair,) = fk.bias(instruct, file).pairs
    assert "as the controls show" not in fk.bias(instruct, file)._repr_html_()
    assert (pair.axis, pair.stereotype, pair.counterpart) == ("gender", "He is tall.", "She is tall.")


def test_a_key_that_is_none_counts_as_absent_as_tables_export_mixed_rows(instruct):
    rows = [
        {"axis": "age", "stereotype": "He is old.", "counterpart": "He is young."},
        {"bias_type": "age", "sent_more": "He is old.", "sent_less": "He is young."},
    ]
    mixed = [dict.fromkeys([*rows[0], *rows[1]]) | row for row in rows]
    assert fk.bias(instruct, mixed).pairs == fk.bias(instruct, rows).pairs


ROWS = [
    {"axis": "age", "stereotype": "He is old.", "counterpart": "He is young.", "note": None},
    {"axis": "age", "stereotype": "They are old.", "counterpart": "They are young.", "note": "mine"},
]


@pytest.mark.parametrize("form", [pd.DataFrame, datasets.Dataset.from_list, iter, tuple])
def test_pairs_may_be_rows_of_any_form_that_is_tuned_on(instruct, form):
    assert fk.bias(instruct, form(ROWS)).pairs == fk.bias(instruct, ROWS).pairs


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (ROWS[0], "fk.bias got one row: put it into a list. A row is {"),
        (None, "fk.bias got nothing: give a file, a folder, or a list of rows. A row is {"),
        (3, "fk.bias got 3: give a file, a folder, or a list of rows. A row is {"),
        (
            datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS)),
            "several splits: give one of them, such as data['te",
        ),
    ],
)
def test_what_holds_no_pairs_is_refused_by_its_kind(instruct, pairs, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        fk.bias(instruct, pairs)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"axis": "age", "stereotype": "old"}, "its counterpart is None, not a text"),
        ({"axis": "age", "stereotype": "old", "counterpart": "old"}, "its two sentences are equal"),
        (["old"], "it is list, not an object"),
    ],
)
def test_a_malformed_pair_is_named_by_file_and_line(instruct, tmp_path, row, problem):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"pairs.jsonl:1: {re.escape(problem)}") as error:
        fk.bias(instruct, tmp_path / "pairs.jsonl")
    form = json.loads(str(error.value).partition("A row is ")[2])
    assert fk.bias(instruct, [form | {"counterpart": "other"}]).pairs


def test_pairs_without_a_row_are_named_by_their_file(instruct, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    for pairs, name in ((tmp_path / "empty.jsonl", r"empty\.jsonl"), ([], "the list of pairs")):
        with pytest.raises(ValueError, match=f"^{name} has no rows"):
            fk.bias(instruct, pairs)


def test_bytes_that_are_not_utf_8_are_named(instruct, tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_bytes("sent_more,sent_less,bias_type\nJosé slept.,Pat slept.,race\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"pairs\.csv:2: its stereotype is not valid UTF-8"):
        fk.bias(instruct, file)


@pytest.mark.parametrize("batch_size", [0, 2.5, True])
def test_a_wrong_batch_size_is_refused(instruct, batch_size):
    with pytest.raises(ValueError, match="batch_size must be a whole number from 1"):
        fk.bias(instruct, batch_size=batch_size)


def test_the_figure_has_a_line_at_one_half_and_a_row_for_each_axis(report):
    (axes,) = report.figure().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(report.axes)
    assert axes.lines[0].get_xdata() == [0.5, 0.5]
