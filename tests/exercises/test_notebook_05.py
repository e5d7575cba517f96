"""The checks of notebook 05 from both sides: right answers pass, typical mistakes get their hint."""

from types import SimpleNamespace

import numpy as np
import pytest

import falcon_kit as fk
from falcon_kit.exercises import notebook_05
from falcon_kit.exercises.notebook_05 import _induction_heads, _without


@pytest.fixture(scope="module")
def falconet():
    return fk.load("falconet")


@pytest.fixture(scope="module")
def heads(falconet):
    return _induction_heads(falconet)


@pytest.fixture(scope="module")
def one_head(falconet, heads):
    """The surprisal of the second copy with only one induction head, for each of them."""
    rest = [[head for head in heads if head != kept] for kept in heads]
    return [_without(falconet, others).after[51:].mean() for others in rest]


def hint(exercise, *answer):
    outcome = fk.check(exercise, *answer)
    assert not outcome
    return outcome.text


def test_the_layer_of_the_answer_passes_and_others_get_their_hint(falconet):
    assert fk.check("05.1", 4, falconet)
    assert "first row is the embedding" in hint("05.1", 5, falconet)
    assert "has rank" in hint("05.1", 0, falconet)
    assert "layers are 0 to 5" in hint("05.1", 60, falconet)


def test_the_bits_with_the_mean_pass_and_others_get_their_hint(falconet, heads):
    mean, zero = (_without(falconet, heads, replace) for replace in ("mean", "zero"))
    assert f"{zero.after[51:].mean():.2f} with zero" in fk.check("05.2", mean.after[51:].mean(), falconet).text
    assert "not `before`" in hint("05.2", mean.before[51:].mean(), falconet)
    assert "use replace='mean'" in hint("05.2", zero.after[51:].mean(), falconet)
    assert "all induction heads" in hint("05.2", 5.0, falconet)


def test_the_bits_with_one_head_pass_and_others_get_their_hint(falconet, heads, one_head):
    assert "with all: one is not enough" in fk.check("05.3", min(one_head), falconet).text
    assert "keep only one" in hint("05.3", _without(falconet, heads[:1]).after[51:].mean(), falconet)
    assert "take the lowest" in hint("05.3", max(one_head), falconet)
    assert "ablate all the others" in hint("05.3", 1.0, falconet)


def test_a_model_with_two_induction_heads_has_a_right_answer(falconet, heads, monkeypatch):
    pair = heads[:2]
    monkeypatch.setattr(notebook_05, "_induction_heads", lambda _: pair)
    alone = [_without(falconet, [head]).after[51:].mean() for head in pair]
    assert fk.check("05.3", min(alone), falconet)
    assert not fk.check("05.3", max(alone), falconet)


def test_heads_that_change_little_leave_a_right_answer(falconet, monkeypatch):
    def without(_, __, replace="zero"):
        return SimpleNamespace(before=np.full(99, 1.00), after=np.full(99, 1.01 if replace == "mean" else 1.50))

    monkeypatch.setattr(notebook_05, "_without", without)
    assert fk.check("05.2", 1.01, falconet)
    assert not fk.check("05.2", 1.00, falconet)
