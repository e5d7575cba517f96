"""The checks of notebook 01 from both sides: right answers pass, typical mistakes get their hint."""

import pytest
import torch

import falcon_kit as fk

LOGITS = torch.tensor([[3.0, 2.0, *[0.0] * 30]])
PENGUINS = fk.CARD.prompt.replace("Girafatron", "Ada").replace("Giraftron", "Ada").replace("giraffe", "penguin")
TEMPERATURE = next(t / 1000 for t in range(100, 9000) if (LOGITS * 1000 / t).softmax(-1).max() <= 0.1)


def hint(exercise, *answer):
    outcome = fk.check(exercise, *answer)
    assert not outcome
    return outcome.text


def sentence(falcon, prompt):
    return f"{falcon.generate(prompt, seed=0, stop='.', **fk.CARD.sampling).text}."


def test_right_answers_pass(instruct):
    assert fk.check("01.1", TEMPERATURE, LOGITS)
    assert fk.check("01.2", sentence, instruct)
    assert fk.check("01.3", PENGUINS, instruct)


@pytest.mark.parametrize(
    ("answer", "text"), [(0, "above 0"), (0.2, "raise it"), (8, "lower it"), (1 / TEMPERATURE, "one over your answer")]
)
def test_a_wrong_temperature_gets_its_hint(answer, text):
    assert text in hint("01.1", answer, LOGITS)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda *_: None, "return the text"),
        (lambda *_: ["a."], "as a string"),
        (lambda *_: " I am", "has no full stop"),
        (lambda *_: " One. Two. Three.", "stop earlier"),
    ],
)
def test_a_wrong_function_gets_its_hint(function, text):
    assert text in hint("01.2", function, None)


def streamed(falcon, prompt):
    text = ""
    for piece in falcon.stream(prompt, seed=0, **fk.CARD.sampling):
        text += piece.text
        if "." in text:
            break
    return text


def test_a_stream_that_is_left_passes_and_a_text_that_is_cut_afterwards_gets_its_hint(instruct):
    def cut(falcon, prompt):
        return falcon.generate(prompt, seed=0, **fk.CARD.sampling).text.partition(".")[0] + "."

    assert fk.check("01.2", streamed, instruct)
    assert "do not cut the text afterwards" in hint("01.2", cut, instruct)


def test_a_prompt_about_other_animals_gets_its_hint(instruct):
    assert "still has giraffes" in hint("01.3", fk.CARD.prompt, instruct)
    assert "mentions no penguin" in hint("01.3", PENGUINS.replace("penguin", "owl"), instruct)
