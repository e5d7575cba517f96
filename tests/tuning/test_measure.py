"""Rates of answers to held-out conversations."""

from bisect import bisect_right
from types import SimpleNamespace

import pytest

import falcon_kit as fk
from falcon_kit.falconet.corpus import self_chat
from falcon_kit.generation.chat import encode
from falcon_kit.tuning.measure import answer_rates, short_rows
from tests.tuning.small_runs import talk


def test_a_model_that_learned_it_ends_and_is_right_and_its_base_is_not(instruct):
    chats = fk.dialogues(self_chat(40, seed=9))
    learned, base = (answer_rates(each, chats, 30, 512) for each in (instruct, fk.load("falconet")))
    assert (learned["stop rate"] == 1, learned["exact answers"] > 0.9) == (True, True)
    assert base["exact answers"] < 0.3


def test_rates_are_shares_of_the_answers(instruct):
    right, wrong = talk("What do giraffes eat?", "Giraffes eat acacia leaves."), talk("What do giraffes eat?", "Cake.")
    assert answer_rates(instruct, fk.dialogues([right, right, right, wrong]), 4, 512)["exact answers"] == 0.75


def test_no_more_are_asked_than_wanted_and_texts_not_at_all(instruct):
    documents = fk.dialogues([{"text": "Giraffes."}, talk("What do giraffes eat?", "Cake."), talk("Who?", "Nobody.")])
    right = talk("What do giraffes eat?", "Giraffes eat acacia leaves.")
    assert answer_rates(instruct, [right, *documents], 1, 512)["exact answers"] == 1


def test_conversations_that_do_not_fit_are_not_asked(instruct):
    assert answer_rates(instruct, fk.dialogues([talk("Tell me all. " * 200, "No.")]), 5, 512) == {}


def test_a_long_conversation_takes_no_room_from_the_answers_of_others(instruct):
    right = talk("What do giraffes eat?", "Giraffes eat acacia leaves.")
    long = talk("a" * _longest(instruct), "No.")
    assert answer_rates(instruct, fk.dialogues([right, right, long, right]), 4, 2048)["exact answers"] >= 0.75


def _longest(falcon):
    """The most letters of a question for which a short answer fits into the context."""
    length = lambda count: len(  # noqa: E731
        encode(talk("a" * count, "No.")["messages"], falcon.tokenizer, falcon.chat_format, False)
    )
    return bisect_right(range(8192), 2048, key=length) - 1


def test_web_text_may_be_plain_texts_as_for_mix_beside_the_names_of_files(instruct, tmp_path):
    texts, file = ["Lions roar.", "狮子吼叫。" * 100], tmp_path / "web"
    (file / "more").mkdir(parents=True)
    (file / "texts.txt").write_text("Cows moo.")
    with pytest.warns(UserWarning, match="more: it is a folder in a folder"):
        rows = short_rows([*texts, str(file), file / "texts.txt"], instruct)
    expected = short_rows([{"text": each} for each in (*texts, "Cows moo.", "Cows moo.")], instruct)
    assert rows.examples.to_dict()["ids"] == expected.examples.to_dict()["ids"]
    for missing in ("web.jsonl", "no such file.TXT"):
        with pytest.raises(FileNotFoundError, match=f"there is no file {missing}"):
            short_rows(["Lions roar.", missing], instruct)


def test_rows_that_are_packed_already_are_taken_as_they_are(instruct):
    rows = fk.pack(fk.dialogues([{"text": "Lions roar."}]), instruct, 128)
    assert short_rows(rows, instruct) is rows


@pytest.fixture
def asked(monkeypatch):
    """The settings of each batch; each answer is that of `answers`, and ends."""
    seen, answers = [], []

    def generate(model, tokenizer, prompts, **settings):
        seen.append((len(prompts), settings["max_new_tokens"]))
        return [_Answer(answers.pop(0)) for _ in prompts]

    monkeypatch.setattr("falcon_kit.tuning.measure.generate", generate)
    return SimpleNamespace(seen=seen, answers=answers)


class _Answer(str):
    finish_reason = "eos"


def test_a_long_answer_has_room(instruct, asked):
    text = " ".join(["Lions roar."] * 300)
    asked.answers += [text]
    assert answer_rates(instruct, fk.dialogues([talk("Hi", text)]), 1, 2048)["exact answers"] == 1
    assert asked.seen[0][1] >= len(instruct.tokenizer(text)["input_ids"])


def test_no_batch_leaves_less_room_than_its_longest_answer(instruct, asked):
    short, long = "lions " * 100, "lions " * 600
    rows = [talk(long, "Yes."), talk("Hi", long), *[talk("Hi", "Yes.")] * 20, talk(short, long)]
    asked.answers += ["Yes."] * len(rows)
    answer_rates(instruct, fk.dialogues(rows), len(rows), 2048)
    longest = len(instruct.tokenizer(long)["input_ids"])
    assert sum(count for count, _ in asked.seen) == len(rows)
    assert sum(room >= longest for _, room in asked.seen) >= 1
    assert all(count <= 16 for count, _ in asked.seen)


def test_an_answer_is_exact_as_the_chat_format_writes_it(asked):
    asked.answers += ["Leaves.\nOf acacias."]
    hub = fk.load("falconet-instruct", chat="hub")
    rates = answer_rates(hub, fk.dialogues([talk("What do giraffes eat?", "Leaves.\n\nOf acacias.")]), 1, 512)
    assert rates["exact answers"] == 1
