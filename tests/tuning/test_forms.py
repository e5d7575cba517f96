"""Every form of row times every key that matters: it is used, or the row is named; files as datasets reads them."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.generation.chat import BAIZE, check_messages
from falcon_kit.tuning import data, files
from tests.tuning.test_data import FORMS, HI, written

TEXTS = {"a text": {"text": "Lions roar."}, "RefinedWeb": {"content": "Lions roar.", "url": "https://example.org"}}
ALL = {**FORMS, "input and output": {"input": "Hi", "output": "Hello."}, **TEXTS}
ROWS = {name: row for name, row in ALL.items() if name != "a list"}
TOOL = {"type": "function", "function": {"name": "weather"}}
PIRATE, EARLIER = "Speak like a pirate.", [["What is a cow?", "An animal."], ["And a lion?", "Another one."]]
BEFORE = [
    {"role": "assistant" if index else "user", "content": text} for pair in EARLIER for index, text in enumerate(pair)
]

USED = {
    "system": (PIRATE, [{"role": "system", "content": PIRATE}, *HI]),
    "system_prompt": (PIRATE, [{"role": "system", "content": PIRATE}, *HI]),
    "system_message": (PIRATE, [{"role": "system", "content": PIRATE}, *HI]),
    "history": (EARLIER, [*BEFORE, *HI]),
}
"""Keys of a row that are used, with a value, and the conversation of FORMS with it, written out by hand."""
REFUSED = {
    "weight": 0,
    "tools": [TOOL],
    "functions": [TOOL],
    "function_call": "auto",
    "images": ["zebra.png"],
    "chat_template_kwargs": {"thinking": True},
    "reasoning_content": "Let me think.",
}
"""Keys of a row that nothing here can keep to, with a value."""
MATTERS = {name: value for name, (value, _) in USED.items()} | REFUSED
HARMLESS = {"id": 7, "source": "sharegpt", "lang": "en", "url": "https://example.org", "dump": "CC-2023", "score": 0.3}
TURN_KEYS = {
    "weight": 0,
    "train": False,
    "loss": False,
    "tool_calls": [TOOL],
    "function_call": {"name": "weather", "arguments": "{}"},
    "reasoning_content": "Let me think.",
    "images": ["zebra.png"],
}


def outcome(row):
    """The document of a row without its place, or why it is left out."""
    try:
        (read,) = fk.dialogues([row])
    except ValueError as error:
        return str(error).partition("row 1: ")[2]
    return {key: read.get(key) for key in ("messages", "text", "untrained")}


# No key that matters is dropped


@pytest.mark.parametrize("key", MATTERS)
@pytest.mark.parametrize("form", ROWS)
def test_no_key_that_matters_is_dropped_in_silence(form, key):
    assert outcome({**ROWS[form], key: MATTERS[key]}) != outcome(ROWS[form])


@pytest.mark.parametrize("key", TURN_KEYS)
@pytest.mark.parametrize("form", ["messages", "ShareGPT"])
def test_no_key_of_a_message_that_matters_is_dropped_in_silence(form, key):
    ((name, turns),) = FORMS[form].items()
    for messages in ([*turns[:-1], {**turns[-1], key: TURN_KEYS[key]}], [*turns, *turns[:-1], {**turns[-1], key: 0}]):
        if messages[-1][key] or key in ("weight", "train", "loss"):
            plain = [{key: value for key, value in turn.items() if key in turns[0]} for turn in messages]
            assert outcome({name: messages}) != outcome({name: plain})


@given(
    form=st.sampled_from(sorted(ROWS)),
    harmless=st.lists(st.sampled_from(sorted(HARMLESS)), unique=True),
    empty=st.lists(st.sampled_from(sorted(MATTERS.keys() - {"weight"})), unique=True),
    nothing=st.sampled_from([None, "", []]),
)
def test_harmless_keys_and_empty_ones_change_nothing(form, harmless, empty, nothing):
    added = {name: HARMLESS[name] for name in harmless} | dict.fromkeys(empty, nothing)
    assert outcome({**added, **ROWS[form]}) == outcome(ROWS[form])


@pytest.mark.parametrize("key", USED)
@pytest.mark.parametrize("form", [form for form in ROWS if form not in TEXTS])
def test_a_key_that_is_used_gives_the_conversation_written_by_hand(form, key):
    value, expected = USED[key]
    assert outcome({**ROWS[form], key: value})["messages"] == expected


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize("form", ROWS)
def test_a_row_with_a_key_that_cannot_be_kept_to_is_named_by_file_and_line(tmp_path, form, key):
    rows = [ROWS[form], {**ROWS[form], key: REFUSED[key]}]
    with pytest.warns(UserWarning, match="left out"):
        read = fk.dialogues(written(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows))))
    assert [each.where for each in read.problems] == ["rows.jsonl:2"]
    assert key in read.problems[0].reason


@pytest.mark.parametrize("form", [form for form in ROWS if form not in TEXTS])
def test_a_conversation_comes_before_its_own_rendering_as_text(form):
    assert outcome({"text": "### Instruction: Hi ### Response: Hello.", **ROWS[form]}) == outcome(ROWS[form])


@pytest.mark.parametrize(
    "row",
    [
        {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "Hello."},
        {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Hi"},
        {"role": "user", "content": "Hi"},
    ],
)
def test_one_message_alone_is_no_web_text(row):
    assert outcome(row).startswith("it is one message")


def test_two_system_messages_that_differ_are_refused_and_equal_ones_are_one():
    row = {"messages": [{"role": "system", "content": PIRATE}, *HI]}
    assert "two system messages that differ" in outcome({**row, "system": "Be kind."})
    assert outcome({**row, "system": PIRATE}) == outcome(row)


def test_an_example_of_a_bad_answer_is_left_out():
    row = FORMS["a prompt and its completion"]
    assert "bad answer" in outcome({**row, "label": False})
    assert outcome({**row, "label": True}) == outcome(row)


def test_the_history_of_alpaca_may_be_messages():
    assert outcome({**ROWS["Alpaca"], "history": BEFORE}) == outcome({**ROWS["Alpaca"], "history": EARLIER})


@pytest.mark.parametrize("history", ["What is a cow?", ["What is a cow?"], [["a", "b", "c"]], [7]])
def test_a_history_of_another_form_is_refused(history):
    assert outcome({**ROWS["Alpaca"], "history": history}).startswith('its "history" is not a list of pairs')


def test_a_weight_of_1_is_for_answers_only():
    wrong = "message 1 has weight=1, but only answers are trained on"
    assert outcome({"messages": [{**HI[0], "weight": 1}, HI[1]]}).startswith(wrong)


@pytest.mark.parametrize("value", [0.5, "0", 2])
def test_a_weight_other_than_0_and_1_is_refused(value):
    assert "weight" in outcome({"messages": [HI[0], {**HI[1], "weight": value}]})
    assert "weight" in outcome({"messages": HI, "weight": value})


KEYS = [
    *MATTERS,
    *TURN_KEYS,
    *HARMLESS,
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "prompt",
    "text",
]
KEYS += [
    "completion",
    "content",
    "role",
    "from",
    "value",
    "label",
    "untrained",
    "parent_id",
    "question",
    "answer",
    "choices",
]
WORDS = st.sampled_from(
    ["", " ", "Hi", "user", "assistant", "system", "gpt", "[|Human|]", "[|Human|] Hi [|AI|] Yes", "0"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=500)
@given(VALUES)
@example({"input": "[|Human|]"})
def test_any_row_becomes_a_document_or_a_reason(row):
    read = next(data._read([("row 1", row)]))
    if isinstance(read, data.Problem):
        assert read.reason
    elif read["text"] is None:
        assert check_messages(read["messages"])[-1]["role"] == "assistant"
        assert len(read["untrained"]) < len(read["messages"]) / 2
    else:
        assert read["text"].strip()


# Answers that are only read


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
def test_of_an_answer_with_weight_0_no_token_is_trained_on(instruct, key):
    messages = [HI[0], {**HI[1], key: 0}, *HI]
    example = fk.pack(fk.dialogues([{"messages": messages}]), instruct).example(0)
    assert [text for text, trained in example.spans() if trained] == [" Hello.<|endoftext|>"]
    last = fk.pack(fk.dialogues([{"messages": [*HI, *messages[:2]]}]), instruct).example(0)
    assert [text for text, trained in last.spans() if trained] == [" Hello."]
    assert last.ids == example.ids


def test_a_conversation_that_is_cut_before_its_only_trained_answer_is_named(instruct):
    messages = [HI[0], {**HI[1], "weight": 0}, HI[0], {"role": "assistant", "content": "lions " * 60}]
    packed = fk.pack(fk.dialogues([{"messages": messages}, {"messages": HI}]), instruct, context=32)
    assert [each.where for each in packed.problems] == ["row 1"]
    assert len(packed.lengths) == 1


def test_documents_are_rows_again_with_the_answers_that_are_only_read():
    read = fk.dialogues([{"messages": [HI[0], {**HI[1], "weight": 0}, *HI]}, {"text": "Lions roar."}])
    again = fk.dialogues(list(read))
    assert [outcome(each) for each in again] == [outcome(each) for each in read]
    assert [each["untrained"] for each in again] == [[1], []]
    assert fk.dialogues(read) is read


# Files and tables


@pytest.mark.parametrize("lines", [None, 1, 2, 10**6])
def test_baizes_own_files_are_conversations_with_their_header_and_without(tmp_path, lines):
    """A blank line below the header was compared with all lines before it: a million of them took half an hour."""
    before = BAIZE.system + "\n" * lines if lines else ""
    text = f"{before}[|Human|] Hi\n[|AI|] Hello.\n[|Human|] \n\n{before}[|Human|] Hi\n[|AI|] Hello.\n"
    assert [each["messages"] for each in fk.dialogues(written(tmp_path / "baize.txt", text))] == [HI, HI]


def test_a_preamble_in_a_text_file_is_a_system_message(tmp_path):
    read = fk.dialogues(written(tmp_path / "pirate.txt", f"{PIRATE}\n[|Human|] Hi\n[|AI|] Hello."))
    assert read[0]["messages"] == [{"role": "system", "content": PIRATE}, *HI]


TABLE = [
    {"instruction": "Hi", "input": "", "output": "Hello."},
    {"instruction": 'Two\nlines, and "quotes"', "input": "äöü", "output": "a, b;\tc"},
    {"instruction": "Long", "input": "", "output": "lions " * 40_000},
]


def as_json(rows, path):
    path.write_text(json.dumps(rows), encoding="utf-8")


def in_lines(rows, path):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def indented(rows, path):
    path.write_text("\n".join(json.dumps(row, indent=2) for row in rows), encoding="utf-8")


def indented_array(rows, path):
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def table(rows, path):
    pd.DataFrame(rows).to_csv(path, index=False, sep="\t" if path.suffix.lower() == ".tsv" else ",")


WRITERS = {
    "rows.json": [as_json, in_lines, indented, indented_array],
    "rows.jsonl": [in_lines, indented, indented_array],
    "ROWS.JSON": [as_json, indented],
    "ROWS.JSONL": [in_lines],
    "rows.csv": [table],
    "ROWS.CSV": [table],
    "rows.tsv": [table],
}
CASES = [(name, writer) for name, writers in WRITERS.items() for writer in writers]


@pytest.mark.parametrize(("name", "writer"), CASES)
def test_a_file_has_the_rows_that_datasets_reads_in_it(tmp_path, monkeypatch, name, writer):
    (folder := tmp_path / "data").mkdir()
    writer(TABLE, folder / name)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    if name.lower().endswith("sv"):
        options = {"sep": "\t"} if name.endswith(".tsv") else {}
        theirs = datasets.Dataset.from_csv(str(folder / name), cache_dir=tmp_path / "cache", **options)
    elif writer is indented:  # datasets reads no indented rows without an array
        theirs = datasets.Dataset.from_list(TABLE)
    else:
        theirs = datasets.Dataset.from_json(str(folder / name), cache_dir=tmp_path / "cache")
    expected = [each["messages"] for each in fk.dialogues(theirs)]
    assert [each["messages"] for each in fk.dialogues(folder / name)] == expected
    assert [each["messages"] for each in fk.dialogues(folder)] == expected
    assert len(expected) == 3


def test_a_text_file_in_capitals_is_read_as_text(tmp_path):
    assert [each["text"] for each in fk.dialogues(written(tmp_path / "WEB.TXT", "One.\n\nTwo."))] == ["One.", "Two."]


@pytest.mark.parametrize(
    ("beside", "named"), [({"choices": ["Hello.", "Bye."]}, "choices"), ({"context": "A farm."}, "context")]
)
@pytest.mark.parametrize("row", [row for row in ROWS.values() if {"prompt", "instruction", "question"} & row.keys()])
def test_a_question_with_what_training_would_drop_is_refused_by_name(row, beside, named):
    assert f"it has {named!r}" in outcome({**row, **beside})
    assert outcome({**row, named: None}) == outcome(row)


def test_a_key_that_is_none_counts_as_absent_in_a_message_too():
    """As in tables whose rows had several forms."""
    turns = [{"from": None, "value": None, **each} for each in HI]
    assert outcome({"conversations": turns}) == outcome({"messages": HI})


def test_a_table_of_questions_and_answers_is_read_before_its_text(tmp_path):
    file = written(tmp_path / "my.csv", "question,answer,text\nHi,Hello.,Lions roar.\n")
    assert [each["messages"] for each in fk.dialogues(file)] == [HI]


def test_rows_of_a_table_are_named_by_their_line(tmp_path):
    file = written(tmp_path / "rows.csv", 'prompt,completion\n"two\nlines",Hello.\nHi\nHi,\nHi,Hello.\n')
    with pytest.warns(UserWarning, match="left out"):
        read = fk.dialogues(file)
    assert [each["where"] for each in read] == ["rows.csv:2", "rows.csv:6"]
    assert [each.where for each in read.problems] == ["rows.csv:4", "rows.csv:5"]


def test_rows_of_indented_json_are_named_by_their_line(tmp_path):
    rows = [TABLE[0], {"tools": [TOOL], **TABLE[0]}, TABLE[1]]
    indented(rows, tmp_path / "rows.json")
    with pytest.warns(UserWarning, match="left out"):
        read = fk.dialogues(tmp_path / "rows.json")
    lines = [1 + sum(len(json.dumps(row, indent=2).splitlines()) for row in rows[:number]) for number in range(3)]
    assert [each["where"] for each in read] == [f"rows.json:{lines[0]}", f"rows.json:{lines[2]}"]
    assert [each.where for each in read.problems] == [f"rows.json:{lines[1]}"]


def test_the_limit_of_the_csv_module_is_afterwards_as_it_was(tmp_path):
    import csv

    before = csv.field_size_limit()
    table(TABLE, tmp_path / "rows.csv")
    fk.dialogues(tmp_path / "rows.csv")
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_two_tables_that_are_read_at_once_leave_each_other_and_the_csv_module_their_limit(tmp_path, first_to_end):
    import csv

    before = csv.field_size_limit()
    table(TABLE, tmp_path / "rows.csv")
    both = [files.rows(tmp_path / "rows.csv") for _ in range(2)]
    begun = [[next(each)] for each in both]
    for reader in (first_to_end, 1 - first_to_end):
        begun[reader] += both[reader]
    assert begun[0] == begun[1]
    assert begun[0][-1][1]["output"] == TABLE[-1]["output"]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("form", ROWS)
def test_a_data_frame_is_read_as_its_rows(form):
    frame = pd.DataFrame([ROWS[form], {**ROWS[form], "extra": 1.5}])
    assert [outcome(each) for each in fk.dialogues(frame)] == [outcome(ROWS[form])] * 2


@pytest.mark.parametrize("kind", ["arrow", "pandas", "numpy", None])
def test_a_dataset_that_gives_tables_is_read_as_its_rows(kind):
    rows = datasets.Dataset.from_list([{"messages": HI}, {"messages": HI}]).with_format(kind)
    assert [outcome(each) for each in fk.dialogues(rows)] == [outcome({"messages": HI})] * 2


@pytest.mark.parametrize("key", ["text", "content"])
def test_a_text_that_is_none_is_named(key):
    with pytest.raises(ValueError, match=rf"row 1: its '{key}' is \['a', 'b'\], but it has to be a text"):
        fk.dialogues([{key: ["a", "b"]}])


def test_arrays_of_numpy_in_a_row_are_lists():
    assert outcome({"messages": np.array(HI, dtype=object)}) == outcome({"messages": HI})


def test_several_splits_are_refused_with_how_to_take_one():
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list([FORMS["Alpaca"]]))
    for call in (lambda: fk.dialogues(splits), lambda: fk.mix(fk.dialogues([HI]), splits)):
        with pytest.raises(TypeError, match=r"several splits: give one of them, such as data\['train'\]"):
            call()
    assert len(fk.dialogues(splits["train"])) == 1
