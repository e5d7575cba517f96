"""The colour palette, and figures that are legible on a light and on a dark background.

A figure has no background of its own. Text and lines are in one grey, whose contrast is above 4 on white and on the
near-black of dark notebooks (WCAG 2 asks for 3 of large text and graphics).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

BLUE, AMBER, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, YELLOW, GREY = "#56B4E9", "#D55E00", "#F0E442", "#777777"
PALETTE = (BLUE, AMBER, GREEN, PURPLE, SKY, VERMILION, YELLOW, GREY)
"""The colours of Okabe and Ito, which colour-blind readers can tell apart."""
_DPI = 96  # Jupyter renders pyplot's figures at 72, where labels of 9 points are hard to read
_INK = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color hatch.color grid.color"
STYLE: Mapping[str, Any] = {
    **dict.fromkeys(_INK.split(), GREY),
    **{f"{each}.facecolor": "none" for each in ("figure", "axes", "savefig")},
    "legend.frameon": False,
    "figure.dpi": _DPI,
}
"""matplotlib settings for a light and a dark background. In a notebook: `matplotlib.rcParams.update(STYLE)`, then
`new_figure`. (Jupyter gives a figure of pyplot a white background if its own is transparent.)"""


def drawing(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorator of a function that draws a figure: what it draws is in STYLE."""

    @wraps(function)
    def styled(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        from matplotlib import rc_context

        with rc_context(cast(Any, STYLE)):
            return function(*args, **kwargs)

    return styled


@drawing
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
    """Draws the figure, as its class does, with all texts as plain text, except the powers of ten of a log axis."""
    from matplotlib.text import Text

    powers = _powers_of_ten(figure)
    for each in figure.findobj(Text):
        if each not in powers:
            each.set_parse_math(False)
            each.set_text(drawable(each.get_text()))
    type(figure).draw(figure, renderer)


def _powers_of_ten(figure: Figure) -> set[Text]:
    """The tick labels that matplotlib writes as formulas."""
    from matplotlib.ticker import LogFormatterMathtext, LogitFormatter

    formulas = (LogFormatterMathtext, LogitFormatter)
    axes = (axis for each in figure.axes for axis in (each.xaxis, each.yaxis))
    logarithmic = [axis for axis in axes if isinstance(axis.get_major_formatter(), formulas)]
    return {label for axis in logarithmic for label in axis.get_ticklabels(which="both")}


@drawing  # matplotlib makes the last ticks when a figure is saved
def _png(figure: Figure) -> bytes:
    """The figure as a PNG of 256 colours, which takes a third of the bytes of a full-colour PNG in a saved notebook."""
    from PIL import Image

    full, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=_DPI)
    Image.open(full).quantize(256, method=Image.Quantize.FASTOCTREE).save(reduced, format="png", optimize=True)
    return reduced.getvalue()
