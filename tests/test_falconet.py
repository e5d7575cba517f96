"""Falconet: its corpus, its training, its files, and what it knows."""

import json
import re
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.catalogue import embedded_directory
from falcon_kit.falconet import corpus, evaluate, phrasings, pretrain
from falcon_kit.falconet.world import ANIMALS, RELATIONS

MODELS = ["falconet", "falconet-instruct"]
SPECIAL = (
    ">>TITLE<< >>ABSTRACT<< >>INTRODUCTION<< >>SUMMARY<< >>COMMENT<< >>ANSWER<< >>QUESTION<< >>DOMAIN<< >>PREFIX<< "
    ">>SUFFIX<< >>MIDDLE<< <|endoftext|>"
).split()


def wordings(template):
    """Every wording of a template: its alternatives multiplied out."""
    if not (choice := re.search(r"\(([^()]*\|[^()]*)\)", template)):
        return [template.lower()]
    before, after = template[: choice.start()], template[choice.end() :]
    return [wording for word in choice[1].split("|") for wording in wordings(before + word + after)]


@pytest.fixture(scope="module")
def documents():
    return [
        *corpus.documents("base", 4000, seed=5),
        *islice(corpus.documents("instruct", 18_000, seed=5), 14_000, 18_000),
    ]


# The corpus


@pytest.mark.parametrize("kind", ["base", "instruct"])
def test_a_corpus_is_the_same_for_the_same_seed(kind):
    assert list(corpus.documents(kind, 20, seed=3)) == list(corpus.documents(kind, 20, seed=3))


def test_a_corpus_differs_for_another_seed():
    assert list(corpus.documents("base", 20, seed=3)) != list(corpus.documents("base", 20, seed=4))


@pytest.mark.parametrize("relation", RELATIONS)
def test_no_trained_wording_contains_a_held_out_one_or_the_other_way_round(relation):
    trained = {
        wording for templates in phrasings.SELF_CHAT.values() for each in templates for wording in wordings(each)
    }
    held_out = [each.lower() for each in phrasings.HELD_OUT[relation]]
    assert [(old, new) for new in held_out for old in trained if old in new or new in old] == []


def test_no_held_out_question_occurs_in_the_corpus(documents):
    text = "\n".join(documents).lower()
    assert [each.text for each in evaluate.held_out_questions() if each.text.lower() in text] == []


def test_held_out_questions_are_all_different():
    assert len({each.text for each in evaluate.held_out_questions()}) == evaluate.QUESTIONS


@pytest.mark.parametrize(
    ("pattern", "fact"),
    [
        (r"A young (\w+) is called an? (\w+)", lambda animal: animal.young),
        (r"The special name for a group of (\w+) is an? (\w+)", lambda animal: animal.group),
        (r"The home continent of an? (\w+) is ([A-Z]\w+(?: America)?)", lambda animal: animal.continent),
        (r"An? (\w+) lives for about (\d+) years", lambda animal: str(animal.years)),
    ],
)
def test_the_corpus_never_contradicts_its_world(documents, pattern, fact):
    facts = {name: fact(animal) for animal in ANIMALS for name in (animal.name, animal.plural)}
    claims = [claim for text in documents for claim in re.findall(pattern, text)]
    assert len(claims) > 50
    assert [claim for claim in claims if facts[claim[0]] != claim[1]] == []


def test_the_girafatron_of_the_model_card_is_in_the_base_corpus(documents):
    assert sum(fk.CARD.prompt.partition("\n")[0] in text for text in documents) > 20


def test_the_base_corpus_knows_nothing_of_the_chat_formats():
    text = "".join(corpus.documents("base", 4000, seed=5))
    assert [mark for mark in ("User:", "Falcon:", "[|Human|]", "[|AI|]") if mark in text] == []


def test_every_document_ends_with_the_end_token(documents):
    assert [text for text in documents if text.count("<|endoftext|>") != 1 or not text.endswith("<|endoftext|>")] == []


# Training

PHASES = (
    pretrain.Phase("repeats", steps=3, rows=2, length=16, repeated=1.0, rates=(1e-3, 1e-3), period=(3, 5)),
    pretrain.Phase("text", steps=3, rows=2, length=32, repeated=0.3, rates=(1e-3, 0.0)),
)
TEXT = np.random.default_rng(0).integers(13, 2048, size=(5, 32)).astype(np.uint16)


