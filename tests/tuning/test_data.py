"""Reading dialogues: every form, every bad row named, nothing lost in silence; mixing by tokens."""

import itertools
import json
import os
import sys
import warnings

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.tuning import files

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
BAIZE = "The conversation between human and AI assistant.\n[|Human|] Hi\n[|AI|] Hello.\n[|Human|] "
FORMS = {
    "messages": {"messages": HI},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "Baize": {"topic": "greetings", "input": BAIZE},
    "Alpaca": {"instruction": "Hi", "input": "", "output": "Hello."},
    "a prompt and its completion": {"prompt": "Hi", "completion": "Hello."},
    "a question and its answer": {"question": "Hi", "answer": "Hello."},
    "a prompt and its completion as messages": {"prompt": HI[:1], "completion": HI[1:]},
    "a list": HI,
}


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(path):
    with pytest.warns(UserWarning, match="left out"):
        read = fk.dialogues(path)
    return [(each.where, each.reason) for each in read.problems]


# Forms


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_every_form_becomes_the_same_conversation(tmp_path, form, name):
    row = json.dumps(FORMS[form], indent=1 if name == "rows.json" else None)
    text = f"[\n{row},\n{row}\n]" if name == "rows.json" else f"{row}\n\n{row}\n"
    read = fk.dialogues(written(tmp_path / name, text))
    assert [each["messages"] for each in read] == [HI, HI]


def test_a_question_at_the_end_without_an_answer_is_dropped_and_noted(recwarn):
    rows = [
        {"messages": [*HI, {"role": "user", "content": "And then?"}]},
        FORMS["Baize"],
        {"text": ""},
        {"messages": HI},
    ]
    read = fk.dialogues(rows)
    assert [each["messages"] for each in read] == [HI, HI, HI]
    assert (read.problems[0].where, read.problems[0].cut) == ("row 1", True)
    assert "its last message, of the user, has no answer" in read.problems[0].reason
    assert "of the rows given, 1 row left out, 1 row cut: row 1: its last" in str(recwarn[0].message)
    assert "1 row left out, 1 row cut" in repr(read)


def test_a_system_text_stays_and_baizes_own_preamble_goes():
    read = fk.dialogues([{"input": "Speak like a pirate.\n[|Human|] Hi\n[|AI|] Hello."}, FORMS["Baize"]])
    assert read[0]["messages"] == [{"role": "system", "content": "Speak like a pirate."}, *HI]
    assert read[1]["messages"] == HI


def test_text_files_hold_documents_between_blank_lines(tmp_path):
    read = fk.dialogues(written(tmp_path / "web.txt", f"One\ntwo.\n\n\n{BAIZE.split(chr(10), 1)[1]}\n\nThree."))
    assert [(each["text"], len(each["messages"]), each["where"]) for each in read] == [
        ("One\ntwo.", 0, "web.txt:1"),
        (None, 2, "web.txt:5"),
        ("Three.", 0, "web.txt:9"),
    ]


def test_a_folder_and_a_list_of_files_are_read_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        written(tmp_path / name, json.dumps({"text": name}))
    assert [each["text"] for each in fk.dialogues(tmp_path)] == ["a.jsonl", "b.jsonl"]
    assert [each["text"] for each in fk.dialogues([tmp_path / "b.jsonl", tmp_path / "a.jsonl"])] == [
        "b.jsonl",
        "a.jsonl",
    ]


def test_a_folder_without_a_file_that_is_read_is_refused_with_the_endings(tmp_path):
    written(tmp_path / "rows.parquet", "")
    with pytest.raises(FileNotFoundError, match=r"has no file that ends in \.json, \.jsonl"):
        fk.dialogues(tmp_path)


def test_what_a_folder_holds_beside_its_files_is_named_and_notes_are_not(tmp_path):
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "README.md", "LICENSE", ".hidden"):
        written(tmp_path / name, json.dumps({"text": name}))
    (tmp_path / "more.jsonl").mkdir()
    found = problems(tmp_path)
    assert [where for where, _ in found] == ["b.jsonl.gz", "c.parquet", "more.jsonl"]
    assert "only files that end in .json, .jsonl" in found[0][1]
    assert "a folder in a folder, which is not read: give it by its own path" in found[2][1]


