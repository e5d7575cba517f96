"""The checks of notebook 04 from both sides: right answers pass, typical mistakes get their hint."""

import pytest

import falcon_kit as fk
from falcon_kit.exercises.notebook_04 import _changes_without_rotation

SPEC = fk.spec("falcon-40b")
MLP = SPEC.layers * 2 * SPEC.d_model * SPEC.intermediate_size
COUNTS = {"MLP": MLP, "attention": SPEC.layers * SPEC.layer_parameters - MLP, "embedding": SPEC.embedding_parameters}
SHARES = {part: count / SPEC.parameters for part, count in COUNTS.items()}


def hint(exercise, *answer):
    outcome = fk.check(exercise, *answer)
    assert not outcome
    return outcome.text


def test_right_answers_pass(instruct):
    assert fk.check("04.1", SHARES)
    assert fk.check("04.2", 496 / 1024)
    assert fk.check("04.3", _changes_without_rotation(instruct), instruct)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({part: 100 * share for part, share in SHARES.items()}, "in percent"),
        (SHARES | {"MLP": SHARES["MLP"] / 2}, "two matrices"),
        (SHARES | {"attention": SHARES["attention"] / 60}, "one layer"),
        (SHARES | {"embedding": 0.5}, "count its parameters"),
    ],
)
def test_wrong_shares_get_their_hint(changed, text):
    assert text in hint("04.1", changed)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (48.4375, "in percent"),
        (528 / 1024, "that are computed"),
        (28 / 64, "512 tokens"),
        (0.5, "diagonal"),
        (0.1, "above the diagonal"),
    ],
)
def test_a_wrong_share_of_tiles_gets_its_hint(share, text):
    assert text in hint("04.2", share)


def test_wrong_changes_get_their_hint(instruct):
    right = _changes_without_rotation(instruct)
    assert "one for each token" in hint("04.3", right[1:], instruct)
    assert "Nothing changed" in hint("04.3", [0.0] * len(right), instruct)
    assert "first token" in hint("04.3", [0.3, *right[1:]], instruct)
    assert "token by token" in hint("04.3", [0.0, *[0.3] * (len(right) - 1)], instruct)
