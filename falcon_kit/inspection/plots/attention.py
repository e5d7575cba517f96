"""Figures of attention: a statistic of all heads, one attention map, head similarity.

Shapes: L layers, H query heads, G KV heads, R = H / G, T time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from falcon_kit.display.figure import BLUE, VERMILION, drawing, new_figure
from falcon_kit.inspection.plots.labels import Floats, token_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_NUMBERS = 64  # with more heads, no values are written into the cells
_MAX_LABELS = 40  # with more tokens, a map has no labels
_MAX_CELLS = 512  # a side of a map; the figure does not resolve more


@drawing
def heads(values: Floats, kv_heads: int, title: str, label: str, chance: float | None = None) -> Figure:
    """A statistic of every head, `values` (L, H): a panel for each layer, with a row for each KV group.

    `chance` is the value for uniform attention.
    """
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
        if values.size <= _MAX_NUMBERS:
            _write_numbers(axes, values[layer].reshape(kv_heads, shared), high)
    figure.colorbar(image, ax=panels.tolist(), label=label, fraction=0.03)
    uniform = "" if chance is None or math.isnan(chance) else f"; uniform attention: {chance:.3g}"
    figure.suptitle(f"{title}{uniform}", fontsize=11)
    figure.supylabel("KV group (row), query heads (columns)", fontsize=9)
    return figure


def _columns(panels: int, width: float) -> int:
    """The number of columns for a figure about 1.5 times as wide as high; a panel is `width` times as wide as high."""
    return min(panels, max(1, round(math.sqrt(1.5 * panels / width))))


def _write_numbers(axes: Axes, values: Floats, high: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value < 0.6 * high else "black"
        text = f"{value:.2f}" if high <= 1 else f"{value:.3g}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)


@drawing
def one_map(probabilities: Floats, tokens: Sequence[str], title: str) -> Figure:
    """An attention map (T, T), rows are queries, columns are keys. The colour scale is a square root, because most
    probabilities are small."""
    from matplotlib.colors import PowerNorm

    time, labelled = len(tokens), len(tokens) <= _MAX_LABELS
    side = max(4.0, 0.22 * time + 1.5) if labelled else 6.5
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    pooled = pool(probabilities, _MAX_CELLS)
    image = axes.imshow(
        pooled,
        norm=PowerNorm(0.5, vmin=0, vmax=1),
        cmap="viridis",
        extent=(-0.5, time - 0.5, time - 0.5, -0.5),
        interpolation="nearest",
    )
    if labelled:
        labels = [token_label(each) for each in tokens]
        axes.set_xticks(range(time), labels, rotation=90, fontsize=9)
        axes.set_yticks(range(time), labels, fontsize=9)
    pooled_side = math.ceil(time / _MAX_CELLS)
    what = "attention" if len(pooled) == time else f"attention, maximum of {pooled_side} x {pooled_side} tokens"
    axes.set(xlabel="key: the attended token", ylabel="query: the attending token")
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label=f"{what} (0 to 1, square-root scale)", fraction=0.04)
    return figure


def pool(values: Floats, max_side: int) -> Floats:
    """Max-pools a square (T, T) to at most `max_side` cells a side."""
    step = math.ceil(len(values) / max_side)
    if step == 1:
        return values
    padded = np.pad(values, (0, -len(values) % step))
    return padded.reshape(len(padded) // step, step, -1, step).max((1, 3))


@drawing
def head_similarity(within: Floats, across: Floats) -> Figure:
    """Mean similarity of query heads in each KV group, `within` (L, G), and across KV groups, `across` (L,)."""
    figure = new_figure(8, 3.4)
    axes = figure.subplots()
    layers = np.arange(len(within))
    axes.plot(np.repeat(layers, within.shape[1]), within.ravel(), "o", color=BLUE, alpha=0.6, label="within a KV group")
    axes.plot(layers, within.mean(-1), color=BLUE, label="mean within")
    axes.plot(layers, across, "s--", color=VERMILION, label="mean across KV groups")
    axes.set(xlabel="layer", ylabel="similarity, 0 to 1", ylim=(-0.02, 1.02))
    figure.suptitle("Similarity of two query heads (Bhattacharyya coefficient, mean over queries)", fontsize=11)
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)
    return figure
