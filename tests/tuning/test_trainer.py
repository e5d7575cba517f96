"""The Trainer: losses per token, patience, errors; and what it uses of transformers' Trainer."""

import inspect
import logging
import re
import shutil

import pytest
import torch
from transformers import FalconForCausalLM, Trainer

import falcon_kit as fk
from falcon_kit.model import modeling
from falcon_kit.tuning import trainer
from falcon_kit.tuning.trainer import AdapterTrainer
from tests.tuning.small_runs import PATIENT, QUICK, ROWS, broken_off, talk, weights

# Losses


@pytest.mark.parametrize(("max_steps", "warmup_ratio"), [(1, 0.03), (1, 0.9), (2, 0.9)])
def test_the_last_step_of_a_short_run_has_the_whole_rate_and_changes_the_adapter(
    falcon, tmp_path, max_steps, warmup_ratio
):
    options = {**QUICK, "max_steps": max_steps, "warmup_ratio": warmup_ratio, "lr_scheduler_type": "linear"}
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, held_out=0, **options)
    rates = [each["learning_rate"] for each in run.history if "loss" in each]
    assert rates[-1] == run.settings.learning_rate
    changed = [value for name, value in weights(run.adapter).items() if "lora_B" in name]
    assert changed
    assert all(value.any() for value in changed)


