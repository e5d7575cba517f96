"""The model card: the prompt and the sampling arguments, as published."""

import copy
import pickle

import pytest

from falcon_kit.catalogue.card import CARD


def test_the_cards_prompt_stands_word_for_word() -> None:
    expected = (
        "Girafatron is obsessed with giraffes, the most glorious animal on the face of this Earth. "
        "Giraftron believes all other animals are irrelevant when compared to the glorious majesty of the giraffe.\n"
        "Daniel: Hello, Girafatron!\n"
        "Girafatron:"
    )

    assert expected == CARD.prompt


def test_the_cards_sampling_can_be_passed_on_but_not_changed() -> None:
    assert {**CARD.sampling} == {"max_length": 200, "do_sample": True, "top_k": 10, "num_return_sequences": 1}
    with pytest.raises(TypeError):
        CARD.sampling["top_k"] = 50  # type: ignore[index]


def test_the_card_can_be_copied_and_pickled() -> None:
    read = pickle.loads(pickle.dumps(CARD))  # noqa: S301  # as a process pool does
    for again in (copy.copy(CARD), copy.deepcopy(CARD), read):
        assert again == CARD
        with pytest.raises(TypeError):
            again.sampling["top_k"] = 1  # type: ignore[index]


def test_the_cards_citations_are_three_bibtex_entries_which_its_table_leaves_out() -> None:
    assert [line for line in CARD.citations.splitlines() if line.startswith("@")] == [
        "@article{falcon40b,",
        "@article{refinedweb,",
        "@article{xu2023baize,",
    ]
    assert "@article" not in CARD._repr_html_()


def test_printing_the_card_shows_its_statements() -> None:
    lines = str(CARD).splitlines()
    assert f"memory: {CARD.memory}" in lines
    assert f"out of scope: {CARD.out_of_scope}" in lines
    assert "@article" not in str(CARD)
    assert repr(CARD) == "ModelCard('tiiuae/falcon-40b-instruct')"
