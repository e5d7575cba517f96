"""Figures of evaluations: values with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    panels = [(draw, each) for draw, each in ((_tasks, tasks), (_texts, texts)) if each]
    if others and not panels:
        panels.append((_others, others))
    if averages:
        known = ({"name": f"{name}, published", "value": value} for name, value in published["averages"].items())
        own = ({**row, "name": f"{model}, measured"} for row in averages)
        panels.append((_averages, [*known, *own]))
    most = max((len(each) for _, each in panels), default=1)
    figure = new_figure(_WIDTH * max(1, len(panels)), 1.1 + _ROW * max(3, most))
    for (draw, each), axes in zip(panels, figure.subplots(1, max(1, len(panels)), squeeze=False)[0], strict=False):
        draw(axes, each)
        axes.set_ylim(most - 0.4, -0.6)  # rows of the same height in all panels
    figure.suptitle(f"{model}: 95% intervals", fontsize=10)
    return figure


def intervals(axes: Axes, rows: Sequence[Mapping[str, Any]], labels: Sequence[str], colour: str = BLUE) -> None:
    """A point for each row, with its interval if it has one, the first at the top."""
    for place, row in enumerate(rows):
        if not math.isnan(row.get("low", math.nan)):
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


def _averages(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The averages of the leaderboard of 2023, and the model's own where it was measured."""
    intervals(axes, rows, [row["name"] for row in rows], AMBER)
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
