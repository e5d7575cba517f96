"""Falconet: its corpus, its training, its files, and its figures."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.falconet import corpus, evaluate, finetune, phrasings, pretrain
from falcon_kit.falconet.world import ANIMALS, RELATIONS
from falcon_kit.loading import adapters

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
        *corpus.documents("chats", 1000, seed=5),
        *(text + corpus.END for row in corpus.self_chat(4000, seed=5) for text in row.values()),
    ]


# The corpus

TRAINED_ON = {  # SHA-256 of the files that the embedded models were trained on
    "base": "2591e4b00f558bed084f8b84be74e9b56055f7912c69a9405d370dc8dc3b1abc",
    "chats": "80c7fc3989005df123d07f4c2c07e6ac5eeabd646e97c12c5fb66fe496dc97f8",
    "self-chat": "6faaf403a7f4bd0007fd402011c338820dbab8eee335a0ce329b110ea7e6e3ce",
}


@pytest.mark.parametrize("kind", corpus.SIZES)
def test_the_corpora_are_those_that_the_embedded_models_were_trained_on(kind, tmp_path):
    file = corpus.write(kind, corpus.SIZES[kind], 0, tmp_path)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == TRAINED_ON[kind]


@pytest.mark.parametrize("kind", ["base", "chats"])
def test_a_corpus_is_the_same_for_the_same_seed(kind):
    assert list(corpus.documents(kind, 20, seed=3)) == list(corpus.documents(kind, 20, seed=3))


def test_a_corpus_differs_for_another_seed():
    assert list(corpus.documents("base", 20, seed=3)) != list(corpus.documents("base", 20, seed=4))
    assert list(corpus.self_chat(20, seed=3)) != list(corpus.self_chat(20, seed=4))


def test_the_self_chat_is_read_as_files_of_baize_are():
    read = fk.dialogues(corpus.self_chat(300, seed=3))
    assert (len(read), read.problems, 0 < read.texts < 30) == (300, (), True)
    assert {each["role"] for row in read for each in row["messages"]} == {"user", "assistant"}


@pytest.mark.parametrize("relation", RELATIONS)
def test_no_trained_wording_contains_a_held_out_one_or_the_other_way_round(relation):
    trained = {
        wording for templates in phrasings.SELF_CHAT.values() for each in templates for wording in wordings(each)
    }
    held_out = [each.lower() for each in phrasings.HELD_OUT[relation]]
    assert [(old, new) for new in held_out for old in trained if old in new or new in old] == []


def test_no_held_out_question_occurs_in_the_corpus(documents):
    text = "\n".join(documents).lower()
    assert [each.text for each in evaluate.held_out_questions().items if each.text.lower() in text] == []


def test_held_out_questions_are_all_different():
    assert len({each.text for each in evaluate.held_out_questions().items}) == evaluate.QUESTIONS


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


# Fine-tuning


@pytest.fixture(scope="module")
def packed(base):
    return finetune.packed(base, fk.dialogues(corpus.self_chat(400, seed=3)), seed=0)


def test_half_of_the_self_chat_is_in_each_chat_format(packed):
    texts = [packed.tokenizer.decode(packed.example(index).ids) for index in range(len(packed.lengths))]
    counts = {mark: sum(mark in text for text in texts) for mark in ("User:", "[|Human|]")}
    assert all(150 <= count <= 200 for count in counts.values()), counts


def test_about_a_twentieth_of_the_tokens_is_web_text(packed):
    # of the text it is exactly that; the role marks of the chat formats are added to the chats
    web = [packed.lengths[i] for i in range(len(packed.lengths)) if packed.example(i).where.startswith("web text")]
    assert 0.04 < sum(web) / packed.tokens <= 0.05


def test_no_held_out_text_is_among_the_web_texts_of_the_adapter():
    web = {text + corpus.END for seed in (0, 1) for text in finetune._web_texts(seed)}
    assert web.intersection(evaluate.held_out_texts(300)) == set()


def test_only_the_adapter_is_shipped_and_not_its_curve(tmp_path, base):
    rows = list(corpus.self_chat(30, seed=3))
    run = fk.tune(base, rows, output_dir=tmp_path / "run", max_steps=1, context=256, held_out=0, quiet=True)
    finetune.ship(run.adapter, tmp_path / "shipped")
    assert sorted(file.name for file in (tmp_path / "shipped").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tuning.json",
    ]
    assert adapters.record(tmp_path / "shipped") == {**adapters.record(run.adapter), "history": []}


# Training

PHASES = (
    pretrain.Phase("repeats", steps=3, rows=2, length=16, repeated=1.0, rates=(1e-3, 1e-3), period=(3, 5)),
    pretrain.Phase("text", steps=3, rows=2, length=32, repeated=0.3, rates=(1e-3, 0.0)),
)
TEXT = np.random.default_rng(0).integers(13, 2048, size=(5, 32)).astype(np.uint16)


def trained(state, stop_after=None):
    """The weights after PHASES; with `stop_after`, the run is interrupted there and started again."""
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
        model = pretrain.new_model(2048)  # other random weights: everything must be restored from the state
    pretrain.train(model, PHASES, TEXT, state, seed=1, save_every=0)
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("stop_after", [2, 4])
def test_a_run_that_was_broken_off_ends_like_one_that_was_not(tmp_path, stop_after):
    expected = trained(tmp_path / "whole.pt")
    assert torch.equal(trained(tmp_path / "broken.pt", stop_after), expected)


@pytest.mark.parametrize(("seed", "phases", "text"), [(2, PHASES, TEXT), (1, PHASES[:1], TEXT), (1, PHASES, TEXT + 1)])
def test_the_state_of_another_training_is_refused(tmp_path, seed, phases, text):
    trained(tmp_path / "base.pt")
    with pytest.raises(ValueError, match=r"base\.pt is of a training with another (seed|phases|text): delete it"):
        pretrain.train(pretrain.new_model(2048), phases, text, tmp_path / "base.pt", seed)


def test_an_unknown_corpus_is_named_with_the_nearest():
    with pytest.raises(LookupError, match=r"Unknown corpus 'chat'\. Nearest: chats"):
        next(corpus.documents("chat", 1, seed=0))


def test_repeated_rows_repeat_one_sequence_to_the_end():
    rows = pretrain.batch(PHASES[0], 0, TEXT, 2048, seed=1)
    periods = [[period for period in range(3, 6) if torch.equal(row[period:], row[:-period])] for row in rows]
    assert [len(fitting) >= 1 for fitting in periods] == [True, True]


def test_long_rows_join_several_packed_ones():
    phase = pretrain.Phase("context", steps=1, rows=2, length=64, repeated=0.0, rates=(0.0, 0.0))
    assert pretrain.batch(phase, 0, TEXT, 2048, seed=1).tolist() == TEXT[:4].reshape(2, 64).tolist()


# The checkpoints


@pytest.mark.parametrize(("name", "most"), [("falconet", 12_000_000), ("falconet-instruct", 2_000_000)])
def test_what_is_embedded_is_small(name, most):
    assert sum(file.stat().st_size for file in embedded_directory(name).iterdir()) <= most


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_has_the_layout_of_the_40b(name):
    spec, published = fk.spec(name), fk.spec("falcon-40b")
    traits = ("head_dim", "layout", "positions", "parallel_block", "norms_per_block", "bias", "context")
    assert {trait: getattr(spec, trait) for trait in traits} == {trait: getattr(published, trait) for trait in traits}


def test_the_checkpoint_has_the_files_of_a_published_one():
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    expected |= {"tokenizer.json", "tokenizer_config.json"}
    assert expected - {file.name for file in embedded_directory("falconet").iterdir()} == set()


def test_the_adapter_was_trained_from_the_base_that_ships_with_it(base):
    known = adapters.record(embedded_directory("falconet-instruct"))
    assert known["base"] == "falconet"
    assert known["base_fingerprint"] == adapters.model_fingerprint(base.model.transformer)


def test_the_adapters_own_figures_say_that_it_learned_to_answer_and_to_stop():
    figures = adapters.record(embedded_directory("falconet-instruct"))["figures"]
    assert (figures["stop rate before"] < 0.5, figures["stop rate after"] > 0.95) == (True, True)
    assert (figures["exact answers before"] < 0.2, figures["exact answers after"] > 0.95) == (True, True)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_card_is_the_template_with_the_measured_figures(name):
    card = (embedded_directory(name) / "README.md").read_text()
    figures = dict(re.findall(r"^\| (\S.*?) \| (.+) \|$", card, re.MULTILINE))
    assert len(figures) == 8
    assert card == evaluate.model_card(fk.spec(name), figures)


def test_the_rows_of_the_model_card_are_the_measured_ones(base, monkeypatch):
    monkeypatch.setattr(evaluate, "CONTINUATIONS", 1)
    monkeypatch.setattr(evaluate, "exact_answers", lambda *_: 0.5)
    monkeypatch.setattr(evaluate, "perplexity", lambda _: 1.5)
    card = (embedded_directory("falconet") / "README.md").read_text()
    assert [row for row in evaluate.measure(base, set()) if f"\n| {row} | " not in card] == []


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


# The figures that the models are trained to reach


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
    about_giraffes, ended, unknown_words = evaluate.continuations(instruct, evaluate.corpus_words())
    assert (about_giraffes >= 18, ended >= 15, unknown_words) == (True, True, [])
