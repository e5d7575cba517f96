"""Rates of answers to held-out conversations."""

import falcon_kit as fk
from falcon_kit.falconet.corpus import self_chat
from falcon_kit.tuning.measure import answer_rates
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
