"""The colour palette and the empty figure that every plot uses."""

from __future__ import annotations

import io
from functools import partial
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, AMBER, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, YELLOW, GREY = "#56B4E9", "#D55E00", "#F0E442", "#777777"
PALETTE = (BLUE, AMBER, GREEN, PURPLE, SKY, VERMILION, YELLOW, GREY)
"""The colours of Okabe and Ito, which colour-blind readers can tell apart."""
_DPI = 96  # Jupyter renders pyplot's figures at 72, where labels of 9 points are hard to read


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this width and height in inches. A notebook displays it without importing pyplot.

    The figure is not registered with pyplot: it needs no `plt.close`, and it may be drawn in any thread. Names and
    tokens in it are drawn as they are: "$" begins no formula, and `drawable` replaces what cannot be seen.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    cast(Any, figure)._repr_png_ = partial(_png, figure)  # Jupyter calls this method to display an object
    cast(Any, figure).draw = partial(_draw, figure)
    return figure


def drawable(text: str) -> str:
    """The text with each invisible character, or one that the font lacks, as its code point: "🦅" is "[U+1F985]"."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(
        each if each == "\n" or (each.isprintable() and font.get_char_index(ord(each))) else f"[U+{ord(each):04X}]"
        for each in text
    )


def legend_label(name: str) -> str:
    """A name as the label of a line or bar: matplotlib leaves a label that begins with "_" out of the legend."""
    return f" {name}" if name.startswith("_") else name


def _draw(figure: Figure, renderer: Any) -> None:
    """Draws the figure, as its class does, with all texts as plain text."""
    from matplotlib.text import Text

    for each in figure.findobj(Text):
        each.set_parse_math(False)
        each.set_text(drawable(each.get_text()))
    type(figure).draw(figure, renderer)


def _png(figure: Figure) -> bytes:
    """The figure as a PNG of 256 colours, which takes a third of the bytes of a full-colour PNG in a saved notebook."""
    from PIL import Image

    full, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=_DPI)
    Image.open(full).convert("RGB").quantize(256).save(reduced, format="png", optimize=True)
    return reduced.getvalue()
