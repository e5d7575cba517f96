"""Jupyter displays figures without pyplot, and they are legible on light and on dark."""

import ast
import io
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image, ImageColor

import falcon_kit
from falcon_kit.display.figure import GREY, STYLE, drawing, new_figure

PROGRAM = """
import sys
from IPython.core.formatters import DisplayFormatter
from falcon_kit.display.figure import new_figure
shown, _ = DisplayFormatter().format(new_figure(2, 1))
print(sorted(shown), "matplotlib.pyplot" in sys.modules)
"""


@drawing
def a_plot():
    figure = new_figure(3, 2)
    axes = figure.subplots()
    axes.plot([1, 2, 3], label="line")
    axes.set(title="title", xlabel="x", ylabel="y")
    axes.legend()
    axes.text(1, 2, "text")
    return figure


def luminance(colour):
    """The relative luminance of WCAG 2, for sRGB values from 0 to 255."""
    values = np.asarray(colour)[..., :3] / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(colour, background):
    light, dark = np.sort([luminance(colour), luminance(background)])[::-1]
    return (light + 0.05) / (dark + 0.05)


def test_a_notebook_shows_a_figure_without_pyplot():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "['image/png', 'text/plain'] False"


def test_a_figure_is_a_picture_of_its_size():
    figure = new_figure(2, 1)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert figure.get_size_inches().tolist() == [2, 1]
    assert Image.open(io.BytesIO(figure._repr_png_())).size == (192, 96)  # labels of 9 points are 12 pixels


@pytest.mark.parametrize("background", ["#ffffff", "#111111"])  # JupyterLab's light and dark
def test_text_is_legible_on_light_and_on_dark(background):
    assert contrast(ImageColor.getrgb(GREY), ImageColor.getrgb(background)) > 4


def test_a_figure_has_no_background_and_nothing_black_or_white():
    pixels = np.asarray(Image.open(io.BytesIO(a_plot()._repr_png_())).convert("RGBA")).reshape(-1, 4)
    visible = pixels[pixels[:, 3] > 200]
    assert len(visible) < 0.2 * len(pixels)
    assert [pixel.tolist() for pixel in visible if not 0.06 < luminance(pixel) < 0.6] == []


@pytest.mark.parametrize("scale", ["log", "symlog", "logit"])
def test_the_ticks_of_a_logarithmic_axis_are_drawn_as_powers_and_other_text_as_it_is(scale):
    figure = new_figure(3, 2)
    axes = figure.subplots()
    axes.barh(["$x$", "y_1"], [0.001, 0.9])
    axes.set_xscale(scale)
    figure._repr_png_()
    ticks = [each for each in axes.get_xticklabels() if each.get_text()]
    assert ticks
    assert [each.get_text() for each in ticks if "$" in each.get_text() and not each.get_parse_math()] == []
    assert [each.get_parse_math() for each in axes.get_yticklabels()] == [False, False]


def test_drawing_leaves_the_readers_settings_as_they_are():
    before = {name: mpl.rcParams[name] for name in STYLE}
    a_plot()._repr_png_()
    assert {name: mpl.rcParams[name] for name in STYLE} == before != {**before, **STYLE}


PACKAGE = Path(falcon_kit.__file__).parent
FUNCTIONS = [
    (f"{path.relative_to(PACKAGE)}::{node.name}", [ast.unparse(each) for each in node.decorator_list])
    for path in PACKAGE.rglob("*.py")
    if path.name == "plots.py" or path.parent.name == "plots"
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef) and node.returns and ast.unparse(node.returns) == "Figure"
]


@pytest.mark.parametrize(("name", "decorators"), FUNCTIONS)
def test_every_function_that_draws_a_figure_uses_the_style(name, decorators):
    assert "drawing" in decorators, name