def test_a_table_with_two_columns_of_one_name_is_not_read(tmp_path):
    with pytest.raises(ValueError, match=r"z\.csv:1: it names the column 'completion' twice: the file is not read"):
        fk.dialogues(written(tmp_path / "z.csv", "prompt,completion,completion\nHi,first,second\n"))


@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "indented.json", "arrays.jsonl"])
def test_a_row_with_two_values_of_one_key_is_named_instead_of_losing_one(tmp_path, name):
    twice = '{"prompt": "first", "prompt": "second", "completion": "b"}'
    inside = '{"messages": [{"role": "user", "content": "a", "content": "c"}, {"role": "assistant", "content": "b"}]}'
    same = '{"prompt": "a", "prompt": "a", "completion": "b"}'
    rows, good = [twice, inside, same], '{"prompt": "good", "completion": "b"}'
    text = {
        "lines.jsonl": "\n".join([*rows, good]),
        "array.json": f"[{', '.join([*rows, good])}]",
        "indented.json": "\n".join(each.replace("{", "{\n", 1) for each in [*rows, good]),
        "arrays.jsonl": "\n".join(f"[{each}]" for each in [*rows, good]),
    }[name]
    read = fk.dialogues(written(tmp_path / name, text))
    assert [each["messages"][0]["content"] for each in read] == ["a", "good"]
    wrong = "twice, with different values: keep the one that is meant"
    assert [each.reason for each in read.problems] == [f"it names 'prompt' {wrong}", f"it names 'content' {wrong}"]


def test_a_frame_with_two_columns_of_one_name_is_refused_wherever_rows_are_taken(instruct):
    frame = pd.DataFrame([["a", "lost", "b", "c"]], columns=["text", "text", "stereotype", "counterpart"])
    for take in (
        fk.dialogues,
        lambda given: fk.mix(fk.dialogues([{"text": "a"}]), given),
        lambda given: fk.evaluate(instruct, text=given),
        lambda given: fk.bias(instruct, given.assign(axis="x")),
    ):
        with pytest.raises(ValueError, match="the DataFrame names the column 'text' twice: rename one of them"):
            take(frame)


def test_a_bad_answer_of_a_table_is_left_out(tmp_path):
    found = problems(written(tmp_path / "y.csv", "prompt,completion,label\nHi,Hello.,True\nHi,Go away.,False\n"))
    assert [(where, "bad answer" in reason) for where, reason in found] == [("y.csv:3", True)]


def test_the_answers_in_a_prompt_of_messages_are_only_read():
    (read,) = fk.dialogues([{"prompt": [*HI, {"role": "user", "content": "And?"}], "completion": HI[1:]}])
    assert (len(read["messages"]), read["untrained"]) == (4, [1])


def test_the_users_last_words_that_nothing_answers_are_dropped():
    assert fk.dialogues([[*HI, {"role": "user", "content": "And?"}]])[0]["messages"] == HI


@given(st.lists(st.lists(st.text(min_size=1).filter(lambda text: text.strip()), min_size=2, max_size=2), min_size=1))
def test_an_array_is_read_whatever_its_texts_and_wherever_chunks_end(tmp_path_factory, pairs):
    rows = [{"messages": [{**HI[0], "content": user}, {**HI[1], "content": answer}]} for user, answer in pairs]
    file = tmp_path_factory.mktemp("array") / "rows.json"
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("falcon_kit.tuning.files._CHUNK", 7)
        assert [each["messages"] for each in fk.dialogues(file)] == [row["messages"] for row in rows]


