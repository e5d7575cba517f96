"""Templates of questions about an animal: two sets for training, and a held-out set whose wordings no corpus contains.

`(a|b)` is one of the two words; {one} is "a giraffe", {name} "giraffe", {many} "giraffes". `phrasings.json` has the
templates, by relation of `world.RELATIONS`.
"""

import json
import random
import re
from pathlib import Path

from falcon_kit.falconet.world import Animal, placeholders

_TEMPLATES = json.loads(Path(__file__).with_name("phrasings.json").read_text(encoding="utf-8"))

BASE: dict[str, tuple[str, ...]] = {relation: tuple(each) for relation, each in _TEMPLATES["base"].items()}
SELF_CHAT = {
    relation: (
        *BASE[relation],
        *_TEMPLATES["more"][relation],
        *(
            frame.replace("{topic}", topic)
            for frame in _TEMPLATES["frames"]
            for topic in _TEMPLATES["topics"][relation]
        ),
    )
    for relation in BASE
}
"""The questions of the self-chat: more wordings than in the base corpus, so that the model learns to answer unseen ones."""
HELD_OUT: dict[str, tuple[str, ...]] = {relation: tuple(each) for relation, each in _TEMPLATES["held_out"].items()}

OPENERS = ("", "", "", "", "", "Hello! ", "Please tell me: ", "Hi! ", "Quick question: ", "I have a question. ")

_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")


def phrase(template: str, animal: Animal, rng: random.Random) -> str:
    """One wording of `template` about `animal`: alternatives drawn by `rng`, first letter capitalised."""
    chosen = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
    text = chosen.format(**placeholders(animal))
    return text[0].upper() + text[1:]


def ask(animal: Animal, templates: tuple[str, ...], rng: random.Random) -> str:
    """A question from one of `templates`, in half of the cases after an opener such as "Hello! "."""
    return rng.choice(OPENERS) + phrase(rng.choice(templates), animal, rng)
