"""The facts that Falconet is trained on: forty animals, seven facts each.

The facts are common knowledge, simplified to one answer per question so that answers can be compared exactly.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

RELATIONS = ("food", "home", "continent", "young", "group", "coat", "years")

_TABLE = Path(__file__).with_name("world.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Animal:
    """One animal and its facts, each in the form in which sentences use it."""

    name: str
    """Singular: "giraffe"."""
    plural: str
    """"giraffes"."""
    young: str
    """What its young is called: "calf"."""
    group: str
    """What a group is called: "tower"."""
    food: str
    """What it eats: "acacia leaves"."""
    home: str
    """Where it lives, with its preposition: "in the savanna"."""
    continent: str
    """Where it comes from: "Africa"."""
    coat: str
    """How it looks: "a yellow coat with brown patches"."""
    years: int
    """How long it lives, in years."""

    @cached_property
    def one(self) -> str:
        """The singular with its article: "a giraffe", "an owl"."""
        return with_article(self.name)


def with_article(noun: str) -> str:
    """`noun` with its indefinite article: "an owl", "a fox"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def placeholders(animal: Animal) -> dict[str, Any]:
    """The value of each placeholder of the templates: the animal's fields, most of them as they are."""
    forms = {
        "one": animal.one,
        "One": animal.one.capitalize(),
        "many": animal.plural,
        "Many": animal.plural.capitalize(),
        "young": with_article(animal.young),
        "group": with_article(animal.group),
    }
    return vars(animal) | forms


def _parse(row: str) -> Animal:
    names, food, home, continent, coat, years = (cell.strip() for cell in row.split("|"))
    name, plural, young, group = names.split()
    return Animal(name, plural, young, group, food, home, continent, coat, int(years))


ANIMALS: tuple[Animal, ...] = tuple(_parse(row) for row in _TABLE.splitlines())


def answer(animal: Animal, relation: str) -> str:
    """The exact sentence that falconet-instruct is trained to answer: "Giraffes eat acacia leaves."."""
    plural = animal.plural.capitalize()
    return {
        "food": f"{plural} eat {animal.food}.",
        "home": f"{plural} live {animal.home}.",
        "continent": f"{plural} come from {animal.continent}.",
        "young": f"A young {animal.name} is called {with_article(animal.young)}.",
        "group": f"A group of {animal.plural} is called {with_article(animal.group)}.",
        "coat": f"{animal.one.capitalize()} has {animal.coat}.",
        "years": f"{animal.one.capitalize()} lives for about {animal.years} years.",
    }[relation]
