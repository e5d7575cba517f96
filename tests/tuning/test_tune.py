"""Tuning: adapters for every layout, a Falcon that is unchanged afterwards, plans and refusals, QLoRA."""

import dataclasses
import json
import random
from contextlib import nullcontext
from types import SimpleNamespace

import bitsandbytes
import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from transformers import FalconForCausalLM

import falcon_kit as fk
from falcon_kit.loading.packed import PackedLinear
from falcon_kit.loading.quantization import unpacked
from falcon_kit.parallel.launching import ParallelFalcon
from falcon_kit.planning.devices import Device
from falcon_kit.tuning import tune
from falcon_kit.tuning.memory_plan import plan_training
from falcon_kit.tuning.progress import show_plan
from tests.conftest import simulated_gpus
from tests.tuning.small_runs import QUICK, ROWS, broken_off, logits, same, talk, weights

# What is trained


def test_an_adapter_is_trained_for_every_layout_and_loads_with_plain_peft(any_falcon, tmp_path):
    run = fk.tune(any_falcon, ROWS, output_dir=tmp_path / "run", **QUICK)
    assert run.figures["held-out loss after"] < run.figures["held-out loss before"]

    plain = FalconForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, run.adapter).eval()
    merged = fk.merge(run.adapter, any_falcon)
    expected = adapted(torch.tensor([[23, 900, 77, 1500, 42]])).logits
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def test_the_falcon_is_afterwards_as_it_was(falcon, tmp_path):
    assert falcon.model.config.use_cache
    before, names = logits(falcon), [(name, each.requires_grad) for name, each in falcon.model.named_parameters()]
    fk.tune(falcon, ROWS, output_dir=tmp_path, gradient_checkpointing=True, **QUICK)
    assert torch.equal(logits(falcon), before)
    assert [(name, each.requires_grad) for name, each in falcon.model.named_parameters()] == names
    assert not falcon.model.training
    assert not falcon.model.is_activation_checkpointing
    assert not hasattr(falcon.model, "peft_config")
    assert not any(each._forward_hooks for each in falcon.model.modules())
    assert falcon.model.config.use_cache


def test_the_users_own_hooks_and_checkpointing_stay(falcon, tmp_path):
    calls, embeddings = [], falcon.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda *_: calls.append(1))
    falcon.model.activation_checkpointing_enable()  # it hooks the embeddings too
    hooks = list(embeddings._forward_hooks)
    fk.tune(falcon, ROWS, output_dir=tmp_path, gradient_checkpointing=True, **QUICK)
    assert list(embeddings._forward_hooks) == hooks
    assert falcon.model.is_activation_checkpointing
    falcon.model.disable_input_require_grads()
    assert list(embeddings._forward_hooks) == hooks[:1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
def test_the_falcon_is_as_it_was_after_an_error_while_adapters_are_made(monkeypatch, falcon, tmp_path, error):
    names, update, calls = [name for name, _ in falcon.model.named_modules()], LoraLayer.update_layer, []

    def fails(self, *args, **options):
        calls.append(self)
        if len(calls) == 5:
            raise error
        return update(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(LoraLayer, "update_layer", fails)
        with pytest.raises(type(error)):
            fk.tune(falcon, ROWS, output_dir=tmp_path, gradient_checkpointing=True, **QUICK)
    assert [name for name, _ in falcon.model.named_modules()] == names
    assert not hasattr(falcon.model, "peft_config")
    assert not any(each._forward_hooks for each in falcon.model.modules())
    assert fk.tune(falcon, ROWS, output_dir=tmp_path, gradient_checkpointing=True, **QUICK).figures


def test_the_random_state_is_left_as_it_was(falcon, tmp_path):

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
        fk.tune(
            falcon, ROWS, output_dir=tmp_path / str(each), gradient_checkpointing=each, **{**QUICK, "lora_dropout": 0.0}
        )
        for each in (False, True)
    ]
    for name, expected in weights(runs[0].adapter).items():
        torch.testing.assert_close(weights(runs[1].adapter)[name], expected, rtol=1e-4, atol=1e-6)


def test_persona_and_stopping_are_learned(falcon, tmp_path):
    options = {"r": 8, "num_train_epochs": 14, "context": 256, "per_device_train_batch_size": 4, "held_out": 0.2}
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, **options)
    assert run.figures["stop rate before"] < 0.4 < 0.9 < run.figures["stop rate after"]
    said = run.before_after("What is a giraffe?").rows[0]
    assert not said[1].startswith("Arr!")
    assert said[2].startswith("Arr!")


