"""Figures of evaluations: values with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from falcon_kit.display.figure import AMBER, BLUE, GREY, drawable, drawing, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OF_TEXTS = ("per_token", "per_byte", "per_word", "bits_per_byte")
"""The measures of a text with an interval."""
_ROW = 0.28  # inches
_WIDTH = 4.2  # inches of a panel


@drawing
def evaluation_figure(rows: Sequence[Mapping[str, Any]], model: str, published: Mapping[str, Any]) -> Figure:
    """A panel for shares, one for texts, and one for published averages, as far as there are such rows.

    What is neither, such as the perplexity or the BLEU of a task, has a panel if nothing else has one.
    """
    texts = [row for row in rows if row["metric"] == "bits_per_byte"]
    averages = [row for row in rows if row["metric"] == "percent"]
    others = [row for row in rows if row["metric"] not in (*OF_TEXTS, "bytes_per_token", "percent")]
    tasks = [row for row in others if 0 <= row["value"] <= 1]
    panels: list[tuple[int, Callable[[Axes], None]]] = []
    if tasks:
        panels.append((len(tasks), lambda axes: _tasks(axes, tasks)))
    if texts:
        panels.append((len(texts), lambda axes: _texts(axes, texts)))
    if others and not panels:
        panels.append((len(others), lambda axes: _others(axes, others)))
    if averages:
        count = len(published["averages"]) + len(averages)
        panels.append((count, lambda axes: _published(axes, averages, model, published)))
    most = max((count for count, _ in panels), default=1)
    figure = new_figure(_WIDTH * max(1, len(panels)), 1.1 + _ROW * max(3, most))
    for (_, draw), axes in zip(panels, figure.subplots(1, max(1, len(panels)), squeeze=False)[0], strict=False):
        draw(axes)
        axes.set_ylim(most - 0.4, -0.6)  # rows of the same height in all panels
    figure.suptitle(f"{model}: 95% intervals", fontsize=10)
    return figure


def intervals(axes: Axes, rows: Sequence[Mapping[str, Any]], labels: Sequence[str], colour: str = BLUE) -> None:
    """A point with its interval for each row, the first at the top."""
    for place, row in enumerate(rows):
        if not math.isnan(row["low"]):
            axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2)
        axes.plot([row["value"]], [place], "o", color=colour, markersize=5)
    axes.set_yticks(range(len(rows)), [drawable(each) for each in labels])
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _tasks(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Shares of right answers, and other metrics from 0 to 1; a mark shows chance."""
    intervals(axes, rows, [f"{row['name']}, {row['metric']}" for row in rows])
    chance = [(row["chance"], place) for place, row in enumerate(rows) if row.get("chance")]
    if chance:
        axes.plot(*zip(*chance, strict=True), "|", color=GREY, markersize=12, label="chance")
        axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("share of items, or mean from 0 to 1", fontsize=9)


def _others(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    intervals(axes, rows, [f"{row['name']}, {row['metric']}" for row in rows])
    axes.set_xlabel("value", fontsize=9)


def _texts(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    ordered = sorted(rows, key=lambda row: row["value"])
    intervals(axes, ordered, [row["name"] for row in ordered])
    axes.set_xlim(left=0)
    axes.set_xlabel("bits per byte", fontsize=9)


def _published(axes: Axes, own: Sequence[Mapping[str, Any]], model: str, published: Mapping[str, Any]) -> None:
    """The averages of the leaderboard of 2023, and the model's own where it was measured."""
    averages = [{"value": value, "low": math.nan, "high": math.nan} for value in published["averages"].values()]
    labels = [f"{name}, published" for name in published["averages"]]
    intervals(axes, [*averages, *own], [*labels, *(f"{model}, measured" for _ in own)], AMBER)
    axes.set_xlim(20, 80)
    axes.set_xlabel("Open LLM Leaderboard, percent", fontsize=9)


@drawing
def shares_figure(rows: Sequence[Mapping[str, Any]], labels: Sequence[str], title: str) -> Figure:
    """Shares of pairs with their intervals, and a line at one half."""
    figure = new_figure(5.2, 1.1 + _ROW * max(3, len(rows)))
    axes = figure.subplots()
    axes.axvline(0.5, color=GREY, linewidth=1)
    intervals(axes, rows, labels)
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("share of pairs; one half is no preference", fontsize=9)
    axes.set_title(title, fontsize=10)
    return figure