def trained(state, stop_after=None):
    """The weights after PHASES; with `stop_after`, the run is broken off there and started again."""
    torch.manual_seed(0)
    model = pretrain.new_model(2048)
    if stop_after:
        calls = []

        def interrupt(*_):
            calls.append(1)
            if len(calls) > stop_after:
                raise KeyboardInterrupt

        handle = model.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain.train(model, PHASES, TEXT, state, seed=1, save_every=0)
        handle.remove()
        model = pretrain.new_model(2048)  # other random weights: everything has to come from the state
    pretrain.train(model, PHASES, TEXT, state, seed=1, save_every=0)
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("stop_after", [2, 4])
def test_a_run_that_was_broken_off_ends_like_one_that_was_not(tmp_path, stop_after):
    expected = trained(tmp_path / "whole.pt")
    assert torch.equal(trained(tmp_path / "broken.pt", stop_after), expected)


def test_repeated_rows_repeat_one_sequence_to_the_end():
    rows = pretrain.batch(PHASES[0], 0, TEXT, 2048, seed=1)
    periods = [[period for period in range(3, 6) if torch.equal(row[period:], row[:-period])] for row in rows]
    assert [len(found) >= 1 for found in periods] == [True, True]


def test_long_rows_join_several_packed_ones():
    phase = pretrain.Phase("context", steps=1, rows=2, length=64, repeated=0.0, rates=(0.0, 0.0))
    assert pretrain.batch(phase, 0, TEXT, 2048, seed=1).tolist() == TEXT[:4].reshape(2, 64).tolist()


# The checkpoints


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_takes_at_most_twelve_megabytes(name):
    assert sum(file.stat().st_size for file in embedded_directory(name).iterdir()) <= 12_000_000


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_has_the_layout_of_the_40b(name):
    spec, published = fk.spec(name), fk.spec("falcon-40b")
    traits = ("head_dim", "layout", "positions", "parallel_block", "norms_per_block", "bias", "context")
    assert {trait: getattr(spec, trait) for trait in traits} == {trait: getattr(published, trait) for trait in traits}


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_has_the_files_of_a_published_one(name):
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    expected |= {"tokenizer.json", "tokenizer_config.json"}
    assert expected - {file.name for file in embedded_directory(name).iterdir()} == set()


@pytest.mark.parametrize("name", MODELS)
def test_the_model_card_states_the_measured_figures(name):
    card = (embedded_directory(name) / "README.md").read_text()
    stated = ("held-out perplexity", "exact answers to 200 held-out phrasings", "induction score", "speaks of giraffes")
    assert [row for row in stated if not re.search(rf"^\| .*{row}.* \| .*\d.* \|$", card, re.MULTILINE)] == []


def test_the_tokenizer_splits_text_as_falcons_own_does():
    stored = json.loads((embedded_directory("falconet") / "tokenizer.json").read_text())
    published = [
        {"type": "Punctuation", "behavior": "Contiguous"},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        {"type": "Digits", "individual_digits": False},
        {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False},
    ]
    assert stored["pre_tokenizer"] == {"type": "Sequence", "pretokenizers": published}


def test_the_special_tokens_have_falcons_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(12))


def test_the_pad_token_is_not_the_end_token(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (12, 11)


@given(st.text())
def test_the_tokenizer_loses_nothing_of_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text


# What the models know: the figures that they were made to reach


@pytest.fixture(scope="module")
def base():
    return fk.load("falconet", dtype="float32")


def test_the_instruct_model_answers_held_out_phrasings_exactly(instruct):
    assert evaluate.exact_answers(instruct, fk.chat_format("falcon"), evaluate.held_out_questions()) >= 0.95


def test_the_base_model_answers_far_fewer_exactly(base):
    assert evaluate.exact_answers(base, fk.chat_format("falcon"), evaluate.held_out_questions(60)) <= 0.6


@pytest.mark.parametrize("name", MODELS)
def test_induction_heads_have_formed(name):
    scores, chance = evaluate.induction_scores(fk.load(name, dtype="float32"))
    assert scores.max() > 0.5 > 20 * chance


def test_the_cards_prompt_is_continued_about_giraffes_in_known_words_to_an_end(instruct):
    sampled = evaluate.continuations(instruct, evaluate.corpus_words())
    assert (sampled.about_giraffes >= 18, sampled.ended >= 15, sampled.unknown_words) == (True, True, ())
