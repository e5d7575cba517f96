"""A plan as stacked bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from falcon_kit.display.figure import GREY, PALETTE, new_figure
from falcon_kit.planning.devices import Slot
from falcon_kit.planning.placement import (
    Part,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 2**30


def draw_plan(rows: Sequence[Part], slots: Sequence[Slot], title: str) -> Figure:
    """What each device holds, part by part, beside what it has."""
    figure = new_figure(8, 1.6 + 0.4 * len(slots))
    axes = figure.subplots()
    names = list(dict.fromkeys(_kind(row) for row in rows))
    left = dict.fromkeys((slot.key for slot in slots), 0.0)
    for name, colour in zip(names, PALETTE * 2, strict=False):
        sizes = {key: sum(row.bytes for row in rows if row.device == key and _kind(row) == name) / GIB for key in left}
        axes.barh([str(key) for key in left], list(sizes.values()), left=list(left.values()), color=colour, label=name)
        left = {key: at + sizes[key] for key, at in left.items()}
    for index, slot in enumerate(slots):
        free = slot.free_bytes / GIB
        axes.barh(index, max(0.0, free - left[slot.key]), left=left[slot.key], color="none", edgecolor=GREY, hatch="//")
        axes.plot([free, free], [index - 0.4, index + 0.4], color="#000000", linewidth=2)
    axes.invert_yaxis()
    axes.set(
        title=title,
        xlabel="GiB (the black line is what a device has, hatched what stays free)",
        ylabel="device",
    )
    axes.title.set_fontsize(9)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    return figure


def _kind(row: Part) -> str:
    return "layers" if row.part.startswith("layers ") else row.part
