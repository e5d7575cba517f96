"""A plan as stacked bars."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from falcon_kit.display.figure import GREY, PALETTE, drawable, drawing, legend_label, new_figure
from falcon_kit.planning.devices import Device
from falcon_kit.planning.machines import GIB
from falcon_kit.planning.placement import Part

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@drawing
def draw_plan(rows: Sequence[Part], devices: Sequence[Device], title: str) -> Figure:
    """One horizontal bar per device, in GiB: its parts stacked, its free memory hatched, its limit as a thick line."""
    figure = new_figure(8, 1.6 + 0.4 * len(devices))
    axes = figure.subplots()
    names = list(dict.fromkeys(_legend_name(row) for row in rows))
    used = dict.fromkeys((device.key for device in devices), 0.0)  # GiB
    for name, colour in zip(names, PALETTE * 2, strict=False):
        named = [row for row in rows if _legend_name(row) == name]
        sizes = {key: sum(row.bytes for row in named if row.device == key) / GIB for key in used}
        label = legend_label(name)
        axes.barh(range(len(used)), list(sizes.values()), left=list(used.values()), color=colour, label=label)
        used = {key: start + sizes[key] for key, start in used.items()}
    for index, device in enumerate(devices):
        limit, start = device.free_bytes / GIB, used[device.key]
        axes.barh(index, max(0.0, limit - start), left=start, color="none", edgecolor=GREY, hatch="//")
        axes.plot([limit, limit], [index - 0.4, index + 0.4], color=GREY, linewidth=2)
    axes.set_yticks(range(len(used)), [drawable(str(key)) for key in used])
    axes.invert_yaxis()
    axes.set(title=fill(title, 80), xlabel="GiB (thick line: memory of the device, hatched: free)", ylabel="device")
    axes.title.set_fontsize(9)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return figure


def _legend_name(row: Part) -> str:
    """The name of a part in the legend: all "layers 0-14" share one colour."""
    return "layers" if row.part.startswith("layers ") else row.part
