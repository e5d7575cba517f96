"""Tokens as labels of a figure, and the type of the values in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from falcon_kit.display.figure import drawable, new_figure
from falcon_kit.display.page import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.floating[Any]]
_MAX_LABELS = 60  # a longer text has positions instead of tokens on its axis


def token_figure(tokens: Sequence[str | bytes]) -> tuple[Figure, Axes]:
    """A figure whose x-axis is the tokens of a text, or their positions if there are many."""
    figure = new_figure(max(6.0, min(12.0, 0.2 * len(tokens) + 2)), 3.2)
    axes = figure.subplots()
    if len(tokens) <= _MAX_LABELS:
        labels = [token_label(each) for each in tokens]
        axes.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=9)
        axes.set_xlabel("token")
    else:
        axes.set_xlabel("position in the text, tokens")
    axes.set_xlim(-0.7, len(tokens) - 0.3)  # shows the first token too, whose surprisal is nan
    return figure, axes


def token_label(token: str | bytes, length: int = 24) -> str:
    """A token with visible spaces and control characters, at most `length` characters; bytes in hexadecimal."""
    text = token.hex(" ").upper() if isinstance(token, bytes) else drawable(visible(token, spaces=True))
    return text if len(text) <= length else f"{text[: length - 1]}…"
