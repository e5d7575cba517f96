"""`Outcome`: whether an answer is right, and what to tell the reader."""

import math
import re
from dataclasses import dataclass
from typing import Any

from falcon_kit.display.documented import documented
from falcon_kit.display.figure import AMBER, GREEN
from falcon_kit.display.page import text_html


class Hint(Exception):
    """An answer is not right; the text is a hint that fits the mistake."""


@documented
@dataclass(frozen=True, repr=False)
class Outcome:
    """The result of `check`: true if the answer is right. A line of text, with a coloured mark in Jupyter."""

    exercise: str
    """The number of the exercise, such as "06.1"."""
    right: bool
    """Whether the answer is right."""
    text: str
    """What the answer shows, or a hint."""

    def __bool__(self) -> bool:
        return self.right

    @property
    def verdict(self) -> str:
        """The exercise with "right" or "not yet"."""
        return f"{self.exercise}: {'right' if self.right else 'not yet'}."

    def __repr__(self) -> str:
        return f"{self.verdict} {self.text}"

    def _repr_html_(self) -> str:
        colour, mark = (GREEN, "✓") if self.right else (AMBER, "→")
        border = f"border-left: 4px solid {colour}; padding-left: 0.6em"
        return f'<p style="{border}">{mark} <b>{text_html(self.verdict)}</b> {_with_code(self.text)}</p>'


def _with_code(text: str) -> str:
    """The text as HTML, with what stands between backticks as code."""
    parts = re.split("`([^`]+)`", text)  # every second one is code
    return "".join(f"<code>{text_html(each)}</code>" if at % 2 else text_html(each) for at, each in enumerate(parts))


def expect(condition: object, hint: str) -> None:
    """Raises Hint unless the condition holds."""
    if not condition:
        raise Hint(hint)


def near(answer: Any, value: float, tolerance: float = 0.02) -> bool:
    """Whether a number is within the relative tolerance of a value; False for nan."""
    return math.isclose(float(answer), value, rel_tol=tolerance, abs_tol=1e-9)