def test_a_large_file_is_not_held_in_memory(tmp_path):
    import tracemalloc

    row = json.dumps({"messages": [HI[0], {**HI[1], "content": "word " * 2000}]})
    file = written(tmp_path / "large.json", f"[{','.join([row] * 3000)}]")
    tracemalloc.start()
    read = fk.dialogues(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(read) == 3000
    assert peak < file.stat().st_size / 3


# Bad rows


BAD = {
    "{oops": "it is not JSON",
    '{"prompt": "x"}': "it has 'prompt', but its 'completion' is missing or empty",
    '{"prompt": "x", "response": "y"}': "its 'completion' is missing or empty: rename 'response' to 'completion'",
    '{"instruction": "x", "context": "", "response": "y"}': "its 'output' is missing or empty: rename 'response' to",
    '{"prompt": null, "completion": "x"}': "it has 'completion', but its 'prompt' is missing or empty",
    '{"instruction": "x", "input": "", "output": null}': "it has 'instruction', but its 'output' is missing or empty",
    '{"question": "Who?", "answer": ""}': "Message 2 has the content ''",
    '{"question": 5, "answer": "x"}': "its 'question' is 5 and its 'answer' 'x': both have to be texts",
    '{"prompt": ["a"], "completion": "b"}': "both have to be texts, or both lists of messages",
    '{"prompt": ["a"], "completion": ["b"]}': "Message 1 is 'a', but it must be like",
    '{"messages": "Hello"}': "its 'messages' is 'Hello', but it has to be a list of messages",
    '{"conversations": {"from": "gpt"}}': "its 'conversations' is {'from': 'gpt'}, but it has to be a list of messages",
    '{"query": "x"}': 'it has none of "messages" (chat)',
    '{"text": "  "}': "its text is blank",
    '{"input": "[|AI|] Hello\\n[|Human|] Hi"}': "Message 1 has the role 'assistant'",
    '{"messages": []}': "A conversation needs at least one message",
    '{"messages": [{"role": "user", "content": "Hi"}]}': "it has no message of the assistant",
    '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}]}': "must be a text",
    '{"conversations": [{"from": "narrator", "value": "x"}]}': "has the role 'narrator'",
    '{"text": "half a character: \\ud83d"}': "it is not valid UTF-8",
    "17": "it is 17, which is no row",
    "null": "it is None, which is no row",
    "[" * 100_000: "nested too deeply",
    '{"text": ' * 100_000: "nested too deeply",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:70])
def test_a_bad_row_is_named_by_file_and_line_and_the_others_are_kept(tmp_path, line):
    good = json.dumps({"messages": HI})
    found = problems(written(tmp_path / "rows.jsonl", f"{good}\n{line}\n{good}\n"))
    assert [where for where, _ in found] == ["rows.jsonl:2"]
    assert BAD[line] in found[0][1]


def test_a_row_in_another_encoding_is_left_out_and_the_rest_is_read(tmp_path):
    good = json.dumps({"messages": HI}).encode()
    found = problems(written(tmp_path / "rows.jsonl", good + b'\n{"text": "caf\xe9"}\n' + good))
    assert found == [("rows.jsonl:2", "it is not valid UTF-8")]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    rows = json.dumps([{"messages": HI}]).encode()
    assert len(fk.dialogues(written(tmp_path / "rows.json", b"\xef\xbb\xbf" + rows))) == 1


def test_utf_16_is_refused_with_what_converts_it(tmp_path):
    with pytest.raises(ValueError, match=r"is UTF-16: convert it first, `iconv"):
        fk.dialogues(written(tmp_path / "rows.jsonl", json.dumps({"messages": HI}).encode("utf-16")))


def test_an_array_that_was_cut_off_gives_what_is_whole_and_says_where_it_broke(tmp_path):
    text = json.dumps([{"messages": HI}] * 3, indent=1)
    found = problems(written(tmp_path / "rows.json", text[: len(text) - 60]))
    assert len(found) == 1
    assert "broken from here on" in found[0][1]


def test_an_array_that_is_nested_too_deeply_gives_the_rows_before_and_says_where_it_broke(tmp_path):
    found = problems(written(tmp_path / "rows.json", f"[{json.dumps({'messages': HI})},\n{'[' * 100_000}"))
    assert found == [("rows.json:2", "a value is nested too deeply: the rest of the file is not read")]


def test_an_array_after_an_array_is_read_too(tmp_path):
    text = json.dumps([{"messages": HI}]) + "\n" + json.dumps([{"messages": HI}, {"text": "Lions roar."}], indent=1)
    for chunk in (7, 2**20):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("falcon_kit.tuning.files._CHUNK", chunk)
            read = fk.dialogues(written(tmp_path / "rows.json", text))
        assert [each["text"] for each in read] == [None, None, "Lions roar."]


def test_what_follows_an_array_and_is_no_row_is_named(tmp_path):
    ((where, reason),) = problems(written(tmp_path / "rows.json", json.dumps([{"messages": HI}]) + "\nand so on"))
    assert (where, "broken from here on" in reason) == ("rows.json:2", True)


