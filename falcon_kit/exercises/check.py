"""`check`: compares a reader's answer with the exercise, and returns a hint where it is not right."""

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from falcon_kit.display.errors import unknown_name
from falcon_kit.exercises.outcome import Hint, Outcome


def check(exercise: str | float, answer: Any = None, *given: Any) -> Outcome:
    """Whether the answer to an exercise of a notebook is right, and otherwise a hint. Nothing is raised.

    exercise: notebook and exercise, such as "06.1". given: what the exercise asks to pass besides, such as the model.
    """
    typed, known = str(exercise).strip(), all_checks()
    if (number := typed.zfill(4)) not in known:
        return Outcome(typed, False, unknown_name("exercise", typed, list(known)))
    form = (inspect.getdoc(known[number]) or "").replace("\n", " ")
    if _is_empty(answer):
        return Outcome(number, False, f"There is no answer yet. Expected: {form}")
    try:
        return Outcome(number, True, known[number](answer, *given))
    except Hint as hint:
        return Outcome(number, False, str(hint))
    except Exception as error:  # noqa: BLE001 (an answer can be of any type, also a function of the reader's)
        problem = f"{type(error).__name__}: {error}"
        return Outcome(number, False, f"The check stopped at this answer ({problem}). Expected: {form}")


def _is_empty(answer: Any) -> bool:
    """Whether an answer is None, `...`, or a container in which one of these is left."""
    inside = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, list | tuple) else ()
    return answer is None or answer is ... or any(_is_empty(each) for each in inside)


@cache
def all_checks() -> dict[str, Callable[..., str]]:
    """The check of every exercise by its number, "00.1" first."""
    files = sorted(path.stem for path in Path(__file__).parent.glob("notebook_*.py"))
    return {
        f"{file.removeprefix('notebook_')}.{name.removeprefix('exercise_')}": function
        for file in files
        for name, function in vars(import_module(f"falcon_kit.exercises.{file}")).items()
        if name.startswith("exercise_")
    }
