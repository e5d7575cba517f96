"""Task files are read, and malformed rows are named by file and line."""

import json
import re

import pytest

from falcon_kit.evaluation.tasks import SHIPPED, read_task, shipped_task
from falcon_kit.falconet import corpus, evaluate, tasks
from falcon_kit.falconet.world import ANIMALS, RELATIONS

CHOICE = {"prompt": "Giraffes eat", "choices": ["leaves", "fish"], "answer": "leaves"}
ANSWER = {"question": "What do giraffes eat?", "answer": "Giraffes eat acacia leaves."}


@pytest.fixture
def file(tmp_path):
    def write(*rows):
        path = tmp_path / "animals.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return path

    return write


def test_a_task_has_the_name_of_its_file(file):
    task = read_task(file(CHOICE))
    assert (task.name, task.is_choice, task.is_question) == ("animals", True, False)


def test_an_answer_is_the_index_of_a_choice_or_its_text(file):
    task = read_task(file(CHOICE, CHOICE | {"answer": 1}))
    assert [each.answer for each in task.items] == ["leaves", "fish"]


def test_what_else_a_row_has_stays_with_it(file):
    assert read_task(file(ANSWER | {"source": "zoo"})).items[0].labels == {"source": "zoo"}


def test_a_key_that_is_none_counts_as_absent_as_tables_export_mixed_rows(file):
    empty = dict.fromkeys(["question", "prompt", "choices", "answer", "source", "where"])
    for row in (ANSWER, CHOICE):
        assert read_task(file(empty | row)).items == read_task(file(row)).items


def test_the_hash_is_of_the_items_and_not_of_labels_or_places(file):
    plain, moved = read_task(file(ANSWER)).sha256, read_task(file("", ANSWER | {"source": "zoo"})).sha256
    assert plain == moved != read_task(file(ANSWER | {"answer": "Leaves."})).sha256


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "it is not JSON"),
        ("[1]", "it is list, not an object"),
        ({"answer": "a"}, "it has no question and no prompt"),
        (ANSWER | {"prompt": "a"}, "it has both a question and a prompt"),
        (ANSWER | {"question": " "}, "its question is ' ', not a text"),
        (ANSWER | {"question": 7}, "its question is 7, not a text"),
        ({"question": "a?"}, "it has no answer"),
        (ANSWER | {"answer": None}, "it has no answer"),
        (ANSWER | {"question": None}, "it has no question and no prompt"),
        (CHOICE | {"answer": 2}, "its answer is 2, but its choices go from 0 to 1"),
        (CHOICE | {"answer": -1}, "its answer is -1, but its choices go from 0 to 1"),
        (CHOICE | {"answer": True}, "its answer True is neither the index of a choice nor the text of one"),
        (CHOICE | {"answer": "B"}, "its answer 'B' is neither the index of a choice nor the text of one"),
        (CHOICE | {"choices": ["leaves"]}, "its choices are ['leaves'], not two or more texts"),
        (CHOICE | {"choices": "leaves"}, "its choices are 'leaves', not two or more texts"),
        (CHOICE | {"choices": ["leaves", ""]}, "its choices are ['leaves', ''], not two or more texts"),
        (CHOICE | {"choices": ["leaves", "leaves"]}, "two of its choices are equal"),
        (
            ANSWER | {"where": "zoo", "acc": 1},
            "its field 'acc', 'where' has the name of a field of the results: rename",
        ),
        ('{"prompt": "half \\ud83d", "answer": "a"}', "its prompt is not valid UTF-8"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(file, row, problem):
    with pytest.raises(ValueError, match=f"1 malformed row: animals.jsonl:2: {re.escape(problem)}"):
        read_task(file(CHOICE, row))


def test_kinds_are_not_mixed_in_a_file(file):
    with pytest.raises(
        ValueError, match=r"animals\.jsonl:2 is a question, animals\.jsonl:1 a prompt with choices: write"
    ):
        read_task(file(CHOICE, ANSWER))


def test_an_empty_file_is_refused(file):
    with pytest.raises(ValueError, match=r"animals\.jsonl has no rows\. A row is"):
        read_task(file())


# The tasks about Falconet's world


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_shipped_task_is_what_the_script_writes(name):
    assert (tasks.FOLDER / f"{name}.jsonl").read_text() == tasks.content(name)
    assert {*SHIPPED} == {*tasks.TASKS}


def test_every_fact_is_asked_once_in_a_trained_and_once_in_a_held_out_statement():
    items = shipped_task("falconet-choices").items
    assert len(items) == 2 * len(ANIMALS) * len(RELATIONS) == 560
    assert sum(item.labels["held_out"] for item in items) == 280


def test_held_out_items_are_in_no_corpus_and_strangers_are_in_none():
    texts = [*corpus.documents("base", 6000, seed=5), *corpus.documents("chats", 3000, seed=5)]
    texts += [text for row in corpus.self_chat(3000, seed=5) for text in row.values()]
    text = "\n".join(texts).lower()
    items = [*shipped_task("falconet-choices").items, *shipped_task("falconet-answers").items]
    held_out = [item.text for item in items if item.labels["held_out"]]
    assert [each for each in held_out if each.lower() in text] == []
    words = {word.lower() for word in evaluate.words(text)}
    assert [each.name for each in tasks.STRANGERS if {each.name, each.plural} & words] == []