def test_an_array_of_rows_on_one_line_is_read_and_a_list_of_messages_is_one_row(tmp_path):
    rows = json.dumps([{"messages": HI}, {"text": "Lions roar."}])
    read = fk.dialogues(written(tmp_path / "rows.jsonl", f"{rows}\n{json.dumps(HI)}\n"))
    assert [(len(each["messages"]), each["where"]) for each in read] == [
        (2, "rows.jsonl:1"),
        (0, "rows.jsonl:1"),
        (2, "rows.jsonl:2"),
    ]


def test_a_frame_with_a_column_of_texts_and_numbers_is_read():
    frame = pd.DataFrame({"prompt": ["Hi", "Bye", None], "completion": ["Hello.", "Bye.", "?"], "id": ["1", 2, None]})
    with pytest.warns(UserWarning, match="row 3"):
        assert len(fk.dialogues(frame)) == 2


@pytest.mark.parametrize("text", ["", "[]", "\n\n"])
def test_nothing_to_read_is_an_error(tmp_path, text):
    with pytest.raises(ValueError, match=r"nothing can be used of .*rows\.json: it is empty"):
        fk.dialogues(written(tmp_path / "rows.json", text))


def test_only_bad_rows_are_an_error_that_names_them(tmp_path):
    with pytest.raises(ValueError, match=r"rows.jsonl:1: it is not JSON"):
        fk.dialogues(written(tmp_path / "rows.jsonl", "{oops"))


def test_columns_of_other_names_are_listed_once_with_the_names_to_give_them(tmp_path):
    rows = [{"query": f"What is {number}?", "reply": "A number."} for number in range(5)]
    table = pd.DataFrame(rows)
    table.to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(ValueError, match="but 'query', 'reply': rename these") as error:
        fk.dialogues(tmp_path / "rows.csv")
    assert "rows.csv:2, rows.csv:3, rows.csv:4: it has none of" in str(error.value)
    assert str(error.value).count("ShareGPT") == 1
    table.columns = ["prompt", "completion"]
    table.to_csv(tmp_path / "rows.csv", index=False)
    assert len(fk.dialogues(tmp_path / "rows.csv")) == 5


@pytest.mark.parametrize("given", ["rows.jsonl", [{"text": "A giraffe."}], None])
@pytest.mark.parametrize("use", [lambda given, _: fk.mix(given, ["Some text."]), fk.pack], ids=["mix", "pack"])
def test_what_was_not_read_by_dialogues_is_refused_with_the_call_that_reads_it(instruct, use, given):
    with pytest.raises(TypeError, match=r"takes what fk\.dialogues returns: fk\.dialogues\("):
        use(given, instruct)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        fk.dialogues(tmp_path / "absent.jsonl")


def test_texts_in_the_report_are_escaped():
    page = fk.dialogues([{"text": "<script>alert(1)</script>"}])._repr_html_()
    assert ("<script>" in page, "&lt;script&gt;alert(1)&lt;/script&gt;" in page) == (False, True)


def test_the_input_of_an_alpaca_row_stands_below_its_instruction():
    read = fk.dialogues([{"instruction": "Translate.", "input": "Chat", "output": "Cat"}])
    assert read[0]["messages"][0]["content"] == "Translate.\n\nChat"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no forks")
def test_documents_are_on_disk_until_nobody_holds_them_and_a_fork_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    held = [fk.dialogues([HI])]
    if not (child := os.fork()):
        held.clear()
        os._exit(0)
    os.waitpid(child, 0)
    assert len([*tmp_path.iterdir()]) == 1
    held.clear()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (None, TypeError, r"got nothing: give a file, a folder, or a list of rows.*Alpaca"),
        ({"messages": HI}, TypeError, "got one row: put it into a list"),
        (3, TypeError, r"got 3: give a file, a folder, or a list of rows.*Alpaca"),
        (["hello"], FileNotFoundError, r'there is no file hello: .*a text itself is \{"text": "\.\.\."\}'),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_can(given, error, text):
    with pytest.raises(error, match=text):
        fk.dialogues(given)


