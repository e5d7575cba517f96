"""The ground every figure stands on."""

from __future__ import annotations

import io
from functools import partial
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, AMBER, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, YELLOW, GREY = "#56B4E9", "#D55E00", "#F0E442", "#777777"
PALETTE = (BLUE, AMBER, GREEN, PURPLE, SKY, VERMILION, YELLOW, GREY)
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""
_DPI = 96  # pyplot's figures in Jupyter have 72, at which labels of 9 points are hard to read


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches wide and high, that a notebook shows whether or not it has imported pyplot.

    It does not belong to pyplot, so it needs no closing, and threads may draw it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    cast(Any, figure)._repr_png_ = partial(_png, figure)  # what Jupyter asks an object for
    return figure


def _png(figure: Figure) -> bytes:
    """The picture in a palette of 256 colours: a third of the bytes in every notebook that keeps it."""
    from PIL import Image

    drawn, written = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    Image.open(drawn).convert("RGB").quantize(256).save(written, format="png", optimize=True)
    return written.getvalue()
