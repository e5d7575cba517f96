"""What a run hands out: tables that escape, curves that show what was logged, a card that says what it is."""

import falcon_kit as fk
from falcon_kit.tuning.plots import compare_losses, loss_curve
from falcon_kit.tuning.runs import BeforeAfter, TuningRun, history_curve, model_card

HISTORY = (
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": 2.0},
    {"step": 2, "eval_loss": 2.5},
    {"step": 2, "after_loss": 9},
)
ROWS = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]]


def lines(figure):
    (axes,) = figure.axes
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_the_curve_shows_the_batches_and_what_was_held_out_apart():
    assert lines(history_curve(HISTORY, "Tuning")) == {"batches": ([1, 2], [3.0, 2.0]), "held out": ([2], [2.5])}


def test_a_curve_of_nothing_can_be_drawn():
    assert lines(loss_curve([])) == {}


def test_several_runs_are_drawn_by_name():
    assert lines(compare_losses({"rank 1": [(1, 2.0)], "rank 4": [(1, 1.0)]})) == {
        "rank 1": ([1], [2.0]),
        "rank 4": ([1], [1.0]),
    }


def test_before_and_after_escapes_what_was_said(tmp_path):
    said = BeforeAfter((("<b>", "<img onerror=alert(1)>", "fine"),))
    page = said.to_html(tmp_path / "page.html").read_text()
    assert "<img" not in page
    assert "<b>" not in page
    assert repr(said) == "<b>\n  before: '<img onerror=alert(1)>'\n  after:  'fine'"


def test_a_run_is_a_table_and_a_data_frame(instruct, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1234")
    packed = fk.pack(fk.dialogues(ROWS), instruct)
    run = TuningRun(tmp_path, instruct, fk.Tuning(), instruct.plan, packed, HISTORY, {"stop rate after": 0.5})
    assert list(run.to_dataframe()["loss"].dropna()) == [3.0, 2.0]
    assert "stop rate after" in run._repr_html_()
    assert "falconet-instruct, r=8; stop rate after 0.5" in repr(run)


def test_the_card_names_base_data_settings_and_figures(instruct):
    packed = fk.pack(fk.dialogues(ROWS), instruct)
    text = model_card("falconet", "mine", instruct.chat_format, packed, fk.Tuning(r=4), {"held-out loss after": 1.25})
    wanted = (
        "base_model: falconet",
        "# mine",
        "1 document of",
        "| r | 4 |",
        "| held-out loss after | 1.25 |",
        "`User:`",
    )
    assert [each for each in wanted if each not in text] == []


def test_a_card_without_figures_says_so(instruct):
    packed = fk.pack(fk.dialogues(ROWS), instruct)
    assert "Nothing was held out" in model_card("falconet", "mine", instruct.chat_format, packed, fk.Tuning(), {})


def test_a_notebook_shows_the_curves():
    for figure in (loss_curve([(1, 2.0)]), compare_losses({"rank 1": [(1, 2.0)]})):
        assert figure._repr_png_().startswith(b"\x89PNG")
