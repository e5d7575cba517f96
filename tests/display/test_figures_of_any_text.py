"""Every figure of the package with names and tokens that look like formulas, or that cannot be seen."""

import importlib
import inspect
import pkgutil

import numpy as np
import pytest
from matplotlib.legend import Legend
from matplotlib.text import Text

import falcon_kit
from falcon_kit.display.figure import drawable, new_figure
from falcon_kit.evaluation.plots import evaluation_figure, shares_figure
from falcon_kit.inspection.plots import attention, labels, lens, tokens
from falcon_kit.planning.devices import Device
from falcon_kit.planning.placement import Part
from falcon_kit.planning.plots import draw_plan
from falcon_kit.tuning import plots as tuning

TEXTS = [r"$\frac{$", "_\x00\x1b\u202eabc\u2066", "\ud83e 🦅\u0301 $x$ ^_{}%\\"]
ONES = np.ones((2, 4))


def row(name, metric):
    return {"name": name, "metric": metric, "value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.25}


FIGURES = {
    new_figure: lambda text: new_figure(3, 2).suptitle(text).figure,
    labels.token_figure: lambda text: labels.token_figure([text, text]),
    attention.heads: lambda text: attention.heads(ONES, 2, text, text),
    attention.one_map: lambda text: attention.one_map(np.eye(2), [text, "a"], text),
    attention.head_similarity: lambda text: attention.head_similarity(ONES, ONES[:, 0]),
    lens.layers: lambda text: lens.layers([text, "a"], [[text, "b"]] * 3, np.ones((3, 2)) / 2),
    lens.contributions: lambda text: lens.contributions(0.5, ONES[0], ONES[0], text),
    lens.surprisal: lambda text: lens.surprisal([text, "a"], {text: ONES[0, :2], "other": ONES[0, :2]}),
    lens.attribution: lambda text: lens.attribution([text, "a"], ONES[0, :2], text),
    tokens.lengths: lambda text: tokens.lengths([text, b"\xff"], [1, 2], ["whole", "part"]),
    tokens.languages: lambda text: tokens.languages([text, "b"], {text: [1, 2]}, {text: [3, 4]}, text),
    tuning.loss_curve: lambda text: tuning.loss_curve([{"step": 0, "loss": 1.0}], text),
    evaluation_figure: lambda text: evaluation_figure(
        [row(text, "acc"), row(text, "bits_per_byte")], text, {"averages": {text: 50.0}}
    ),
    shares_figure: lambda text: shares_figure([row(text, "share")], [text], text),
    draw_plan: lambda text: draw_plan([Part(text, text, 2**30, text)], [Device(text, text, 2**31)], text),
}


def functions_that_return_figures():
    for module in pkgutil.walk_packages(falcon_kit.__path__, "falcon_kit."):
        if module.name.rpartition(".")[2] in ("plots", "figure") or ".plots." in module.name:
            for name, each in inspect.getmembers(importlib.import_module(module.name), inspect.isfunction):
                returned = str(inspect.signature(each).return_annotation)
                if each.__module__ == module.name and "Figure" in returned and not name.startswith("_"):
                    yield each


def test_every_function_that_draws_is_in_this_test():
    assert {*functions_that_return_figures()} == {*FIGURES}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=[each.__qualname__ for each in FIGURES])
def test_any_text_is_drawn_as_plain_visible_text(draw):
    for text in TEXTS:
        figure = draw(text)
        figure = figure[0] if isinstance(figure, tuple) else figure
        assert figure._repr_png_().startswith(b"\x89PNG")
        drawn = [each.get_text() for each in figure.findobj(Text)]
        assert all(each.replace("\n", "").isprintable() for each in drawn)


@pytest.mark.parametrize("draw", [lens.surprisal, tokens.languages, draw_plan])
def test_every_name_is_in_the_legend(draw):
    figure = FIGURES[draw]("_name")
    legends = figure.findobj(Legend)
    assert " _name" in [each.get_text() for legend in legends for each in legend.get_texts()]


def test_a_text_is_not_changed_before_it_is_drawn():
    figure = new_figure(3, 2)
    axes = figure.subplots()
    axes.set_title("\u202e$")
    assert axes.get_title() == "\u202e$"


@pytest.mark.parametrize(
    ("text", "drawn"), [("a$b", "a$b"), ("🦅", "[U+1F985]"), ("a\nb", "a\nb"), ("\u202ea\x00", "[U+202E]a[U+0000]")]
)
def test_what_cannot_be_seen_is_drawn_as_its_code_point(text, drawn):
    assert drawable(text) == drawn
