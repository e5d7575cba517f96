"""Figures of tokens: the bytes in each token, and token counts of several texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from falcon_kit.display.figure import BLUE, GREEN, GREY, VERMILION, drawable, drawing, legend_label, new_figure
from falcon_kit.inspection.plots.labels import token_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = {
    "whole": (BLUE, "whole characters"),
    "part": (VERMILION, "part of a character"),
    "special": (GREEN, "special"),
}
_MAX_NAME = 24  # characters of a text's name


@drawing
def lengths(tokens: Sequence[str | bytes], sizes: Sequence[int], kinds: Sequence[str]) -> Figure:
    """The bytes in each token, `sizes`, coloured by kind: "whole", "part" or "special"."""
    figure, axes = token_figure(tokens)
    for kind, (colour, label) in _KINDS.items():
        positions = [at for at, each in enumerate(kinds) if each == kind]
        if positions:
            axes.bar(positions, [sizes[at] for at in positions], color=colour, label=label)
    axes.set_ylabel("bytes")
    axes.set_title("Bytes of text in each token", fontsize=11)
    axes.grid(alpha=0.3, axis="y")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9)
    return figure


@drawing
def languages(
    names: Sequence[str],
    parity: Mapping[str, Sequence[float]],
    bytes_per_token: Mapping[str, Sequence[float]],
    reference: str,
) -> Figure:
    """Token counts: a row for each text and a bar for each tokenizer; a parity of nan has no bar."""
    figure = new_figure(9.5, 1.2 + 0.13 * len(names) * (1 + len(parity)))
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, parity)
    left.axvline(1, color=GREY, linewidth=0.8)
    left.set(xlabel=f"tokens for the same sentences, {drawable(reference)[:_MAX_NAME]} = 1")
    _bars(right, bytes_per_token)
    right.set(xlabel="bytes of text per token")
    left.set_yticks(range(len(names)), [drawable(each)[:_MAX_NAME] for each in names], fontsize=9)
    left.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    entries = right.get_legend_handles_labels()
    figure.legend(*entries, title="Token counts", fontsize=10, loc="outside upper center", ncols=2)
    return figure


def _bars(axes: Axes, series: Mapping[str, Sequence[float]]) -> None:
    height = 0.8 / len(series)
    for row, (name, values) in enumerate(series.items()):
        colour = (BLUE, VERMILION, GREEN, GREY)[row % 4]
        at = np.arange(len(values)) + (row - (len(series) - 1) / 2) * height
        axes.barh(at, np.nan_to_num(values), height, color=colour, label=legend_label(name))
    axes.grid(alpha=0.3, axis="x")
