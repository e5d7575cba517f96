"""Figures of predictions: the logit lens, contributions to a logit, surprisal, attribution.

Shapes: L layers, T time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from falcon_kit.display.figure import BLUE, GREEN, GREY, VERMILION, drawing, legend_label, new_figure
from falcon_kit.inspection.plots.labels import Floats, token_figure, token_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_CELL = 9  # characters of a token in a cell of the lens


@drawing
def layers(tokens: Sequence[str], predicted: Sequence[Sequence[str]], probabilities: Floats, first: int = 0) -> Figure:
    """The logit lens: the most likely next token of each layer, `predicted` (L + 1, T), and its probability.

    first: the position of the first of the `tokens` in the text.
    """
    rows, time = probabilities.shape
    figure = new_figure(max(5.0, 0.95 * time + 2), 0.32 * rows + 1.6)
    axes = figure.subplots()
    image = axes.imshow(probabilities, vmin=0, vmax=1, cmap="cividis", aspect="auto", origin="lower")
    for (row, column), probability in np.ndenumerate(probabilities):
        colour = "white" if probability < 0.55 else "black"
        text = token_label(predicted[row][column], _MAX_CELL)
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    labels = [f"{token_label(token)}\n{first + at}" for at, token in enumerate(tokens)]
    axes.set_xticks(range(time), labels, fontsize=9)
    axes.set_yticks(range(rows), ["embedding", *(f"layer {row}" for row in range(rows - 1))], fontsize=9)
    axes.set(xlabel="token of the text, and its position", ylabel="after")
    axes.set_title("Logit lens: the most likely next token after each layer", fontsize=11)
    figure.colorbar(image, ax=axes, label="probability", fraction=0.04)
    return figure


@drawing
def contributions(embedding: float, attention: Floats, mlp: Floats, title: str) -> Figure:
    """What the attention and the MLP of each layer, (L,) each, add to one logit, and their running sum."""
    figure = new_figure(max(6.0, 0.25 * len(mlp) + 3), 3.4)
    axes = figure.subplots()
    at = np.arange(len(mlp))
    axes.bar([-1], [embedding], 0.4, color=GREY, label="embedding")
    axes.bar(at - 0.2, attention, 0.4, color=BLUE, label="attention")
    axes.bar(at + 0.2, mlp, 0.4, color=VERMILION, label="MLP")
    axes.plot([-1, *at], embedding + np.cumsum([0, *(attention + mlp)]), "o-", color=GREEN, label="running sum")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks([-1, *at], ["emb.", *map(str, at)], fontsize=9 if len(at) <= 32 else 5)
    axes.set(xlabel="layer", ylabel="logit")
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@drawing
def surprisal(tokens: Sequence[str], lines: Mapping[str, Floats]) -> Figure:
    """The surprisal of each token in bits, a line for each name."""
    figure, axes = token_figure(tokens)
    for (name, values), colour, mark in zip(lines.items(), (BLUE, VERMILION, GREEN), "os^", strict=False):
        axes.plot(values, f"{mark}-", color=colour, label=legend_label(name), markersize=3, linewidth=1)
    axes.set(ylabel="bits", ylim=(0, None))
    axes.set_title("Surprisal of each token", fontsize=11)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=9)
    return figure


@drawing
def attribution(tokens: Sequence[str], scores: Floats, title: str) -> Figure:
    """What each token adds to the log-probability of a prediction."""
    figure, axes = token_figure(tokens)
    axes.bar(range(len(tokens)), scores, color=[BLUE if score >= 0 else VERMILION for score in scores])
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(ylabel="nats of log-probability")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3, axis="y")
    return figure
