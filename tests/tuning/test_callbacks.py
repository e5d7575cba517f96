"""Ctrl-C saves the step first; adapters without a gradient are an error."""

import signal

import pytest
import torch

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