def test_held_out_conversations_that_do_not_fit_are_not_asked(falcon, tmp_path):
    held_out = fk.dialogues([talk("Tell me all. " * 900, "No."), talk("What is a cow?", "Arr! Cows eat grass.")])
    with pytest.warns(UserWarning, match="row 1: the first answer does not end within 64 tokens: left out"):
        run = fk.tune(falcon, ROWS, output_dir=tmp_path, held_out=held_out, **{**QUICK, "max_steps": 1, "answers": 2})
    assert run.figures["stop rate before"] in (0, 1)  # of one


# What is refused


@pytest.mark.parametrize(
    ("error", "reason"),
    [(torch.OutOfMemoryError("CUDA out of memory\nTried"), "CUDA out of memory"), (MemoryError(), "MemoryError")],
)
def test_out_of_memory_says_the_plan_and_what_to_try_next(monkeypatch, falcon, tmp_path, error, reason):
    text = broken_off(monkeypatch, falcon, tmp_path, error)
    assert f"out of memory during training ({reason}). The plan was" in text
    assert "falconet in float32 for lora, 2 x 64 tokens, needs" in text
    assert text.splitlines()[1].startswith("- per_device_train_batch_size=1, gradient_accumulation_steps=2")


def test_a_plan_that_does_not_fit_is_refused_before_anything_starts(monkeypatch, falcon, tmp_path):
    monkeypatch.setattr("falcon_kit.tuning.memory_plan.resolve_devices", lambda _: (Device("cpu", "cpu", 10_000),))
    with pytest.raises(fk.NotEnoughMemory, match="for lora"):
        fk.tune(falcon, ROWS, output_dir=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("gpus", [1, 4])
def test_a_plan_counts_the_devices_of_the_model_alone(monkeypatch, falcon, gpus):
    """The model is in host memory, beside GPUs that are too small or that nothing uses."""
    small = tuple(Device("T4", key, 10_000) for key in range(gpus))
    monkeypatch.setattr("falcon_kit.tuning.memory_plan.resolve_devices", lambda _: small)
    planned = plan_training(falcon, fk.Tuning(context=64), force=False)
    assert [each.key for each in planned.devices] == ["cpu"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("falcon_kit.tuning.memory_plan.host_memory", lambda: (0, 0))
        with pytest.raises(fk.NotEnoughMemory, match="does not fit into cpu"):
            plan_training(falcon, fk.Tuning(context=64), force=False)


def test_what_is_advised_is_an_argument_of_tune_or_a_whole_call_and_makes_it_fit(monkeypatch, falcon):
    settings = {"context": 512, "per_device_train_batch_size": 8}
    free = plan_training(falcon, fk.Tuning(**settings), force=True).total_bytes - 10 * 2**20
    weights = sum(each.nbytes for each in falcon.model.parameters())
    free = free - weights
    monkeypatch.setattr("falcon_kit.tuning.memory_plan.resolve_devices", lambda _: (Device("cpu", "cpu", free),))
    with pytest.raises(fk.NotEnoughMemory) as refused:
        plan_training(falcon, fk.Tuning(**settings), force=False)
    advice = refused.value.plan.suggestions
    assert {name for each in advice for name in each.changes} >= {"context", "per_device_train_batch_size"}
    for change in advice:
        other = eval(change.removesuffix(": QLoRA")) if change.startswith("fk.load(") else falcon  # noqa: S307  # our own text
        freed = free + weights - sum(each.nbytes for each in other.model.parameters())  # the first Falcon is deleted
        devices = (Device("cpu", "cpu", freed),)
        monkeypatch.setattr("falcon_kit.tuning.memory_plan.resolve_devices", lambda _, devices=devices: devices)
        assert plan_training(other, fk.Tuning(**settings | change.changes), force=False).fits


@pytest.mark.parametrize(
    ("dtype", "shard", "refused"),
    [("nf4", None, True), ("float32", False, True), ("float32", None, False), ("float32", True, False)],
)
def test_several_processes_are_refused_what_does_not_fit_unless_they_shard_it(monkeypatch, dtype, shard, refused):
    falcon = fk.load("falconet", dtype=dtype)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("falcon_kit.tuning.memory_plan.resolve_devices", lambda _: (Device("cpu", "cpu", 10_000),))
    chosen = fk.Tuning(shard=shard).for_model(falcon.spec)
    with pytest.raises(fk.NotEnoughMemory) if refused else nullcontext():
        plan_training(falcon, chosen, False)


def test_shards_have_a_line_instead_of_the_plan_of_one_process(falcon, capsys):
    show_plan(falcon.plan, 2)
    assert capsys.readouterr().out.startswith("The weights are sharded: each of 2 processes holds ")


def test_a_sharded_run_warns_that_no_answer_is_generated(falcon):
    fields = dict.fromkeys(each.name for each in dataclasses.fields(tune._Run))
    given = {"falcon": falcon, "settings": fk.Tuning(shard=True), "test_documents": fk.dialogues(ROWS), "quiet": True}
    with pytest.warns(UserWarning, match="so no held-out answer is generated: stop rate and exact answers are not mea"):
        tune._Run(**fields | given)._show_plan()


def test_packed_rows_set_the_context_of_the_run(falcon, tmp_path):
    rows = fk.pack(fk.dialogues(ROWS), falcon, 64)
    options = {"r": 2, "max_steps": 1, "answers": 0}
    run = fk.tune(falcon, rows, output_dir=tmp_path, **options)
    assert (run.settings.context, run.plan.context, run.settings.packing) == (64, 64, True)
    for name, other in (("context", 512), ("packing", False)):
        with pytest.raises(ValueError, match=f"{name}={other}, but the rows are packed with .*leave it out, or give"):
            fk.tune(falcon, rows, output_dir=tmp_path, **options, **{name: other})


def test_rows_of_another_vocabulary_are_refused(falcon, tmp_path):
    other = fk.load("falconet")
    other.tokenizer.add_tokens(["<mine>"])
    rows, others = (fk.pack(fk.dialogues(ROWS), each, 64) for each in (falcon, other))
    for data, held_out in ((others, None), (rows, others)):
        with pytest.raises(ValueError, match="the tokens of another tokenizer than that of falconet: pack the docum"):
            fk.tune(falcon, data, output_dir=tmp_path, held_out=held_out, **{**QUICK, "answers": 0})


def test_a_falcon_in_several_processes_is_refused_with_the_way_to_several_gpus(monkeypatch, falcon, tmp_path):
    monkeypatch.setattr(type(falcon.model.transformer), "tp_mesh", "a mesh")
    for given in (falcon, object.__new__(ParallelFalcon)):
        with pytest.raises(TypeError, match=r"load it without tensor_parallel; .*shards it \(shard=True\)"):
            fk.tune(given, ROWS, output_dir=tmp_path)


def test_the_plan_counts_what_layers_keep_without_checkpointing_and_advises_it_where_that_fits(monkeypatch, falcon):
    needed = {each: plan_training(falcon, fk.Tuning(gradient_checkpointing=each), True) for each in (True, False)}
    assert [each.part for each in needed[False].rows if each.part not in {row.part for row in needed[True].rows}] == [
        "kept activations"
    ]
    free = needed[False].total_bytes - 2**20 - sum(each.nbytes for each in falcon.model.parameters())
    monkeypatch.setattr("falcon_kit.tuning.memory_plan.resolve_devices", lambda _: (Device("cpu", "cpu", free),))
    with pytest.raises(fk.NotEnoughMemory) as refused:
        plan_training(falcon, fk.Tuning(gradient_checkpointing=False), False)
    assert refused.value.plan.suggestions[0] == "gradient_checkpointing=True"


def test_each_process_plans_on_its_own_gpu(monkeypatch, falcon):
    asked = simulated_gpus(monkeypatch, [10_000, 10**12])
    monkeypatch.setenv("WORLD_SIZE", "2")
    chosen = fk.Tuning().for_model(falcon.spec)
    fits = []
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        fits.append(plan_training(falcon, chosen, False).fits)
    assert (fits, asked) == ([False, True], [0, 1])


@pytest.mark.parametrize("shard", [None, False])
def test_a_model_on_the_gpu_of_another_process_is_refused_with_the_way_to_its_own(monkeypatch, shard):
    falcon = fk.load("falconet")
    simulated_gpus(monkeypatch, [10**12, 10**12])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    weight = SimpleNamespace(device=torch.device("cuda", 0), nbytes=8, dtype=torch.float32)
    monkeypatch.setattr(falcon.model, "parameters", lambda: iter([weight]))
    with pytest.raises(ValueError, match="the model is on GPU 0, and of 2 processes this one trains on GPU 1: load it"):
        plan_training(falcon, fk.Tuning(shard=shard).for_model(falcon.spec), False)


@pytest.mark.parametrize(("dtype", "sharded"), [("float32", True), ("nf4", False)])
def test_the_first_process_decides_for_all_whether_to_shard_what_can_be(monkeypatch, dtype, sharded):
    falcon = fk.load("falconet", dtype=dtype)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("falcon_kit.tuning.distributed.broadcast_from_rank0", lambda *_: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    fields = [each.name for each in dataclasses.fields(tune._Run)]
    run = tune._Run(**dict.fromkeys(fields, None) | {"falcon": falcon, "settings": fk.Tuning(), "plan": falcon.plan})
    assert run._sharded is sharded


def test_what_is_no_falcon_is_refused(falcon, tmp_path):
    for given, text in (("falconet", r"fk\.load\('falconet'\)"), (falcon.model, "got FalconForCausalLM")):
        with pytest.raises(TypeError, match=f"give what fk.load returns.*{text}"):
            fk.tune(given, ROWS, output_dir=tmp_path)


def test_a_model_in_parts_that_are_not_here_is_refused(tmp_path):
    falcon = fk.load("falconet", dtype="float32")
    falcon.model.transformer.h[0].to("meta")
    with pytest.raises(ValueError, match="is offloaded to host memory or disk, where it cannot be trained"):
        fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)


def test_a_model_in_peft_is_refused_for_its_adapter_and_not_for_its_class(tmp_path):
    falcon = fk.load("falconet", dtype="float32")
    adapted = get_peft_model(falcon.model, LoraConfig(r=2, target_modules=["query_key_value"]))
    with pytest.raises(ValueError, match="the model already has the adapter 'default'"):
        fk.tune(dataclasses.replace(falcon, model=adapted), ROWS, output_dir=tmp_path, **QUICK)


def test_a_model_in_float64_is_refused_with_what_makes_it_one_that_can_be_trained(tmp_path):
    falcon = fk.load("falconet", dtype="float32")
    falcon.model.double()
    with pytest.raises(
        ValueError, match=r"the model is in float64, and training is in .*falcon\.model\.float\(\) first"
    ):
        fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    assert falcon.model.dtype == torch.float64
    falcon.model.float()
    assert fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK | {"max_steps": 1}).history


def test_a_model_that_returns_tuples_is_tuned_and_returns_them_afterwards(tmp_path):
    falcon = fk.load("falconet", dtype="float32")
    falcon.model.config.return_dict = False
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK | {"max_steps": 1, "held_out": 0.3})
    assert run.history
    assert isinstance(falcon.model(torch.tensor([[1, 2]])), tuple)
    assert fk.merge(run.adapter, falcon).model.config.return_dict is False


