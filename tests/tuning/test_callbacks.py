"""Ctrl-C saves the step first; adapters without a gradient are an error; callbacks of the user; other trainers."""

import signal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import falcon_kit as fk
from falcon_kit.tuning.trainer import AdapterTrainer
from tests.tuning.small_runs import QUICK, ROWS, broken_off, interrupted, logits, same


def test_ctrl_c_leaves_the_falcon_usable_and_the_run_resumable(monkeypatch, falcon, whole, tmp_path):
    before = logits(falcon)
    broken_off(monkeypatch, falcon, tmp_path, KeyboardInterrupt())
    assert torch.equal(logits(falcon), before)
    assert same(fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK).adapter, whole.adapter)


def test_ctrl_c_saves_the_step_and_says_where_the_same_call_goes_on(monkeypatch, capsys, falcon, whole, tmp_path):
    before, options = logits(falcon), {"save_steps": 99}
    interrupted(monkeypatch, falcon, tmp_path, 3, **options)
    assert "fk.tune with resume=True, the default, resumes from step 3 of 6" in capsys.readouterr().out
    assert torch.equal(logits(falcon), before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = fk.tune(falcon, ROWS, output_dir=tmp_path, **{**QUICK, **options})
    assert same(resumed.adapter, whole.adapter)


def test_ctrl_c_during_an_evaluation_saves_the_step(monkeypatch, capsys, falcon, tmp_path):
    evaluate = AdapterTrainer.evaluate

    def interrupted_evaluation(self, *args, **options):
        signal.raise_signal(signal.SIGINT)
        return evaluate(self, *args, **options)

    monkeypatch.setattr(AdapterTrainer, "evaluate", interrupted_evaluation)
    with pytest.raises(KeyboardInterrupt):
        fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK | {"eval_steps": 3, "save_steps": 99})
    assert "resumes from step 3 of 6" in capsys.readouterr().out


def test_a_second_ctrl_c_does_not_wait_for_the_end_of_the_step(monkeypatch, capsys, falcon, tmp_path):
    def pressed_twice(self, *args, **options):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", pressed_twice)
    with pytest.raises(KeyboardInterrupt):
        fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    assert "resumes from step 0 of 6" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda each: setattr(each, "grad", None), "1 of 48 adapter weights get no gradient, such as base_model.*lora"),
        (lambda each: each.grad.zero_(), "the gradients of all 48 adapter weights are zero, so nothing would be lear"),
    ],
    ids=["one has none", "all are zero"],
)
def test_adapters_without_a_gradient_are_noticed_before_the_first_step(monkeypatch, falcon, tmp_path, spoil, text):
    clip = AdapterTrainer._clip_grad_norm

    def spoiled(self, model):
        norm = clip(self, model)
        trained = [each for each in model.parameters() if each.requires_grad]
        for each in trained[:1] if "get no" in text else trained:
            spoil(each)
        return norm

    monkeypatch.setattr(AdapterTrainer, "_clip_grad_norm", spoiled)
    with pytest.raises(RuntimeError, match=text):
        fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)


def test_gradients_that_overflowed_are_no_proof_that_nothing_is_learned(monkeypatch, falcon, tmp_path):
    clip = AdapterTrainer._clip_grad_norm

    def overflowed(self, model):
        norm = clip(self, model)
        if self.state.global_step == 0:
            for each in model.parameters():
                if each.grad is not None:
                    each.grad.fill_(float("nan"))
            monkeypatch.setattr(self.optimizer, "step", lambda *_: None)  # as the scaler does
        else:
            monkeypatch.undo()
        return norm

    monkeypatch.setattr(AdapterTrainer, "_clip_grad_norm", overflowed)
    assert fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK).figures


class Observer(TrainerCallback):
    """Keeps the steps that it sees; stops the run after one of them."""

    def __init__(self, last=None):
        self.steps, self.losses, self.last = [], [], last

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)
        if state.global_step == self.last:
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []


def test_a_callback_of_the_user_sees_every_step_and_changes_nothing(falcon, whole, tmp_path):
    seen = Observer()
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, callbacks=[seen], **QUICK)
    assert seen.steps == [1, 2, 3, 4, 5, 6]
    assert seen.losses == [each["loss"] for each in run.history if "loss" in each]
    assert same(run.adapter, whole.adapter)

    again = Observer()
    assert same(fk.tune(falcon, ROWS, output_dir=tmp_path, callbacks=[again], **QUICK).adapter, run.adapter)
    assert again.steps == []  # the run is read from its folder


def test_a_callback_of_the_user_stops_a_run(falcon, tmp_path):
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, callbacks=(Observer(last=3),), **QUICK)
    assert [each["step"] for each in run.history if "loss" in each] == [1, 2, 3]
    assert fk.load(run.adapter).generate("Arr!", max_new_tokens=2).tokens


@pytest.mark.parametrize("given", [Observer(), [Observer], ["wandb"]])
def test_what_is_no_list_of_callbacks_is_refused(falcon, tmp_path, given):
    with pytest.raises(TypeError, match=r"callbacks must be a list of transformers' TrainerCallback objects, got .*\w"):
        fk.tune(falcon, ROWS, output_dir=tmp_path, callbacks=given, **QUICK)


def test_transformers_trainer_trains_another_adapter_on_packed_rows(falcon, tmp_path):
    """What `fk.tune` advises for DoRA and the like; rows are single, so the Trainer needs no collator."""
    rows = fk.pack(fk.dialogues(ROWS), falcon, 64)
    model = get_peft_model(falcon.model, LoraConfig(target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"))
    options = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, max_steps=2, learning_rate=0.01, report_to="none", use_cpu=True
    )
    Trainer(model, options, train_dataset=rows).train()
    model.save_pretrained(tmp_path / "dora")
    expected = logits(falcon)
    model.unload()
    merged = fk.merge(tmp_path / "dora", falcon.name)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(falcon), expected, atol=0.1)
