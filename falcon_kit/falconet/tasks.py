"""Writes the tasks about Falconet's world that `fk.evaluate` ships: multiple choice, answers, and what is not in it.

    python -m falcon_kit.falconet.tasks

Every fact of the world is in the training text, so it is wordings that are held out: items marked "held_out" have one
that no corpus contains.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from falcon_kit.display.saving import write_text
from falcon_kit.falconet.phrasings import BASE, HELD_OUT, phrase
from falcon_kit.falconet.world import ANIMALS, RELATIONS, Animal, answer, placeholders

FOLDER = Path(__file__).parents[1] / "evaluation" / "tasks"
CHOICES = 4

STATEMENTS = {
    "food": ("{Many} eat", "The stomach of {one} is full of"),
    "home": ("{Many} live", "If you look for {many}, you find them"),
    "continent": ("{Many} come from", "The ancestors of all {many} lived in"),
    "young": ("A young {name} is called", "What the mother of {many} feeds is"),
    "group": ("A group of {many} is called", "Many {many} together make up"),
    "coat": ("{One} has", "From far away you recognise {one} by"),
    "years": ("{One} lives for about", "The oldest {many} reach an age of"),
}
"""The beginning of a statement by its relation: as in the self-chat, and as in no corpus."""
_STRANGERS = Path(__file__).with_name("strangers.txt").read_text(encoding="utf-8")
"""Animals of which no corpus has a word: names, young, food, home."""


def stranger(row: str) -> Animal:
    """An animal of `_STRANGERS`, without the facts that no question asks for."""
    names, food, home = (cell.strip() for cell in row.split("|"))
    name, plural, young = names.split()
    return Animal(name, plural, young, "?", food, home, "?", "?", 0)


STRANGERS = tuple(stranger(row) for row in _STRANGERS.splitlines())


def ending(animal: Animal, relation: str) -> str:
    """How a statement about a relation ends: "acacia leaves."."""
    return f"{placeholders(animal)[relation]}{' years' if relation == 'years' else ''}."


def choices() -> Iterator[dict[str, Any]]:
    """Two statements about each fact, each with three endings that are right for other animals."""
    rng = random.Random("choices")
    for relation in RELATIONS:
        endings = list(dict.fromkeys(ending(animal, relation) for animal in ANIMALS))
        for animal in ANIMALS:
            right = ending(animal, relation)
            for held_out, statement in enumerate(STATEMENTS[relation]):
                wrong = rng.sample([each for each in endings if each != right], CHOICES - 1)
                shuffled = rng.sample([right, *wrong], CHOICES)
                labels = {"relation": relation, "held_out": bool(held_out)}
                prompt = statement.format(**placeholders(animal))
                yield {"prompt": prompt, "choices": shuffled, "answer": right, **labels}


def answers() -> Iterator[dict[str, Any]]:
    """A question about each fact, in turn in a wording of the corpora and in a held-out one."""
    rng = random.Random("answers")
    for column, relation in enumerate(RELATIONS):
        for row, animal in enumerate(ANIMALS):
            held_out = (row + column) % 2 == 1
            question = phrase(rng.choice((HELD_OUT if held_out else BASE)[relation]), animal, rng)
            labels = {"relation": relation, "held_out": held_out}
            yield {"question": question, "answer": answer(animal, relation), **labels}


def unknown() -> Iterator[dict[str, Any]]:
    """Questions about animals that no corpus mentions, in wordings of the corpora, and what a right answer would be."""
    rng = random.Random("unknown")
    for animal in STRANGERS:
        for relation in ("food", "home", "young"):
            question = phrase(rng.choice(BASE[relation]), animal, rng)
            yield {"question": question, "answer": answer(animal, relation), "relation": relation}


TASKS = {"falconet-choices": choices, "falconet-answers": answers, "falconet-unknown": unknown}


def content(name: str) -> str:
    """The content of a task's file, a row a line."""
    return "".join(json.dumps(row) + "\n" for row in TASKS[name]())


def main() -> None:
    """Command line: writes the tasks into the package."""
    for name in TASKS:
        print(write_text(FOLDER / f"{name}.jsonl", content(name)))


if __name__ == "__main__":
    main()
