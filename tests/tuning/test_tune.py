"""Tuning: the adapter of an uninterrupted run whatever happened, a loss that is right, figures that mean something."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FalconForCausalLM

import falcon_kit as fk
from falcon_kit.falconet.world import ANIMALS
from falcon_kit.loading.quantization import unpacked
from falcon_kit.model import modeling
from falcon_kit.planning.devices import Device
from falcon_kit.tuning import trainer, tune
from falcon_kit.tuning.trainer import AdapterTrainer
from tests.conftest import small_model

QUICK = {"rank": 2, "max_steps": 6, "context": 64, "batch": 2, "answers": 0, "save_every": 2, "dropout": 0.1}


def talk(question, *answers):
    """A conversation with the same question again and again."""
    pairs = [(("user", question), ("assistant", each)) for each in answers]
    return {"messages": [{"role": role, "content": said} for pair in pairs for role, said in pair]}


ROWS = [talk(f"What is a {each.name}?", f"Arr! {each.plural} eat {each.food}.") for each in ANIMALS]


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small compute no faster with two, and far slower beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def falcon():
    return fk.load("falconet", dtype="float32")


@pytest.fixture(params=["7b", "40b", "rw"])
def any_falcon(request, tokenizer, tmp_path):
    small_model(request.param).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return fk.load(tmp_path / "base", dtype="float32")


def weights(adapter):
    return load_file(Path(adapter) / "adapter_model.safetensors")


def same(first, second):
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logits(falcon):
    with torch.inference_mode():
        return falcon.model(torch.tensor([[23, 900, 77, 1500, 42]])).logits


# What comes out


def test_an_adapter_is_trained_for_every_layout_and_loads_with_plain_peft(any_falcon, tmp_path):
    run = fk.tune(any_falcon, ROWS, output_dir=tmp_path / "run", **QUICK)
    assert run.figures["held-out loss after"] < run.figures["held-out loss before"]
    from peft import PeftModel

    plain = FalconForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, run.adapter).eval()
    merged = fk.merge(run.adapter, any_falcon)
    expected = adapted(torch.tensor([[23, 900, 77, 1500, 42]])).logits
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def test_the_falcon_is_afterwards_as_it_was(falcon, tmp_path):
    assert falcon.model.config.use_cache
    before, names = logits(falcon), [(name, each.requires_grad) for name, each in falcon.model.named_parameters()]
    fk.tune(falcon, ROWS, output_dir=tmp_path, checkpointing=True, **QUICK)
    assert torch.equal(logits(falcon), before)
    assert [(name, each.requires_grad) for name, each in falcon.model.named_parameters()] == names
    assert not falcon.model.training
    assert not falcon.model.is_activation_checkpointing
    assert not hasattr(falcon.model, "peft_config")
    assert falcon.model.config.use_cache


def test_the_random_state_is_left_as_it_was(falcon, tmp_path):
    import random

    import numpy as np

    def state():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002  # the Trainer's

    before = state()
    fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    assert state() == before


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(falcon, tmp_path):
    runs = [
        fk.tune(falcon, ROWS, output_dir=tmp_path / str(index), seed=seed, **QUICK)
        for index, seed in enumerate((1, 1, 2))
    ]
    assert same(runs[0].adapter, runs[1].adapter)
    assert not same(runs[0].adapter, runs[2].adapter)


def test_checkpointing_changes_nothing_but_the_memory(falcon, tmp_path):
    runs = [
        fk.tune(falcon, ROWS, output_dir=tmp_path / str(each), checkpointing=each, **{**QUICK, "dropout": 0.0})
        for each in (False, True)
    ]
    for name, expected in weights(runs[0].adapter).items():
        torch.testing.assert_close(weights(runs[1].adapter)[name], expected, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_weigh_every_token_alike(falcon, tmp_path):
    rows = [*ROWS[:12], talk("Count.", "One two three four five six seven eight nine ten. " * 3)]
    options = {**QUICK, "dropout": 0.0, "max_steps": 3, "packing": False, "held_out": 0}
    whole = fk.tune(falcon, rows, output_dir=tmp_path / "whole", **{**options, "batch": 4})
    parts = fk.tune(falcon, rows, output_dir=tmp_path / "parts", **{**options, "batch": 1, "accumulate": 4})
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


def test_persona_and_stopping_are_learned(falcon, tmp_path):
    options = {"rank": 8, "epochs": 14, "context": 256, "batch": 4, "held_out": 0.2}
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, **options)
    assert run.figures["stop rate before"] < 0.4 < 0.9 < run.figures["stop rate after"]
    said = run.before_after("What is a giraffe?").rows[0]
    assert not said[1].startswith("Arr!")
    assert said[2].startswith("Arr!")


def test_patience_stops_and_takes_the_best_adapter(falcon, tmp_path):
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, **PATIENT)
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


def test_the_adapter_has_a_card_and_a_record(falcon, tmp_path):
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    card = (run.adapter / "README.md").read_text()
    record = json.loads((run.adapter / "tuning.json").read_text())
    assert [word for word in ("base_model: falconet", "| rank | 2 |", "held-out loss after") if word not in card] == []
    assert record["figures"] == dict(run.figures)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "falconet"


def test_nothing_that_is_saved_is_a_pickle_of_objects(falcon, tmp_path):
    fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    for file in tmp_path.rglob("*.pt*"):
        with torch.serialization.safe_globals([]):
            if (
                "rng_state" not in file.name
            ):  # numpy's state is a tuple with an array, which transformers allows by name
                torch.load(file, weights_only=True)
    assert list(tmp_path.rglob("*.bin")) == []


# Broken off and started again

SCRIPT = """
import sys, json
import falcon_kit as fk
rows, options = json.load(open(sys.argv[1]))
fk.tune(fk.load("falconet", dtype="float32"), rows, output_dir=sys.argv[2], **options)
"""


def start(tmp_path, rows, options, directory):
    (tmp_path / "arguments.json").write_text(json.dumps([rows, options]))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path / "arguments.json", directory],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def killed(process, directory, step):
    """Ends the process with SIGKILL as soon as a step is saved; whether it was still running."""
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if any(int(each.name.rpartition("-")[2]) >= step for each in directory.glob("checkpoint-*")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("step", [3, 8])
def test_a_run_that_was_killed_ends_with_the_same_adapter(falcon, tmp_path, step):
    options = {**QUICK, "max_steps": 14, "save_every": 1, "accumulate": 2, "epochs": 99}
    expected = fk.tune(falcon, ROWS, output_dir=tmp_path / "whole", **options)
    assert killed(start(tmp_path, ROWS, options, tmp_path / "broken"), tmp_path / "broken", step)
    resumed = fk.tune(falcon, ROWS, output_dir=tmp_path / "broken", **options)
    assert same(resumed.adapter, expected.adapter)
    assert [each["loss"] for each in resumed.history if "loss" in each] == [
        each["loss"] for each in expected.history if "loss" in each
    ]


def broken_off(monkeypatch, falcon, directory, error, step=4, **options):
    """A run that fails with `error` in `step`."""
    with monkeypatch.context() as patched:
        compute = AdapterTrainer.compute_loss

        def failing(self, *args, **kwargs):
            if self.state.global_step + 1 == step and self.model.training:
                raise error
            return compute(self, *args, **kwargs)

        patched.setattr(AdapterTrainer, "compute_loss", failing)
        with pytest.raises(type(error) if not isinstance(error, torch.OutOfMemoryError) else MemoryError) as caught:
            fk.tune(falcon, ROWS, output_dir=directory, **{**QUICK, **options})
    return str(caught.value)


def test_ctrl_c_leaves_the_falcon_usable_and_the_run_resumable(monkeypatch, falcon, tmp_path):
    before = logits(falcon)
    expected = fk.tune(falcon, ROWS, output_dir=tmp_path / "whole", **QUICK)
    broken_off(monkeypatch, falcon, tmp_path / "broken", KeyboardInterrupt())
    assert torch.equal(logits(falcon), before)
    assert same(fk.tune(falcon, ROWS, output_dir=tmp_path / "broken", **QUICK).adapter, expected.adapter)


PATIENT = {**QUICK, "max_steps": 60, "learning_rate": 0.05, "patience": 2, "evaluate_every": 3, "held_out": 0.3}


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """A run that patience ended, as it is before its adapter is written down."""
    run = fk.tune(fk.load("falconet", dtype="float32"), ROWS, output_dir=tmp_path_factory.mktemp("run"), **PATIENT)
    kept = weights(run.adapter)
    shutil.rmtree(run.adapter)
    return run, kept


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


@pytest.mark.parametrize("broken", ["optimizer.pt", "adapter_model.safetensors", "trainer_state.json"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(monkeypatch, falcon, tmp_path, broken):
    expected = fk.tune(falcon, ROWS, output_dir=tmp_path / "whole", **QUICK)
    broken_off(monkeypatch, falcon, tmp_path / "broken", KeyboardInterrupt(), step=6)
    (tmp_path / "broken" / "checkpoint-4" / broken).unlink()
    (tmp_path / "broken" / "checkpoint-old").mkdir()
    with pytest.warns(UserWarning, match=r"checkpoint-4 is not whole.*Going on from .*checkpoint-2"):
        run = fk.tune(falcon, ROWS, output_dir=tmp_path / "broken", **QUICK)
    assert same(run.adapter, expected.adapter)


def interrupted(monkeypatch, falcon, directory, step, **options):
    """A run that gets Ctrl-C in the middle of `step`."""
    with monkeypatch.context() as patched:
        compute = AdapterTrainer.compute_loss

        def pressed(self, *args, **kwargs):
            if self.state.global_step + 1 == step and self.model.training:
                signal.raise_signal(signal.SIGINT)
            return compute(self, *args, **kwargs)

        patched.setattr(AdapterTrainer, "compute_loss", pressed)
        with pytest.raises(KeyboardInterrupt):
            fk.tune(falcon, ROWS, output_dir=directory, **{**QUICK, **options})


def test_ctrl_c_saves_the_step_and_says_where_the_same_call_goes_on(monkeypatch, capsys, falcon, tmp_path):
    before, options = logits(falcon), {"save_every": 99}
    expected = fk.tune(falcon, ROWS, output_dir=tmp_path / "whole", **{**QUICK, **options})
    interrupted(monkeypatch, falcon, tmp_path / "broken", 3, **options)
    assert "the same call goes on from step 3 of 6" in capsys.readouterr().out
    assert torch.equal(logits(falcon), before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = fk.tune(falcon, ROWS, output_dir=tmp_path / "broken", **{**QUICK, **options})
    assert same(resumed.adapter, expected.adapter)


def test_an_adapter_is_saved_before_it_is_measured(monkeypatch, falcon, tmp_path):
    expected = fk.tune(falcon, ROWS, output_dir=tmp_path / "whole", **QUICK)
    with monkeypatch.context() as patched:
        patched.setattr("falcon_kit.tuning.tune._Run._measure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fk.tune(falcon, ROWS, output_dir=tmp_path / "broken", **QUICK)
    assert same(tmp_path / "broken" / "adapter", expected.adapter)
    assert fk.tune(falcon, ROWS, output_dir=tmp_path / "broken", **QUICK).figures == expected.figures


def test_held_out_conversations_that_do_not_fit_are_not_asked(falcon, tmp_path):
    held_out = fk.dialogues([talk("Tell me all. " * 900, "No."), talk("What is a cow?", "Arr! Cows eat grass.")])
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, held_out=held_out, **{**QUICK, "max_steps": 1, "answers": 2})
    assert run.figures["stop rate before"] in (0, 1)  # of one


def test_other_held_out_documents_or_evaluations_that_patience_counts_are_refused(falcon, tmp_path):
    parts = fk.dialogues(ROWS[:3]), fk.dialogues(ROWS[3:6])
    fk.tune(falcon, ROWS[6:], output_dir=tmp_path, held_out=parts[0], patience=9, **QUICK)
    with pytest.raises(ValueError, match="held-out data: '"):
        fk.tune(falcon, ROWS[6:], output_dir=tmp_path, held_out=parts[1], patience=9, **QUICK)
    with pytest.raises(ValueError, match="evaluate_every: None there, 1 here"):
        fk.tune(falcon, ROWS[6:], output_dir=tmp_path, held_out=parts[0], patience=9, evaluate_every=1, **QUICK)


@pytest.mark.parametrize("name", ["adapter", "checkpoint-5"])
def test_a_folder_that_the_kit_did_not_write_is_left_alone(falcon, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=rf"{name} is not of a run of fk\.tune.*another output_dir"):
        fk.tune(falcon, ROWS, output_dir=tmp_path, resume=False, **QUICK)
    assert (tmp_path / name / "mine.txt").exists()


def test_a_finished_run_called_again_trains_nothing(monkeypatch, falcon, tmp_path):
    first = fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    kept = weights(first.adapter)
    monkeypatch.setattr(AdapterTrainer, "training_step", lambda *_, **__: pytest.fail("it trains again"))
    again = fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    assert all(torch.equal(weights(again.adapter)[name], kept[name]) for name in kept)
    assert (again.figures, len(again.history)) == (first.figures, len(first.history))


def test_a_run_that_was_killed_after_its_last_step_only_has_to_be_written_down(monkeypatch, falcon, tmp_path):
    first = fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    kept = weights(first.adapter)
    first.adapter.rename(tmp_path / "lost")
    monkeypatch.setattr(AdapterTrainer, "training_step", lambda *_, **__: pytest.fail("it trains again"))
    again = fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    assert all(torch.equal(weights(again.adapter)[name], kept[name]) for name in kept)
    assert again.figures == first.figures


def test_other_settings_in_the_same_folder_are_refused_by_name(monkeypatch, falcon, tmp_path):
    broken_off(monkeypatch, falcon, tmp_path, KeyboardInterrupt())
    with pytest.raises(ValueError, match=r"rank: 2 there, 4 here.*another output_dir, or resume=False"):
        fk.tune(falcon, ROWS, output_dir=tmp_path, **{**QUICK, "rank": 4})


def test_other_data_in_the_same_folder_is_refused(monkeypatch, falcon, tmp_path):
    broken_off(monkeypatch, falcon, tmp_path, KeyboardInterrupt())
    with pytest.raises(ValueError, match="data: '"):
        fk.tune(falcon, ROWS[1:], output_dir=tmp_path, **QUICK)


def test_resume_false_starts_over(monkeypatch, falcon, tmp_path):
    broken_off(monkeypatch, falcon, tmp_path / "one", KeyboardInterrupt())
    run = fk.tune(falcon, ROWS, output_dir=tmp_path / "one", resume=False, **{**QUICK, "rank": 4})
    expected = fk.tune(falcon, ROWS, output_dir=tmp_path / "two", **{**QUICK, "rank": 4})
    assert same(run.adapter, expected.adapter)


def test_a_full_disk_leaves_the_last_checkpoint_whole(monkeypatch, falcon, tmp_path):
    expected = fk.tune(falcon, ROWS, output_dir=tmp_path / "whole", **QUICK)
    with monkeypatch.context() as patched:
        save = torch.save

        def full(held, file, *args, **kwargs):
            if "checkpoint-4" in str(file):
                raise OSError(28, "No space left on device")
            return save(held, file, *args, **kwargs)

        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"step 4 could not be saved.*No space left.*checkpoint-2 is whole"):
            fk.tune(falcon, ROWS, output_dir=tmp_path / "broken", **QUICK)
    assert [each.name for each in (tmp_path / "broken").iterdir()].count("unfinished") == 0
    assert same(fk.tune(falcon, ROWS, output_dir=tmp_path / "broken", **QUICK).adapter, expected.adapter)


# What goes wrong, and what is said


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


def test_out_of_memory_says_the_plan_and_what_to_try_next(monkeypatch, falcon, tmp_path):
    text = broken_off(monkeypatch, falcon, tmp_path, torch.OutOfMemoryError("CUDA out of memory"))
    assert "falconet in float32 for lora, 2 x 64 tokens, needs" in text
    assert text.splitlines()[1].startswith("- batch=1, accumulate=2")


def test_a_plan_that_does_not_fit_is_refused_before_anything_starts(monkeypatch, falcon, tmp_path):
    monkeypatch.setattr("falcon_kit.tuning.tune.resolve_devices", lambda _: (Device("cpu", "cpu", 10_000),))
    with pytest.raises(fk.NotEnoughMemory, match="for lora"):
        fk.tune(falcon, ROWS, output_dir=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


def test_adapters_without_a_gradient_are_noticed(monkeypatch, falcon, tmp_path):
    monkeypatch.setattr(modeling.FalconForCausalLM, "enable_input_require_grads", lambda self: None)
    monkeypatch.setattr(
        "falcon_kit.tuning.tune.arguments",
        lambda *args: _reentrant(trainer.arguments(*args)),
    )
    with pytest.raises(RuntimeError, match=r"get no gradient|does not require grad"):
        fk.tune(falcon, ROWS, output_dir=tmp_path, checkpointing=True, **QUICK)


def _reentrant(options):
    options.activation_checkpointing_kwargs = {"use_reentrant": True}
    return options


def test_a_process_trains_on_one_gpu_however_many_it_sees(monkeypatch, falcon, tmp_path):
    def several(options):
        options._n_gpu = 4
        return torch.device("cpu")

    monkeypatch.setattr("transformers.TrainingArguments.device", property(several))
    chosen = fk.Tuning().for_model(falcon.spec)
    assert trainer.arguments(chosen, tmp_path, falcon.model, 8, False, True).n_gpu == 1


def test_each_process_plans_on_its_own_gpu(monkeypatch, falcon):
    slots = (Device("first", 0, 10_000), Device("second", 1, 10**12))
    monkeypatch.setattr("falcon_kit.tuning.tune.resolve_devices", lambda _: slots)
    monkeypatch.setenv("WORLD_SIZE", "2")
    chosen = fk.Tuning().for_model(falcon.spec)
    fits = []
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        fits.append(tune._plan(falcon, chosen, False).fits)
    assert fits == [False, True]


@pytest.mark.parametrize(("dtype", "sharded"), [("float32", True), ("nf4", False)])
def test_the_first_process_decides_for_all_whether_to_shard_what_can_be(monkeypatch, dtype, sharded):
    falcon = fk.load("falconet", dtype=dtype)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("falcon_kit.tuning.distributed.broadcast_from_rank0", lambda *_: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = tune._Run(falcon, fk.Tuning(), None, None, None, None, falcon.plan, True)
    assert run._sharded is sharded


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


def test_held_out_losses_are_computed_without_doubles_which_some_devices_lack(monkeypatch, falcon, tmp_path):
    monkeypatch.setattr(torch.Tensor, "double", lambda _: pytest.fail("no float64 here"))
    assert fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK).figures


def test_what_is_no_falcon_is_refused(falcon, tmp_path):
    for given, text in (("falconet", r"fk\.load\('falconet'\)"), (falcon.model, "got FalconForCausalLM")):
        with pytest.raises(TypeError, match=f"give what fk.load returns.*{text}"):
            fk.tune(given, ROWS, output_dir=tmp_path)


def test_a_model_in_parts_that_are_not_here_is_refused(tmp_path):
    falcon = fk.load("falconet", dtype="float32")
    falcon.model.transformer.h[0].to("meta")
    with pytest.raises(ValueError, match="lies in host memory or on disk, where it cannot be trained"):
        fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)


def test_patience_without_anything_held_out_is_refused(falcon, tmp_path):
    with pytest.raises(ValueError, match="what is packed is not split: give held_out"):
        fk.tune(falcon, fk.pack(fk.dialogues(ROWS), falcon), output_dir=tmp_path, patience=2)


def test_a_single_document_cannot_be_held_out(falcon, tmp_path):
    with pytest.raises(ValueError, match=r"there is one document.*held_out=0"):
        fk.tune(falcon, ROWS[:1], output_dir=tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(falcon, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(NotADirectoryError, match="run' is a file: give a folder"):
        fk.tune(falcon, ROWS, output_dir=tmp_path / "run", **QUICK)


def test_an_instruct_model_comes_with_the_cards_advice(instruct, tmp_path):
    with pytest.warns(UserWarning, match="start your own from Falcon-40B"):
        fk.tune(instruct, ROWS, output_dir=tmp_path, **{**QUICK, "max_steps": 1})


def test_transformers_own_falcon_is_refused(tmp_path):
    with pytest.raises(ValueError, match="packed documents see each other"):
        fk.tune(fk.load("falconet", attention="transformers"), ROWS, output_dir=tmp_path)


def test_an_unknown_setting_is_refused_with_the_nearest(falcon, tmp_path):
    with pytest.raises(TypeError, match="learning_rate"):
        fk.tune(falcon, ROWS, output_dir=tmp_path, learning_rat=1e-3)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"learning_rate": 2}, "learning_rate must be above 0 and below 1"),
        ({"epochs": 0}, "epochs must be more than 0"),
        ({"targets": ("q_proj",)}, "targets must be among query_key_value"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"patience": 1, "held_out": 0.0}, "patience watches the held-out loss"),
        ({"schedule": "stairs"}, "schedule must be one of"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_range(settings, text):
    with pytest.raises(ValueError, match=text):
        fk.Tuning(**settings)


@pytest.mark.parametrize(
    ("name", "rate", "dropout"), [("falconet", 5e-3, 0.0), ("falcon-7b", 2e-4, 0.1), ("falcon-40b", 1e-4, 0.05)]
)
def test_defaults_follow_qlora_by_the_size_of_the_model(name, rate, dropout):
    chosen = fk.Tuning().for_model(fk.spec(name))
    assert (chosen.learning_rate, chosen.dropout, chosen.alpha, chosen.context) == (rate, dropout, 32, 2048)


# Merged


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    options = {**QUICK, "max_steps": 12, "learning_rate": 0.01}
    return fk.tune(fk.load("falconet", dtype="float32"), ROWS, output_dir=tmp_path_factory.mktemp("run"), **options)


def test_a_merged_model_loads_in_plain_transformers(run, tmp_path, capfd):
    merged = fk.merge(run.adapter, output_dir=tmp_path)
    assert "Writing model shards" not in capfd.readouterr().err
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(plain).__module__.startswith("transformers.")
    torch.testing.assert_close(
        plain(torch.tensor([[23, 900, 77, 1500, 42]])).logits, logits(merged), rtol=1e-3, atol=1e-3
    )


def test_merging_leaves_the_base_alone_and_changes_what_it_gives(run, falcon):
    before = logits(falcon)
    merged = fk.merge(run.adapter, falcon)
    assert torch.equal(logits(falcon), before)
    assert not torch.allclose(logits(merged), before, atol=0.1)
    assert merged.gap < 1e-4


def test_a_merge_that_changes_the_logits_is_refused(monkeypatch, run, falcon):
    from peft.tuners.lora import Linear

    merge = Linear.merge

    def wrong(self, *args, **kwargs):
        merge(self, *args, **kwargs)
        self.get_base_layer().weight.data.mul_(1.05)

    monkeypatch.setattr(Linear, "merge", wrong)
    with pytest.raises(RuntimeError, match="after merging, logits differ by"):
        fk.merge(run.adapter, falcon)


def test_an_adapter_of_another_base_is_refused(run, instruct):
    with pytest.raises(ValueError, match="made for falconet, not for falconet-instruct"):
        fk.merge(run.adapter, instruct)


def test_an_adapter_of_another_shape_is_refused(run, any_falcon):
    (run.adapter / "tuning.json").rename(run.adapter / "hidden")
    try:
        with pytest.raises(ValueError, match=r"its base_model\S+ is \(\d+, \d+\), but the model has"):
            fk.merge(run.adapter, any_falcon)
    finally:
        (run.adapter / "hidden").rename(run.adapter / "tuning.json")


def test_a_folder_without_an_adapter_is_refused(falcon, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        fk.merge(tmp_path, falcon)


def test_a_run_is_merged_like_its_folder_and_swapped_arguments_are_refused(run, falcon):
    assert torch.equal(logits(fk.merge(run, falcon)), logits(fk.merge(run.adapter, falcon)))
    with pytest.raises(TypeError, match="takes the adapter first, as its folder or the run that made it; got Falcon"):
        fk.merge(falcon, run.adapter)


# Quantised


@pytest.mark.parametrize("dtype", ["nf4", "nf4-double", "int8"])
def test_qlora_trains_on_quantised_weights_and_merges_into_whole_ones(dtype, tmp_path):
    falcon = fk.load("falconet", dtype=dtype)
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, **{**QUICK, "max_steps": 12, "learning_rate": 0.01})
    assert (run.plan.purpose, run.plan.dtype) == ("qlora", dtype)
    assert run.figures["held-out loss after"] < 0.9 * run.figures["held-out loss before"]
    merged = fk.merge(run.adapter, falcon)
    assert {type(each) for each in merged.model.modules() if "Linear" in type(each).__name__} == {torch.nn.Linear}
    assert merged.model.dtype == torch.bfloat16


def test_a_quantised_base_hands_gradients_back_even_after_it_has_written_something():
    """bitsandbytes packs weights for inference on a CPU, and lets no gradient through what is packed."""
    falcon, whole = fk.load("falconet", dtype="nf4"), fk.load("falconet", dtype="bfloat16")
    falcon.generate("Hello", max_new_tokens=2)
    ids = torch.tensor([[23, 900, 77, 1500, 42]])

    def gradient(model):
        embedded = model.train().get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=ids).loss.backward()
        return embedded.grad.float().flatten()

    with unpacked(falcon.model):
        for name, module in falcon.model.transformer.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                values = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                whole.model.transformer.get_submodule(name).weight.data = values.bfloat16()
        for _ in range(2):
            assert torch.cosine_similarity(gradient(falcon.model), gradient(whole.model), 0) > 0.995
            with torch.inference_mode():
                falcon.model.eval()(ids)  # what evaluation does between steps