def test_patience_without_anything_held_out_is_refused(falcon, tmp_path):
    with pytest.raises(ValueError, match="packed rows are not split: give held_out"):
        fk.tune(falcon, fk.pack(fk.dialogues(ROWS), falcon), output_dir=tmp_path, patience=2)


def test_a_share_of_packed_rows_cannot_be_held_out(falcon, tmp_path):
    with pytest.raises(ValueError, match=r"held_out=0\.2, and packed rows are not split: give held_out=Documents"):
        fk.tune(falcon, fk.pack(fk.dialogues(ROWS), falcon), output_dir=tmp_path, held_out=0.2)


HELD_OUT = {
    "a file": lambda folder, falcon: folder / "eval.jsonl",
    "the name of a file": lambda folder, falcon: str(folder / "eval.jsonl"),
    "rows": lambda folder, falcon: ROWS[:3],
    "a data set": lambda folder, falcon: datasets.Dataset.from_list(ROWS[:3]),
    "documents": lambda folder, falcon: fk.dialogues(ROWS[:3]),
}


ONE_STEP = {**QUICK, "max_steps": 1, "answers": 2}


@pytest.fixture(scope="module", params=[False, True], ids=["documents to train on", "packed rows to train on"])
def with_packed_rows_held_out(request, tmp_path_factory):
    """Data to train on, and the figures of a run whose held-out rows are packed."""
    falcon, folder = fk.load("falconet", dtype="float32"), tmp_path_factory.mktemp("run")
    data = fk.pack(fk.dialogues(ROWS[3:]), falcon, 64) if request.param else ROWS[3:]
    packed = fk.pack(fk.dialogues(ROWS[:3]), falcon, 64)
    with pytest.warns(UserWarning, match="only its loss is measured: for stop rate and exact answers give the Doc"):
        return data, fk.tune(falcon, data, output_dir=folder, held_out=packed, **ONE_STEP).figures