def test_accumulated_batches_weigh_every_token_alike(falcon, tmp_path):
    rows = [*ROWS[:12], talk("Count.", "One two three four five six seven eight nine ten. " * 3)]
    options = {**QUICK, "lora_dropout": 0.0, "max_steps": 3, "packing": False, "held_out": 0}
    whole = fk.tune(falcon, rows, output_dir=tmp_path / "whole", **{**options, "per_device_train_batch_size": 4})
    parts = fk.tune(
        falcon,
        rows,
        output_dir=tmp_path / "parts",
        **{**options, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    )
    for one, other in zip(whole.history[:3], parts.history[:3], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_the_held_out_loss_is_transformers_own(falcon, tmp_path):
    documents = fk.dialogues(ROWS)
    run = fk.tune(falcon, documents, output_dir=tmp_path, **QUICK)
    _, held_out = documents.split(run.settings.held_out, run.settings.seed)
    plain = FalconForCausalLM.from_pretrained(falcon.model.name_or_path, dtype=torch.float32).eval()
    losses, tokens = 0.0, 0
    packed = fk.pack(held_out, falcon, together=False)
    for index in range(len(packed)):
        ids, labels = (torch.from_numpy(packed[index][name])[None].long() for name in ("input_ids", "labels"))
        count = int((labels[:, 1:] != -100).sum())
        losses += plain(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
    assert run.figures["held-out loss before"] == pytest.approx(losses / tokens, rel=1e-4)


def test_held_out_losses_are_computed_without_doubles_which_some_devices_lack(monkeypatch, falcon, tmp_path):
    monkeypatch.setattr(torch.Tensor, "double", lambda _: pytest.fail("no float64 here"))
    assert fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK).figures


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_batch(monkeypatch, falcon, tmp_path):
    forward, calls = modeling.FalconForCausalLM.forward, []

    def poisoned(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if self.training:
            calls.append(1)
            if len(calls) == 3:
                out.loss = out.loss * float("nan")
        return out

    monkeypatch.setattr(modeling.FalconForCausalLM, "forward", poisoned)
    with pytest.raises(
        FloatingPointError, match=r"loss is nan at step 3, in the batch of rows .*row \d+.*checkpoint-2"
    ):
        fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)


# Patience


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """A run that patience ended, as it is before its adapter is written down."""
    run = fk.tune(fk.load("falconet", dtype="float32"), ROWS, output_dir=tmp_path_factory.mktemp("run"), **PATIENT)
    kept = weights(run.adapter)
    shutil.rmtree(run.adapter)
    return run, kept


def test_patience_stops_and_takes_the_best_adapter(patient):
    run, _ = patient
    losses = [each["eval_loss"] for each in run.history if "eval_loss" in each]
    assert len(losses) < 20
    assert run.figures["held-out loss after"] == pytest.approx(min(losses), rel=1e-4)


def test_patience_says_nothing_of_what_is_measured_before_and_after(falcon, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    try:
        fk.tune(falcon, ROWS, output_dir=tmp_path, patience=2, **QUICK)
    finally:
        logging.getLogger("transformers").propagate = False
    assert "early stopping" not in caplog.text


def test_a_run_that_patience_ended_is_over_and_keeps_its_best_adapter(monkeypatch, patient, falcon):
    run, kept = patient
    monkeypatch.setattr(AdapterTrainer, "training_step", lambda *_, **__: pytest.fail("it trains again"))
    again = fk.tune(falcon, ROWS, output_dir=run.adapter.parent, **PATIENT)
    assert all(torch.equal(weights(again.adapter)[name], kept[name]) for name in kept)
    assert again.figures == run.figures


def test_patience_goes_on_counting_where_a_run_was_broken_off(monkeypatch, patient, falcon, tmp_path):
    steps = max(each["step"] for each in patient[0].history)
    broken_off(monkeypatch, falcon, tmp_path, KeyboardInterrupt(), step=steps - 1, **PATIENT)
    again = fk.tune(falcon, ROWS, output_dir=tmp_path, **PATIENT)
    assert max(each["step"] for each in again.history) == steps


def test_a_patient_run_that_was_moved_keeps_its_best_adapter(monkeypatch, falcon, tmp_path):
    options = {**PATIENT, "max_steps": 36, "learning_rate": 0.1, "eval_steps": 2}
    expected = fk.tune(falcon, ROWS, output_dir=tmp_path / "whole", **options)
    losses = {each["step"]: each["eval_loss"] for each in expected.history if "eval_loss" in each}
    best = min(losses, key=losses.get)
    assert best + 2 < max(losses)
    broken_off(monkeypatch, falcon, tmp_path / "one", KeyboardInterrupt(), step=best + 3, **options)
    (tmp_path / "one").rename(tmp_path / "two")
    again = fk.tune(falcon, ROWS, output_dir=tmp_path / "two", **options)
    assert again.figures == expected.figures


# What is used of transformers' Trainer

PRIVATE = {
    "_defer_fsdp_gradient_reduction": ["self"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_rng_state": ["self", "checkpoint"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
}


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_method_that_is_overridden_exists_with_the_same_parameters(name):
    for kind in (Trainer, AdapterTrainer):
        assert list(inspect.signature(getattr(kind, name)).parameters) == PRIVATE[name]


def test_no_other_private_name_of_the_trainer_is_overridden_or_used():
    names = set(re.findall(r"\b_[a-z]\w*", inspect.getsource(AdapterTrainer)))
    of_trainer = {*vars(Trainer), *re.findall(r"self\.(_\w+)", inspect.getsource(Trainer))}
    assert names & of_trainer == set(PRIVATE)


def test_the_trainer_has_the_attributes_that_are_set_and_calls_what_is_overridden():
    source = inspect.getsource(Trainer)
    wanted = ["self.is_distributed_loading_by_transformers", "os.path.join(run_dir, checkpoint_folder)"]
    wanted += ["self.save_model(output_dir, _internal_call=True)", "run_dir = self.args.output_dir"]
    assert [each for each in (*wanted, *(f"self.{name}" for name in PRIVATE)) if each not in source] == []


# Arguments


def test_a_process_trains_on_one_gpu_however_many_it_sees(monkeypatch, falcon, tmp_path):
    def several(options):
        options._n_gpu = 4
        return torch.device("cpu")

    monkeypatch.setattr("transformers.TrainingArguments.device", property(several))
    chosen = fk.Tuning().for_model(falcon.spec)
    assert trainer.arguments(chosen, tmp_path, falcon.model, 8, False, True).n_gpu == 1
