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

        with rc_context(dict(STYLE)):
            return function(*args, **kwargs)

    return styled


@drawing
def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this width and height in inches. A notebook displays it without importing pyplot.

    The figure is not registered with pyplot: it needs no `plt.close`, and it may be drawn in any thread.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    cast(Any, figure)._repr_png_ = partial(_png, figure)  # Jupyter calls this method to display an object
    return figure


@drawing  # matplotlib makes the last ticks when a figure is saved
def _png(figure: Figure) -> bytes:
    """The figure as a PNG of 256 colours, which takes a third of the bytes of a full-colour PNG in a saved notebook."""
    from PIL import Image

    full, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=_DPI)
    Image.open(full).quantize(256, method=Image.Quantize.FASTOCTREE).save(reduced, format="png", optimize=True)
    return reduced.getvalue()
