"""Errors about unknown names, and checks."""

import pytest

from falcon_kit.display.errors import require, unknown_name

MODELS = ("falcon-40b", "falcon-7b")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("tiiuae/Falcon-40", "Unknown model 'tiiuae/Falcon-40'. Nearest: falcon-40b, falcon-7b."),
        ("gpt2", "Unknown model 'gpt2'. Known: falcon-40b, falcon-7b."),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_or_with_all(given, expected):
    assert expected == unknown_name("model", given, MODELS)


def test_a_check_raises_its_message_only_when_it_fails():
    require(True, "not raised")
    with pytest.raises(ValueError, match="batch=0: give at least 1"):
        require(False, "batch=0: give at least 1")
