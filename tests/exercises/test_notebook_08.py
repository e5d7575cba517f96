"""The checks of notebook 08 from both sides: right answers pass, typical mistakes get their hint."""

import pytest

import falcon_kit as fk

MICROSECONDS = 664.0


def half(attention, x, rotation, rank):
    """Half of the heads as the whole attention without the columns of the other half."""
    dense = attention.dense.weight.clone()
    width = dense.shape[1] // 2
    output = []
    hook = attention.dense.register_forward_pre_hook(lambda _, given: output.append(given[0]))
    attention(x, rotation, None)
    hook.remove()
    kept = slice(rank * width, (rank + 1) * width)
    return output[0][..., kept] @ dense[:, kept].T


@pytest.mark.parametrize("given", [("08.1", MICROSECONDS), ("08.2", {80, 141}), ("08.2", [141, 80]), ("08.3", half)])
def test_right_answers_pass(given):
    assert fk.check(*given)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (("08.1", MICROSECONDS / 1e6), "in seconds"),
        (("08.1", MICROSECONDS / 1e3), "in milliseconds"),
        (("08.1", 60 * MICROSECONDS), "of all layers"),
        (("08.1", MICROSECONDS / 2), "one all-reduce"),
        (("08.1", 20), "Solve read_all"),
        (("08.2", {24}), "out of 40, 80 and 141"),
        (("08.2", {40, 80, 141}), "333 GiB"),
        (("08.2", {141}), "Ask fk.plan"),
        (("08.3", 5), "the function itself"),
        (("08.3", lambda *_: None), "no tensor"),
        (("08.3", lambda attention, x, rotation, rank: attention(x, rotation, None)[0]), "the same"),
        (("08.3", lambda attention, x, rotation, rank: rank * x), "differs by"),
        (("08.3", lambda attention, x, rotation, rank: x[..., :9]), "has the shape"),
    ],
)
def test_a_typical_mistake_gets_its_hint(given, hint):
    outcome = fk.check(*given)
    assert not outcome
    assert hint in outcome.text
