"""The checks of notebook 03 from both sides: right answers pass, typical mistakes get their hint."""

import pytest

import falcon_kit as fk

SPLIT = ["Falconers", "photographed", "kestrel", "hovering", "above", "motorway"]
OTHER = ["Akvo bolas je cent gradoj."] * 5
CODE = fk.sample_texts()["Python"]
TEXTS = {"spaces": CODE, "tabs": CODE.replace("    ", "\t")}


def pieces(tokenizer, text):
    return [token.text for token in fk.tokens(text, tokenizer).tokens]


def share(tokenizer, rule):
    found = {name: pieces(tokenizer, text) for name, text in TEXTS.items()}
    return {name: sum(rule(each) for each in tokens) / len(tokens) for name, tokens in found.items()}


def hint(exercise, *answer):
    outcome = fk.check(exercise, *answer)
    assert not outcome
    return outcome.text


def test_right_answers_pass(tokenizer):
    assert fk.check("03.1", SPLIT, tokenizer)
    assert fk.check("03.2", OTHER, tokenizer)
    right = share(tokenizer, lambda piece: not piece.strip())
    assert (
        f"{right['spaces']:.1%} with spaces and {right['tabs']:.1%} with tabs"
        in fk.check("03.3", right, tokenizer).text
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("Falconers", "a list of words"),
        (["Falcon", "ers"], "not their pieces"),
        ([*SPLIT, "the"], "one token each"),
        (SPLIT[:4], "2 more words"),
    ],
)
def test_a_wrong_list_of_words_gets_its_hint(words, text, tokenizer):
    assert text in hint("03.1", words, tokenizer)


@pytest.mark.parametrize(
    ("sentences", "text"),
    [
        ("Akvo", "a list of sentences"),
        (fk.sample_texts()["English"], "translate them"),
        (OTHER[:3], "Translate all 5"),
        (["A."] * 5, "too short"),
    ],
)
def test_wrong_sentences_get_their_hint(sentences, text, tokenizer):
    assert text in hint("03.2", sentences, tokenizer)


def test_wrong_shares_get_their_hint(tokenizer):
    right = share(tokenizer, lambda piece: not piece.strip())
    characters = {name: sum(each.isspace() for each in text) / len(text) for name, text in TEXTS.items()}
    assert "divide it by 100" in hint("03.3", {name: 100 * each for name, each in right.items()}, tokenizer)
    assert "*only* white space" in hint("03.3", share(tokenizer, lambda piece: piece != piece.strip()), tokenizer)
    assert "not characters" in hint("03.3", characters, tokenizer)
    assert "tokens without text" in hint("03.3", {"spaces": 0.9, "tabs": 0.9}, tokenizer)
