"""Loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from falcon_kit.display.figure import BLUE, VERMILION, drawing, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@drawing
def loss_curve(history: Sequence[Mapping[str, float]], title: str = "Loss") -> Figure:
    """The losses of a `TuningRun.history` over the steps: a line for the batches, dots for the held-out documents."""
    trained, held_out = (
        [(each["step"], each[name]) for each in history if name in each] for name in ("loss", "eval_loss")
    )
    figure = new_figure(7, 3)
    axes = figure.subplots()
    if trained:
        axes.plot(*zip(*trained, strict=True), color=BLUE, linewidth=1, label="batches")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color=VERMILION, markersize=4, label="held out")
    axes.set(title=title, xlabel="step", ylabel="loss, nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if trained or held_out:
        axes.legend()
    return figure
