"""Sentence templates with placeholders for an animal and its facts; `corpus.py` combines them.

{one} is "a giraffe", {One} "A giraffe", {name} "giraffe", {many} "giraffes", {Many} "Giraffes"; the facts have the names
of the fields of `world.Animal`. `sentences.json` has the templates.
"""

import json
from pathlib import Path
from typing import Any

_TEMPLATES: dict[str, Any] = json.loads(Path(__file__).with_name("sentences.json").read_text(encoding="utf-8"))

NAMES = ("Daniel", "Ada", "Ben", "Mia", "Tom", "Nora", "Omar", "Lena", "Ines", "Hugo", "Sara", "Yuki")
NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
ARTICLE: dict[str, list[str]] = _TEMPLATES["article"]
REPLY: dict[str, list[str]] = _TEMPLATES["reply"]
FOLLOW_UP: dict[str, list[str]] = _TEMPLATES["follow_up"]
STORY: list[list[str]] = _TEMPLATES["story"]
"""The sentences of a story in order, each with its alternatives."""
PRAISE: list[str] = _TEMPLATES["praise"]
FAREWELL: list[str] = _TEMPLATES["farewell"]
SMALL_TALK: list[tuple[list[str], str]] = [(questions, answer) for questions, answer in _TEMPLATES["small_talk"]]
PARTS: dict[str, list[str]] = _TEMPLATES["parts"]
"""Sentences of articles and dialogues by their place, each with its alternatives."""
