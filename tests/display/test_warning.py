"""A warning names the user's line, not one of the kit."""

from pathlib import Path

import pytest

import falcon_kit as fk

USABLE, UNUSABLE = {"prompt": "Hi", "completion": "Hello."}, {"prompt": "Hi"}


def test_a_warning_of_a_function_that_is_called_names_the_line_of_the_call():
    with pytest.warns(UserWarning, match="left out") as caught:
        fk.dialogues([USABLE, UNUSABLE])
    assert [each.filename for each in caught if "left out" in str(each.message)] == [__file__]


def test_a_warning_from_deep_inside_names_the_line_of_the_call():
    with pytest.warns(UserWarning, match="left out") as caught, pytest.raises(ValueError, match="so none can be held"):
        fk.tune(fk.load("falconet", dtype="float32"), [USABLE, UNUSABLE])
    assert [each.filename for each in caught if "left out" in str(each.message)] == [__file__]


def test_all_warnings_of_the_kit_are_given_in_this_way():
    files = Path(fk.__file__).parent.rglob("*.py")
    assert [each.name for each in files if "warnings.warn(" in each.read_text(encoding="utf-8")] == ["warning.py"]
