"""What a run says about itself: what it learned, what it forgot, and which setting to change."""

import dataclasses

import pytest

import falcon_kit as fk
from falcon_kit.tuning.verdict import verdict
from tests.tuning.small_runs import QUICK, ROWS, talk

SETTINGS = fk.Tuning(learning_rate=1e-3, context=256)


@pytest.fixture(scope="module", autouse=True)
def short_text():
    """The texts that the package ships: verdicts compare their losses."""


def losses(*values):
    return [{"step": step, "loss": value} for step, value in enumerate(values, 1)]


def figures(**values):
    return {name.replace("_", " ").replace("web text", "web-text").replace("held out", "held-out"): value
            for name, value in values.items()}  # fmt: skip


def test_twelve_steps_that_learned_nothing_say_so_and_what_to_raise():
    said = verdict(losses(*[2.0] * 6, *[1.96] * 6), {}, SETTINGS, 30)
    assert said.startswith("12 steps over 30 documents: the loss of the batches fell by 2%, so it has learned next to")
    assert "Raise max_steps to 60" in said


def test_a_smaller_context_is_no_advice_where_each_document_has_its_row():
    alone = fk.Tuning(learning_rate=1e-3, context=256, packing=False)
    assert verdict(losses(2.0, 2.0), {}, alone, 30).endswith("Raise max_steps to 60 or more")


def test_many_steps_that_learned_nothing_name_the_learning_rate():
    said = verdict(losses(*[2.0] * 100), {}, SETTINGS, 30)
    assert "Raise learning_rate (it was 0.001), or r (it was 8)" in said


def test_a_single_step_is_compared_with_nothing():
    assert verdict(losses(2.0), {}, SETTINGS, 1).startswith("1 step over 1 document: the loss cannot be compared")


def test_the_held_out_loss_counts_where_there_is_one():
    measured = figures(held_out_loss_before=4.0, held_out_loss_after=1.0)
    assert (
        verdict(losses(4.0, 4.0), measured, SETTINGS, 30) == "2 steps over 30 documents: the held-out loss fell by 75%"
    )


def test_a_run_without_held_out_rows_says_how_to_test_its_answers():
    said = verdict(losses(*[4.0] * 5, *[1.0] * 5), {}, SETTINGS, 6)
    assert said == (
        "10 steps over 6 documents: the loss of the batches fell by 75%. No rows were held out: test its answers "
        "with run.rates(rows), or tune with held_out=0.1"
    )


def test_rows_learned_by_heart_are_told_apart():
    measured = figures(held_out_loss_before=4.0, held_out_loss_after=4.4)
    said = verdict(losses(*[4.0] * 5, *[0.1] * 5), measured, SETTINGS, 30)
    assert "the held-out loss rose by 10%, that of the batches fell by 98%: it learned these documents by heart" in said


def test_held_out_answers_that_became_right_are_learned_whatever_the_loss():
    measured = figures(held_out_loss_before=1.4, held_out_loss_after=1.37)
    measured |= {"exact answers before": 0.07, "exact answers after": 0.93}
    said = verdict(losses(*[4.0] * 5, *[0.1] * 5), measured, SETTINGS, 30)
    assert said == (
        "10 steps over 30 documents: the held-out loss fell by 2%, and 93% of the held-out answers are right, "
        "instead of 7%"
    )


@pytest.mark.parametrize(
    ("changes", "ended"),
    [
        ({"max_steps": 40}, True),
        ({"max_steps": 4}, False),
        ({"num_train_epochs": 3}, True),
        ({"num_train_epochs": 1}, False),
    ],
)
def test_a_run_that_patience_ended_is_not_told_to_take_more_steps(changes, ended):
    measured = figures(held_out_loss_before=4.0, held_out_loss_after=2.0) | {"exact answers after": 0.0}
    history = [each | {"epoch": each["step"] / 4} for each in losses(4.0, 3.0, 3.0, 3.0)]
    said = verdict(history, measured, dataclasses.replace(SETTINGS, patience=2, **changes), 28)
    assert ("patience=2 ended it after 4 of" in said) == ended
    assert ("Raise max_steps" in said) != ended
    assert ("raise patience, or lower learning_rate (it was 0.001)" in said) == ended


@pytest.mark.parametrize(("steps", "exact", "advised"), [(3, 0.0, True), (3, 0.5, False), (60, 0.0, False)])
def test_few_steps_without_an_exact_answer_are_too_few_although_the_loss_fell(steps, exact, advised):
    measured = figures(held_out_loss_before=4.0, held_out_loss_after=2.0) | {"exact answers after": exact}
    said = verdict(losses(*[3.0] * steps), measured, SETTINGS, 28)
    assert said.startswith(f"{steps} steps over 28 documents: the held-out loss fell by 50%")
    assert ("no held-out answer is exact. Raise max_steps to 60 or more" in said) == advised


@pytest.mark.parametrize(("after", "end"), [(2.05, "little or nothing is forgotten"), (3.0, "or train fewer steps")])
def test_a_loss_on_web_text_that_rose_is_forgetting(after, end):
    said = verdict(losses(4.0, 1.0), figures(web_text_loss_before=2.0, web_text_loss_after=after), SETTINGS, 30)
    assert said.splitlines()[1].startswith(f"the loss on web text went from 2.00 to {after:.2f}")
    assert said.endswith(end)


def test_every_run_measures_what_it_forgets_also_where_nothing_is_held_out(falcon, tmp_path):
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, held_out=0, **{**QUICK, "learning_rate": 0.05})
    assert set(run.figures) == {"generated-text loss before", "generated-text loss after"}
    assert run.figures["generated-text loss after"] > run.figures["generated-text loss before"] + 0.1
    assert "the loss on 8 generated English texts went from" in run.verdict
    assert "it forgets" in run.verdict
    assert "it forgets" in run._repr_html_()
    assert "generated-text loss after" in (run.adapter / "README.md").read_text()


def test_forgetting_is_measured_on_the_readers_own_texts_where_they_are_given(falcon, tmp_path):
    options = {**QUICK, "max_steps": 1, "held_out": 0}
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, web_text=[{"text": "Lions roar. " * 9}], **options)
    assert set(run.figures) == {"web-text loss before", "web-text loss after"}
    assert "the loss on web text went from" in run.verdict
    with pytest.raises(ValueError, match="web text: '"):
        fk.tune(falcon, ROWS, output_dir=tmp_path, web_text=[{"text": "Cows moo. " * 9}], **options)


def test_a_run_shows_its_verdict_unless_it_is_quiet(falcon, tmp_path, capsys):
    shown = []
    for quiet in (True, False):
        fk.tune(falcon, ROWS, output_dir=tmp_path / str(quiet), quiet=quiet, **QUICK)
        shown.append("6 steps over" in capsys.readouterr().out)
    assert shown == [False, True]


def test_a_run_answers_from_the_rows_that_it_learned(falcon, tmp_path):
    rows = ROWS[:4]
    options = {"r": 16, "max_steps": 25, "context": 64, "per_device_train_batch_size": 4, "held_out": 0, "quiet": True}
    run = fk.tune(falcon, rows, output_dir=tmp_path, **options)
    assert run.rates(rows) == {"stop rate": 1, "exact answers": 1}
    assert run.rates([talk("What is a giraffe?", "Cake.")])["exact answers"] == 0
