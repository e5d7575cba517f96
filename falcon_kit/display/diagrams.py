"""Two diagrams of the notebooks: the parts of a block, and what several GPUs do over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from falcon_kit.display.figure import AMBER, BLUE, GREY, VERMILION, drawing, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Branch = tuple[float, float, float, tuple[str, str]]
"""Parts beside the residual stream: their side, where they leave it and where they are added to it, and their names."""
Span = tuple[int, float, float, str]
"""What a GPU does: its number, the start and the length in milliseconds, and a colour."""
BLOCKS: Mapping[str, Sequence[Branch]] = {
    "Falcon-40B: attention and MLP in parallel": [
        (-1, 0.3, 3.8, ("ln_attn", "attention")),
        (1, 0.3, 3.8, ("ln_mlp", "MLP")),
    ],
    "GPT-3: one after the other": [
        (1, 0.1, 1.9, ("LayerNorm", "attention")),
        (1, 2.3, 4.1, ("LayerNorm", "MLP")),
    ],
}


@drawing
def draw_blocks(blocks: Mapping[str, Sequence[Branch]] = BLOCKS) -> Figure:
    """The blocks of models by title: an arrow for the residual stream, and the branches that are added to it.

    blocks: by default the 40B's, with two branches at one place, and GPT-3's, with two branches one after the other.
    """
    figure = new_figure(9, 3.6)
    panels = figure.subplots(1, len(blocks), squeeze=False)[0]
    for axes, (title, branches) in zip(panels, blocks.items(), strict=True):
        arrow = {"arrowstyle": "->", "color": GREY, "linewidth": 2}
        axes.annotate("", (0, 4.6), (0, -0.3), arrowprops=arrow)
        for side, bottom, top, names in branches:
            axes.plot([0, side, side, 0], [bottom, bottom, top, top], color=GREY)
            axes.plot(0, top, "o", color=VERMILION, markersize=12)
            axes.text(0, top, "+", color="white", ha="center", va="center", weight="bold")
            for share, name in zip((0.35, 0.7), names, strict=True):
                box = {"boxstyle": "round", "facecolor": BLUE, "edgecolor": "none"}
                y = bottom + share * (top - bottom)
                axes.text(side, y, name, ha="center", va="center", color="white", bbox=box)
        axes.set(title=title, xlim=(-2, 2), ylim=(-0.4, 4.7))
        axes.axis("off")
    return figure


@drawing
def draw_waiting(read_all: float, all_reduce: float, gpus: int, layers: int) -> Figure:
    """Two tokens on several GPUs: with a device map above, with tensor parallelism below. Blue reads, orange adds.

    read_all, all_reduce: the seconds to read all weights on one GPU, and of one all-reduce. The layers are five groups.
    """
    figure = new_figure(9, 4)
    top, bottom = figure.subplots(2, 1, sharex=True)
    stage, read, pause = 1e3 * read_all / gpus, 1e3 * read_all / gpus / 5, 1e3 * layers * all_reduce / 5
    turns = [(turn % gpus, turn * stage, stage, BLUE) for turn in range(2 * gpus)]
    _draw_spans(top, "Device map", gpus, turns)
    starts = [(gpu, step * (read + pause)) for step in range(10) for gpu in range(gpus)]
    reads = [(gpu, start, read, BLUE) for gpu, start in starts]
    sums = [(gpu, start + read, pause, AMBER) for gpu, start in starts]
    _draw_spans(bottom, "Tensor parallel", gpus, reads + sums)
    bottom.set_xlabel("milliseconds (computed from the model above)")
    return figure


def _draw_spans(axes: Axes, title: str, gpus: int, spans: Sequence[Span]) -> None:
    for gpu, start, length, colour in spans:
        axes.barh(gpu, length, left=start, color=colour)
    busy = sum(length for *_, length, colour in spans if colour == BLUE)
    share = busy / (gpus * max(start + length for _, start, length, _ in spans))
    axes.set(title=f"{title}: a GPU reads {share:.0%} of the time", ylabel="GPU", yticks=range(gpus))
    axes.invert_yaxis()
