"""Pictures of predictions: what each layer would say, who speaks for a token, what surprises, what it hangs on.

Colours are cividis, or Okabe and Ito's, which colour-blind readers can tell apart; a white ground of their own keeps
the pictures readable in a dark theme.

Shapes: L layers, T time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from falcon_kit.display.figure import BLUE, GREEN, GREY, VERMILION, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.floating[Any]]

_LABELLED = 60  # tokens up to which each is written below a line


def layers(words: Sequence[str], read: Sequence[Sequence[str]], probabilities: Floats, first: int = 0) -> Figure:
    """The logit lens: what each layer would say next, `read` (L + 1, T), and how sure it is, `probabilities`.

    `first`: the position in the text of the first of the `words`.
    """
    rows, time = probabilities.shape
    figure = new_figure(max(5.0, 0.95 * time + 2), 0.32 * rows + 1.6)
    axes = figure.subplots()
    image = axes.imshow(probabilities, vmin=0, vmax=1, cmap="cividis", aspect="auto", origin="lower")
    for (row, column), probability in np.ndenumerate(probabilities):
        colour = "white" if probability < 0.55 else "black"
        text = _short(read[row][column])
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9, parse_math=False)
    axes.set_xticks(
        range(time), [f"{word}\n{first + at}" for at, word in enumerate(words)], fontsize=9, parse_math=False
    )
    axes.set_yticks(range(rows), ["embedding", *(f"layer {row}" for row in range(rows - 1))], fontsize=9)
    axes.set(xlabel="token of the text, and its position", ylabel="read after")
    axes.set_title("Logit lens: what each layer would say next", fontsize=11)
    figure.colorbar(image, ax=axes, label="probability", fraction=0.04)
    return figure


def shares(embedding: float, attention: Floats, mlp: Floats, title: str) -> Figure:
    """What each layer's attention and feed-forward block, (L,) each, add to one logit, and how it grows."""
    figure = new_figure(max(6.0, 0.25 * len(mlp) + 3), 3.4)
    axes = figure.subplots()
    at = np.arange(len(mlp))
    axes.bar([-1], [embedding], 0.4, color=GREY, label="embedding")
    axes.bar(at - 0.2, attention, 0.4, color=BLUE, label="attention")
    axes.bar(at + 0.2, mlp, 0.4, color=VERMILION, label="feed-forward")
    axes.plot([-1, *at], embedding + np.cumsum([0, *(attention + mlp)]), "o-", color=GREEN, label="sum so far")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks([-1, *at], ["emb.", *map(str, at)], fontsize=9 if len(at) <= 32 else 5)
    axes.set(xlabel="layer", ylabel="logit")
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def surprisal(words: Sequence[str], lines: Mapping[str, Floats], title: str = "Surprisal of each token") -> Figure:
    """Bits of surprise at each token, a line for each name."""
    figure = new_figure(max(6.0, min(12.0, 0.2 * len(words) + 2)), 3.2)
    axes = figure.subplots()
    for (name, values), colour, mark in zip(lines.items(), (BLUE, VERMILION, GREEN), "os^", strict=False):
        axes.plot(values, f"{mark}-", color=colour, label=name, markersize=3, linewidth=1)
    _name_tokens(axes, words)
    axes.set(ylabel="bits", ylim=(0, None))
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9)
    return figure


def attribution(words: Sequence[str], scores: Floats, title: str) -> Figure:
    """What each token adds to the log-probability of a prediction."""
    figure = new_figure(max(6.0, min(12.0, 0.25 * len(words) + 2)), 3.2)
    axes = figure.subplots()
    axes.bar(range(len(words)), scores, color=[BLUE if score >= 0 else VERMILION for score in scores])
    axes.axhline(0, color="black", linewidth=0.8)
    _name_tokens(axes, words)
    axes.set(ylabel="nats of log-probability")
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.grid(alpha=0.3, axis="y")
    return figure


def _name_tokens(axes: Axes, words: Sequence[str]) -> None:
    if len(words) <= _LABELLED:
        axes.set_xticks(range(len(words)), words, rotation=90, fontsize=9, parse_math=False)
        axes.set_xlabel("token")
    else:
        axes.set_xlabel("position in the text, tokens")


def _short(text: str) -> str:
    return text if len(text) <= 9 else f"{text[:8]}…"
