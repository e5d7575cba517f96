"""What a run hands out: tables that escape, curves that show what was logged, a card that says what it is."""

from pathlib import Path

import pytest

import falcon_kit as fk
from falcon_kit.tuning.plots import loss_curve
from falcon_kit.tuning.runs import BeforeAfter, TuningRun, model_card
from tests.tuning.small_runs import QUICK, ROWS

HISTORY = (
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": 2.0},
    {"step": 2, "eval_loss": 2.5},
    {"step": 2, "after_loss": 9},
)
TALK = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]]


def lines(figure):
    (axes,) = figure.axes
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_the_curve_shows_the_batches_and_what_was_held_out_apart():
    assert lines(loss_curve(HISTORY)) == {"batches": ([1, 2], [3.0, 2.0]), "held out": ([2], [2.5])}


def test_a_curve_of_nothing_can_be_drawn():
    assert lines(loss_curve([])) == {}


def test_before_and_after_escapes_what_was_said(tmp_path):
    said = BeforeAfter((("<b>", "<img onerror=alert(1)>", "fine"),))
    page = said.to_html(tmp_path / "page.html").read_text()
    assert ("<img" in page, "&lt;img onerror=alert(1)&gt;" in page) == (False, True)
    assert ("<b>" in page, "&lt;b&gt;" in page) == (False, True)
    assert '<html lang="en">' in page
    assert "Content-Security-Policy" in page
    assert "<title>Before and after</title>" in page
    assert repr(said) == "<b>\n  before: '<img onerror=alert(1)>'\n  after:  'fine'"


def run_of(falcon, figures, adapter=Path("runs/mine/adapter"), **settings):
    packed = fk.pack(fk.dialogues(TALK), falcon)
    return TuningRun(adapter, falcon, fk.Tuning(**settings), falcon.plan, packed, HISTORY, figures)


def test_a_run_is_a_table_and_a_data_frame(instruct, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1234")
    run = run_of(instruct, {"stop rate after": 0.5}, tmp_path)
    assert list(run.to_dataframe()["loss"].dropna()) == [3.0, 2.0]
    assert "stop rate after" in run._repr_html_()
    assert "falconet-instruct, r=8; stop rate after 0.5" in repr(run)


def test_the_card_names_base_data_settings_and_figures(instruct):
    text = model_card(run_of(instruct, {"held-out loss after": 1.25}, r=4))
    wanted = (
        "base_model: falconet-instruct\n",
        "# mine",
        "1 document of",
        "| r | 4 |",
        "| held-out loss after | 1.25 |",
        "`User:`",
    )
    assert [each for each in wanted if each not in text] == []


@pytest.mark.parametrize(("kind", "other"), [("web-text", "generated-text"), ("generated-text", "web-text")])
def test_the_card_explains_the_loss_on_other_texts_that_was_measured(instruct, kind, other):
    text = model_card(run_of(instruct, {f"{kind} loss after": 2}))
    assert f'"{kind} loss": the loss on ' in text
    assert f"{other} loss" not in text


def test_the_card_names_a_format_of_ones_own():
    template = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    falcon = fk.load("falconet", chat=fk.ChatFormat("mine", template=template))
    assert "Chat format: mine.\n" in model_card(run_of(falcon, {}))


def test_a_notebook_shows_the_curves():
    assert loss_curve(HISTORY)._repr_png_().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return fk.tune(fk.load("falconet"), ROWS, output_dir=folder, quiet=True, **{**QUICK, "max_steps": 1})


@pytest.mark.parametrize(("settings", "kinds"), [({}, 1), ({"temperature": 2.0}, 4), ({"do_sample": True}, 4)])
def test_answers_before_and_after_are_greedy_unless_the_call_samples(run, settings, kinds):
    run.falcon.model.generation_config.update(do_sample=True, temperature=1.5)
    answers = [run.before_after("What is a zebra?", 20, **settings).rows[0][1] for _ in range(4)]
    assert len(set(answers)) == kinds