def test_a_file_of_another_type_is_refused_with_those_that_are_read(tmp_path):
    with pytest.raises(
        ValueError, match=r"rows\.xlsx ends in \.xlsx, but only files that end in \.json, \.jsonl.*Dataset"
    ):
        fk.dialogues(written(tmp_path / "rows.xlsx", "user,assistant"))


def test_messages_end_in_one_full_stop():
    with pytest.raises(ValueError, match=r"[^.]\. A row has"):
        fk.dialogues([{"messages": []}])


def test_an_array_is_not_copied_once_for_each_row(monkeypatch):
    copied = []

    class Text(str):
        def __getitem__(self, index):
            copied.append(index)
            return Text(str.__getitem__(self, index))

        def lstrip(self, *characters):
            return Text(str.lstrip(self, *characters))

    read = iter([Text(json.dumps([1] * 1000)), ""])
    assert len(list(files._values(lambda: next(read), True))) == 1000
    assert len(copied) < 10


# Splitting and mixing


LIONS = ["Lions roar.", "Zebras graze.", "Giraffes eat leaves."]
WEB = {
    "texts": lambda: LIONS,
    "rows with text": lambda: [{"text": each, "id": 1} for each in LIONS],
    "rows with content": lambda: [{"content": each, "url": "https://example.org"} for each in LIONS],
    "a data set": lambda: datasets.Dataset.from_dict({"content": LIONS}),
    "a data set with text": lambda: datasets.Dataset.from_dict({"text": LIONS, "dump": ["a"] * 3}),
    "a streamed data set": lambda: datasets.Dataset.from_dict({"content": LIONS}).to_iterable_dataset(),
    "a data set in numpy's format": lambda: datasets.Dataset.from_dict({"text": LIONS}).with_format("numpy"),
    "a data frame": lambda: pd.DataFrame({"content": LIONS}),
    "a column": lambda: pd.Series(LIONS),
    "documents": lambda: fk.dialogues([{"content": each} for each in LIONS]),
}


@pytest.mark.parametrize("kind", WEB)
def test_web_text_comes_in_every_kind_of_table(kind):
    mixed = fk.mix(fk.dialogues([HI] * 20), WEB[kind](), 0.1)
    chat = 20 * len("Hi\nHello.")
    needed = next(number for number in range(4) if sum(map(len, LIONS[:number])) >= chat / 9)
    assert sorted(each["text"] for each in mixed if each["text"]) == sorted(LIONS[:needed])
    assert fk.dialogues([HI] * 20).texts == 0


