"""Pictures of attention: all heads at a glance, one map large, how alike heads are.

Colours are viridis, or Okabe and Ito's, which colour-blind readers can tell apart; a white ground of their own keeps
the pictures readable in a dark theme.

Shapes: L layers, H query heads, G KV heads, R = H / G, T time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from falcon_kit.display.figure import BLUE, VERMILION, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.floating[Any]]

_NUMBERED = 64  # heads up to which each has its number written into it
_LABELLED = 40  # tokens up to which each is written beside a map
_PIXELS = 512  # of a map: more would not be seen


def heads(values: Floats, kv_heads: int, title: str, label: str, chance: float | None = None) -> Figure:
    """A number for every head, `values` (L, H): a panel for each layer, in it a row for each KV group."""
    layers, shared = len(values), values.shape[1] // kv_heads
    columns = _columns(layers, shared / kv_heads)
    rows = math.ceil(layers / columns)
    side = min(1.0, 11 / (columns * shared), 14 / (rows * kv_heads))
    size = (max(5.0, columns * (shared * side + 0.35) + 1.6), rows * (kv_heads * side + 0.45) + 0.9)
    figure = new_figure(*size)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    high = max(float(np.nanmax(values, initial=0)), 1e-9)
    for layer, axes in enumerate(panels):
        if layer >= layers:
            axes.axis("off")
            continue
        image = axes.imshow(values[layer].reshape(kv_heads, shared), vmin=0, vmax=high, cmap="viridis", aspect="auto")
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks(range(kv_heads) if layer % columns == 0 and kv_heads <= 16 else [])
        axes.tick_params(labelsize=9, length=0)
        if values.size <= _NUMBERED:
            _write_numbers(axes, values[layer].reshape(kv_heads, shared), high)
    figure.colorbar(image, ax=panels.tolist(), label=label, fraction=0.03)
    even = "" if chance is None or math.isnan(chance) else f"; spread evenly it would be {chance:.3g}"
    figure.suptitle(f"{title}{even}", fontsize=11)
    figure.supylabel("KV group (a row), its query heads side by side", fontsize=9)
    return figure


def _columns(panels: int, width: float) -> int:
    """So many panels side by side, each `width` times as wide as high, that the whole is about 1.5 times as wide."""
    return min(panels, max(1, round(math.sqrt(1.5 * panels / width))))


def _write_numbers(axes: Axes, values: Floats, high: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value < 0.6 * high else "black"
        text = f"{value:.2f}" if high <= 1 else f"{value:.3g}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)


def one_map(probabilities: Floats, words: Sequence[str], title: str) -> Figure:
    """A map (T, T), queries down, keys across; the darker end of the scale is stretched, as most weights are small."""
    from matplotlib.colors import PowerNorm

    time, named = len(words), len(words) <= _LABELLED
    side = max(4.0, 0.22 * time + 1.5) if named else 6.5
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    pooled = pool(probabilities, _PIXELS)
    image = axes.imshow(
        pooled,
        norm=PowerNorm(0.5, vmin=0, vmax=1),
        cmap="viridis",
        extent=(-0.5, time - 0.5, time - 0.5, -0.5),
        interpolation="nearest",
    )
    if named:
        axes.set_xticks(range(time), words, rotation=90, fontsize=9, parse_math=False)
        axes.set_yticks(range(time), words, fontsize=9, parse_math=False)
    what = "attention" if len(pooled) == time else f"attention, the highest of {math.ceil(time / _PIXELS)} x as many"
    axes.set(xlabel="key: the token looked at", ylabel="query: the token that looks")
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label=f"{what} (0 to 1, square-root scale)", fraction=0.04)
    return figure


def pool(values: Floats, most: int) -> Floats:
    """A square (T, T) with at most `most` cells a side, each the highest of those it stands for."""
    step = math.ceil(len(values) / most)
    if step == 1:
        return values
    padded = np.pad(values, (0, -len(values) % step))
    return padded.reshape(len(padded) // step, step, -1, step).max((1, 3))


def likeness(within: Floats, across: Floats) -> Figure:
    """How alike heads are: those that share a KV head, `within` (L, G), beside those that do not, `across` (L,)."""
    figure = new_figure(8, 3.4)
    axes = figure.subplots()
    layers = np.arange(len(within))
    axes.plot(np.repeat(layers, within.shape[1]), within.ravel(), "o", color=BLUE, alpha=0.6, label="of one KV group")
    axes.plot(layers, within.mean(-1), color=BLUE, label="their mean")
    axes.plot(layers, across, "s--", color=VERMILION, label="of different KV groups, mean")
    axes.set(xlabel="layer", ylabel="likeness, 0 to 1", ylim=(-0.02, 1.02))
    figure.suptitle("How alike two query heads attend (Bhattacharyya coefficient, mean over queries)", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)
    return figure
