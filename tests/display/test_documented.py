"""The help of a dataclass: its docstring, and below it each field with its text."""

import dataclasses
import inspect
from dataclasses import dataclass, field

import pytest

import falcon_kit as fk
from falcon_kit.display.documented import documented

CLASSES = [name for name in fk.__all__ if dataclasses.is_dataclass(getattr(fk, name))]
CLASSES = [name for name in CLASSES if inspect.isclass(getattr(fk, name))]


@documented
@dataclass
class Box:
    """A box."""

    width: int = 3
    """How wide it is,
    in metres."""
    _secret: int = 0
    """Not shown."""
    colours: list[str] = field(default_factory=list)

    def opened(self) -> bool:
        """A method has help of its own."""
        return True


@dataclass
class Crate(Box):
    pass


def test_help_shows_the_docstring_and_each_public_field_with_its_text():
    text = "A box.\n\nFields:\n\nwidth: int = 3\n    How wide it is,\n    in metres.\ncolours: list[str]"
    assert Box.__doc__ == inspect.getdoc(Box) == Box().__doc__ == text


def test_fields_are_found_in_a_class_that_stores_no_annotations():
    @documented
    @dataclass
    class Lid:
        """A lid."""

        colour: str = "red"

    del Lid.__annotations__  # as in Python 3.14, which makes them when they are asked for
    assert Lid.__doc__ == "A lid.\n\nFields:\n\ncolour: str = 'red'"


def test_a_subclass_has_its_own_help():
    assert "Fields" not in (Crate.__doc__ or "")


def test_without_a_source_the_help_is_the_docstring():
    namespace = {}
    exec("class Made:\n    '''Made here.'''\n    size: int", namespace)  # noqa: S102  # a class without a source
    assert documented(namespace["Made"]).__doc__ == "Made here."


@pytest.mark.parametrize("name", CLASSES)
def test_the_help_of_a_public_class_names_its_public_fields(name):
    kind = getattr(fk, name)
    names = [each.name for each in dataclasses.fields(kind) if each.init and not each.name.startswith("_")]
    lines = (inspect.getdoc(kind) or "").splitlines()
    assert [each for each in names if not any(line.startswith(f"{each}: ") for line in lines)] == []


def test_the_help_of_settings_says_what_they_do():
    assert "seed: int | None = None\n    The same seed gives the same text" in fk.Sampling.__doc__
    assert "patience: int | None = None\n    Stop after this many evaluations" in fk.Tuning.__doc__
    assert "phone_regions: Sequence[str] = ('US',)\n    Regions whose telephone numbers" in fk.Guardrails.__doc__