UNUSABLE = {
    "nothing": ("", "its text is blank"),
    "blank": ({"text": " \n"}, "its text is blank"),
    "half a pair": ("half a character: \ud83d", "it is not valid UTF-8"),
    "no text": ({"url": "https://example.org"}, "it has none of"),
    "an empty cell": ({"text": None}, "it is empty: a row has"),
    "a conversation": ({"messages": HI}, "it is a conversation, not a web text"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_no_web_text_is_named_and_the_others_are_taken(falcon, kind):
    row, reason = UNUSABLE[kind]
    with pytest.warns(UserWarning, match="1 web text is left out: web text 1: it"):
        mixed = fk.mix(fk.dialogues([HI]), [row, *LIONS], 0.2)
    assert [(each.where, each.reason[: len(reason)]) for each in mixed.problems] == [("web text 1", reason)]
    assert fk.pack(mixed, falcon).problems == ()


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_stream_without_any_web_text_does_not_go_on_for_ever(kind):
    with pytest.raises(ValueError, match="the first 100 rows have no web text: web text 1, web text 2, web text 3: it"):
        fk.mix(fk.dialogues([HI]), itertools.repeat(UNUSABLE[kind][0]))


@pytest.mark.parametrize("read", [fk.dialogues, lambda path: fk.mix(fk.dialogues([HI]), path)])
def test_an_empty_path_is_not_the_current_folder(read):
    with pytest.raises(ValueError, match="which is no path"):
        read("")


def test_web_text_that_ends_may_begin_with_a_hundred_other_rows():
    for web in ([{"url": "x"}] * 100 + LIONS, fk.dialogues([HI] * 100 + [{"text": each} for each in LIONS])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert fk.mix(fk.dialogues([HI]), web, 0.2).texts >= 1


def test_numbers_of_numpy_split_and_mix_like_pythons():
    read = fk.dialogues([HI] * 20)
    for seed in (np.int64(3), np.uint8(3)):
        assert [each["where"] for each in read.split(np.float64(0.2), seed)[1]] == [
            each["where"] for each in read.split(0.2, 3)[1]
        ]
        assert list(fk.mix(read, LIONS, np.float64(0.1), seed=seed)) == list(fk.mix(read, LIONS, 0.1, seed=3))
    assert read[np.int64(1)] == read[1]


def test_the_picture_of_documents_reads_no_text(monkeypatch):
    read = fk.dialogues([HI, {"text": "One."}, {"text": "Two."}])
    monkeypatch.setattr("datasets.Dataset.__getitem__", lambda *_: pytest.fail("a column was read"))
    assert repr(read) == "Documents(1 conversation, 2 texts)"


def test_parts_of_documents_count_their_own_texts():
    read = fk.dialogues([HI, {"text": "One."}, {"text": "Two."}, HI])
    assert [read[part].texts for part in (slice(1, 3), slice(0, 1), slice(None, None, -3), slice(0, 0))] == [2, 0, 0, 0]


def test_web_text_may_be_a_file_and_its_bad_rows_are_named(tmp_path):
    file = written(tmp_path / "web.jsonl", "\n".join(['{"text": "Zebras."}', "{oops", '{"text": "Lions."}']))
    with pytest.warns(UserWarning, match="left out"):
        mixed = fk.mix(fk.dialogues([HI]), file, 0.3)
    assert [each["text"] for each in mixed if each["text"]] == ["Zebras."]
    assert [each.where for each in mixed.problems] == ["web.jsonl:2"]


def test_a_split_is_seeded_and_loses_nothing():
    read = fk.dialogues([{"text": str(number)} for number in range(50)])
    first, second = read.split(0.2, seed=3)
    assert (len(first), len(second)) == (40, 10)
    assert sorted(each["text"] for part in (first, second) for each in part) == sorted(each["text"] for each in read)
    assert [each["text"] for each in read.split(0.2, seed=3)[1]] == [each["text"] for each in second]
    assert [each["text"] for each in read.split(0.2, seed=4)[1]] != [each["text"] for each in second]


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_web_text_takes_its_share_of_the_tokens(tokenizer, fraction):
    chats = fk.dialogues([[HI[0], {**HI[1], "content": "Giraffes eat acacia leaves. " * 8}]] * 60)
    web = [f"Text {number} about zebras." for number in range(2000)]
    mixed = fk.mix(chats, web, fraction, tokenizer=tokenizer)
    tokens = {False: 0, True: 0}
    for each in mixed:
        words = each["text"] or "\n".join(message["content"] for message in each["messages"])
        tokens[each["text"] is not None] += len(tokenizer(words)["input_ids"])
    assert tokens[True] / sum(tokens.values()) == pytest.approx(fraction, abs=0.01)


def test_a_mix_is_shuffled_by_its_seed():
    chats, web = fk.dialogues([HI] * 40), [f"web {number}" for number in range(40)]
    orders = [[each["where"] for each in fk.mix(chats, web, 0.3, seed=seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) != orders[0]


def test_web_texts_are_read_only_as_far_as_they_are_needed():
    def endless():
        while True:
            yield "web"

    assert fk.mix(fk.dialogues([HI] * 20), endless(), 0.1).texts > 0


@pytest.mark.parametrize("count", [2, 20])
def test_too_little_web_text_is_refused_with_what_would_do(count):
    chats = fk.dialogues([HI] * count)
    with pytest.raises(ValueError, match=r"give more web text, or a web_fraction of at most 0\.\d+$") as refused:
        fk.mix(chats, ["web"], 0.9)
    assert fk.mix(chats, ["web"], float(str(refused.value).split()[-1])).texts == 1


def test_without_any_web_text_no_fraction_is_advised():
    with pytest.raises(ValueError, match=r"give more web text$"):
        fk.mix(fk.dialogues([HI]), [])


@pytest.mark.parametrize("fraction", [0, 1, -0.1])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"the model card's recipe is 0\.05"):
        fk.mix(fk.dialogues([HI]), ["web"], fraction)