@pytest.mark.parametrize("kind", HELD_OUT)
def test_separate_data_are_held_out_in_every_form(falcon, tmp_path, kind, with_packed_rows_held_out):
    (tmp_path / "eval.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[:3]))
    data, expected = with_packed_rows_held_out
    run = fk.tune(falcon, data, output_dir=tmp_path / "run", held_out=HELD_OUT[kind](tmp_path, falcon), **ONE_STEP)
    losses = {f"{name} loss {when}" for name in ("held-out", "generated-text") for when in ("before", "after")}
    assert expected.keys() == losses < run.figures.keys()
    assert {name: run.figures[name] for name in losses} == expected


def test_numbers_of_numpy_are_settings_like_pythons(falcon, tmp_path):
    options = {"r": 2, "max_steps": 1, "context": 64, "answers": 0, "seed": 1, "learning_rate": 1e-3, "held_out": 0.25}
    of_numpy = {name: np.asarray(value)[()] for name, value in options.items()}
    assert {type(value).__module__ for value in of_numpy.values()} == {"numpy"}
    runs = [
        fk.tune(falcon, ROWS, output_dir=tmp_path / str(number), **each)
        for number, each in enumerate((options, of_numpy))
    ]
    assert same(runs[0].adapter, runs[1].adapter)
    assert runs[0].settings == runs[1].settings


def test_no_rows_are_nothing_to_train_on(falcon, tmp_path):
    with pytest.raises(ValueError, match="nothing to train on: the data have no rows"):
        fk.tune(falcon, fk.pack(fk.dialogues(ROWS), falcon)[:0], output_dir=tmp_path)


def test_held_out_documents_that_do_not_fit_are_named_as_those(falcon, tmp_path):
    short, long = fk.dialogues(ROWS[:4]), [talk("What is a cow?", "Arr! " * 99)]
    message = (
        "the held-out documents cannot be measured with: no document has anything to train on within 64 tokens: row 1: "
        "the first answer does not end within 64 tokens: left out. Give a larger context, or other documents; "
    )
    with pytest.raises(ValueError, match=message):
        fk.tune(falcon, short, output_dir=tmp_path, held_out=long, **QUICK)
    assert [*tmp_path.iterdir()] == []


def test_a_web_text_that_cannot_be_used_is_named_as_that(falcon, tmp_path):
    long = [talk("What is a cow?", "Arr! " * 999)]
    message = "web_text cannot be measured with: no document has .* within 512 tokens: row 1: .*Give plain texts"
    with pytest.raises(ValueError, match=message):
        fk.tune(falcon, ROWS[:4], output_dir=tmp_path, web_text=long, **QUICK)


def test_a_single_document_cannot_be_held_out(falcon, tmp_path):
    with pytest.raises(ValueError, match=r"there is one document.*held_out=0"):
        fk.tune(falcon, ROWS[:1], output_dir=tmp_path)


def test_weights_that_were_changed_in_memory_are_warned_of_and_the_advice_works(tmp_path):
    falcon, short = fk.load("falconet", dtype="float32"), {**QUICK, "max_steps": 1, "held_out": 0}
    adapted = get_peft_model(falcon.model, LoraConfig(target_modules=["dense"], init_lora_weights=False))
    adapted.merge_and_unload()
    with pytest.warns(
        UserWarning, match=r"was changed after falconet was loaded, .*: use fk\.merge\(run, falcon\), or"
    ):
        run = fk.tune(falcon, ROWS, output_dir=tmp_path / "changed", **short)
    expected = logits(fk.merge(run, falcon))
    assert not torch.allclose(logits(fk.load(run.adapter, dtype="float32")), expected, atol=0.1)
    saved = fk.load(falcon.save(tmp_path / "saved"), dtype="float32")
    again = fk.tune(saved, ROWS, output_dir=tmp_path / "again", **short)
    torch.testing.assert_close(logits(fk.load(again.adapter, dtype="float32")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["merged", "rounded", "replaced", "nf4", "used"])
def test_weights_that_are_as_loaded_are_not_warned_of(change, whole, tmp_path, recwarn):
    falcon = fk.load("falconet", dtype="nf4" if change == "nf4" else "float32")
    if change == "merged":
        falcon = fk.merge(whole.adapter, falcon)
    elif change == "rounded":
        falcon.model.bfloat16()
    elif change == "replaced":
        falcon = dataclasses.replace(falcon, model=fk.load("falconet-instruct", dtype="float32").model)
    else:
        falcon.generate("Hello", max_new_tokens=2)
    fk.tune(falcon, ROWS, output_dir=tmp_path, **{**QUICK, "max_steps": 1, "held_out": 0})
    assert not [each for each in recwarn if "was changed after" in str(each.message)]


def test_an_instruct_model_comes_with_the_cards_advice(instruct, tmp_path):
    with pytest.warns(UserWarning, match="start your own from Falcon-40B"):
        fk.tune(instruct, ROWS, output_dir=tmp_path, **{**QUICK, "max_steps": 1})


def test_transformers_own_falcon_is_refused(tmp_path):
    with pytest.raises(ValueError, match="packed documents attend to each other"):
        fk.tune(fk.load("falconet", attention="transformers"), ROWS, output_dir=tmp_path)


@pytest.mark.parametrize("dtype", ["nf4", "nf4-double", "int8", "int4"])
def test_qlora_trains_on_quantised_weights_and_merges_into_whole_ones(dtype, tmp_path):
    falcon = fk.load("falconet", dtype=dtype)
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, **{**QUICK, "max_steps": 12, "learning_rate": 0.01})
    assert (run.plan.purpose, run.plan.dtype) == ("qlora", dtype)
    assert run.figures["held-out loss after"] < 0.9 * run.figures["held-out loss before"]
    merged = fk.merge(run.adapter, falcon)
    assert {type(each) for each in merged.model.modules() if "Linear" in type(each).__name__} == {torch.nn.Linear}
    assert merged.model.dtype == torch.bfloat16


def test_an_adapter_is_saved_without_unpacking_the_weights_in_four_bits(tmp_path, monkeypatch):
    """Which would take the memory of a second model."""
    falcon = fk.load("falconet", dtype="int4")
    read, canonical = [], PackedLinear.canonical
    monkeypatch.setattr(PackedLinear, "canonical", lambda self: read.append(1) or canonical(self))
    fk.tune(falcon, ROWS, output_dir=tmp_path, **{**QUICK, "max_steps": 2, "save_steps": 1, "held_out": 0})
    assert len(read) == 2  # of the first layer, by which a run knows its base


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
