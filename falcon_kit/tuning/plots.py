"""Loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from falcon_kit.display.figure import BLUE, PALETTE, VERMILION, drawing, legend_label, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@drawing
def loss_curve(
    trained: Sequence[tuple[float, float]], held_out: Sequence[tuple[float, float]] = (), title: str = "Loss"
) -> Figure:
    """Losses over steps, as (step, loss): a line for the batches, dots for the held-out documents."""
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


@drawing
def compare_losses(curves: Mapping[str, Sequence[tuple[float, float]]], title: str = "Loss") -> Figure:
    """The losses of several runs in one figure; for each name its losses, as (step, loss)."""
    figure = new_figure(7, 3)
    axes = figure.subplots()
    for index, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*points, strict=True), color=PALETTE[index % len(PALETTE)], label=legend_label(name))
    axes.set(title=title, xlabel="step", ylabel="loss, nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
