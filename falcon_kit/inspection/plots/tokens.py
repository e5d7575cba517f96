"""Pictures of tokens: how many bytes each holds, and what the same sentences cost in different languages.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; a white ground of their own keeps the pictures
readable in a dark theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from falcon_kit.display.figure import BLUE, GREEN, GREY, VERMILION, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = {
    "whole": (BLUE, "whole characters"),
    "part": (VERMILION, "part of a character"),
    "special": (GREEN, "special"),
}
_LABELLED = 60  # tokens up to which each is written below its bar


def lengths(words: Sequence[str | bytes], sizes: Sequence[int], kinds: Sequence[str]) -> Figure:
    """Bytes of each token, `sizes`, coloured by kind: "whole", "part" or "special"."""
    figure = new_figure(max(6.0, min(12.0, 0.2 * len(words) + 2)), 3.2)
    axes = figure.subplots()
    for kind, (colour, label) in _KINDS.items():
        at = [place for place, each in enumerate(kinds) if each == kind]
        if at:
            axes.bar(at, [sizes[place] for place in at], color=colour, label=label)
    if len(words) <= _LABELLED:
        axes.set_xticks(range(len(words)), map(_label, words), rotation=90, fontsize=9, parse_math=False)
    axes.set(xlabel="token" if len(words) <= _LABELLED else "position in the text, tokens", ylabel="bytes")
    axes.set_title("Bytes of text in each token", fontsize=11)
    axes.grid(alpha=0.3, axis="y")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    return figure


def languages(
    names: Sequence[str],
    parity: Mapping[str, Sequence[float]],
    bytes_per_token: Mapping[str, Sequence[float]],
    reference: str,
) -> Figure:
    """What texts cost, a row for each name and a bar for each tokenizer; a parity of nan is left out."""
    figure = new_figure(9.5, 1.2 + 0.13 * len(names) * (1 + len(parity)))
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, parity)
    left.axvline(1, color="black", linewidth=0.8)
    left.set(xlabel=f"tokens for the same sentences, {_label(reference)} = 1")
    _bars(right, bytes_per_token)
    right.set(xlabel="bytes of text per token")
    left.set_yticks(range(len(names)), map(_label, names), fontsize=9, parse_math=False)
    left.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    title = "What a text costs in tokens"  # of the legend, which is on top, where one begins to read
    named = right.get_legend_handles_labels()
    figure.legend(*named, title=title, frameon=False, fontsize=10, loc="outside upper center", ncols=2)
    return figure


def _bars(axes: Axes, series: Mapping[str, Sequence[float]]) -> None:
    height = 0.8 / len(series)
    for row, (name, values) in enumerate(series.items()):
        colour = (BLUE, VERMILION, GREEN, GREY)[row % 4]
        at = np.arange(len(values)) + (row - (len(series) - 1) / 2) * height
        axes.barh(at, np.nan_to_num(values), height, color=colour, label=name)
    axes.grid(alpha=0.3, axis="x")


def _label(word: str | bytes) -> str:
    """A word in characters that the font has; others by their numbers, bytes in hexadecimal."""
    if isinstance(word, bytes):
        return word.hex(" ").upper()
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(each if font.get_char_index(ord(each)) else f"[U+{ord(each):04X}]" for each in word)[:24]
