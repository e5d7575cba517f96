"""Jupyter displays figures without pyplot."""

import io
import subprocess
import sys

from PIL import Image

from falcon_kit.display.figure import new_figure

PROGRAM = """
import sys
from IPython.core.formatters import DisplayFormatter
from falcon_kit.display.figure import new_figure
shown, _ = DisplayFormatter().format(new_figure(2, 1))
print(sorted(shown), "matplotlib.pyplot" in sys.modules)
"""


def test_a_notebook_shows_a_figure_without_pyplot():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "['image/png', 'text/plain'] False"


def test_a_figure_is_a_picture_of_its_size():
    figure = new_figure(2, 1)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert figure.get_size_inches().tolist() == [2, 1]
    assert Image.open(io.BytesIO(figure._repr_png_())).size == (192, 96)  # labels of 9 points are 12 pixels
