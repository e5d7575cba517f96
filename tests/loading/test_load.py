"""`fk.load`: the model equals the one that transformers loads; errors are raised before the weights are read."""

import copy
import gc
import json

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.loading.reading import choose_device_map
from falcon_kit.model import modeling
from falcon_kit.planning.devices import Device
from tests.conftest import legacy, logits, simulated_gpus, small_model
from tests.loading.test_checkpoints import cached


def assert_same_logits(model, expected):
    """Up to the rounding of float32: the kit adds up attention in another order."""
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=0)


# The model


def test_the_embedded_model_gives_the_logits_that_transformers_gives():
    expected = FalconForCausalLM.from_pretrained(embedded_directory("falconet"), dtype=torch.float32)
    assert_same_logits(fk.load("falconet", dtype="float32").model, expected)


def test_what_comes_back_is_a_transformers_model_in_evaluation_mode(instruct):
    assert (isinstance(instruct.model, FalconForCausalLM), instruct.model.training) == (True, False)


@pytest.mark.parametrize(
    ("attention", "kind"), [("grouped", modeling.FalconForCausalLM), ("transformers", FalconForCausalLM)]
)
def test_attention_chooses_between_the_kits_model_and_the_librarys_own(attention, kind):
    assert type(fk.load("falconet", attention=attention).model) is kind


def test_a_directory_gives_the_model_that_was_saved_into_it(checkpoint, layout):
    assert_same_logits(fk.load(checkpoint).model, small_model(layout))


def test_sharded_safetensors_give_the_model_that_was_saved(tokenizer, tmp_path):
    small_model("40b").save_pretrained(tmp_path, max_shard_size="2MB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits(fk.load(tmp_path).model, small_model("40b"))


@pytest.mark.parametrize("layout", ["7b", "40b", "rw"])
def test_a_checkpoint_of_2023_gives_the_model_that_was_saved(layout, tokenizer, tmp_path):
    directory = legacy(tmp_path / "old", layout, tokenizer)
    assert_same_logits(fk.load(directory, dtype="float32").model, small_model(layout))


def test_a_pickle_that_would_run_code_is_refused(checkpoint, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (checkpoint / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match="a pickle with other objects than tensors, which can run any code"):
        fk.load(checkpoint)
    assert not (tmp_path / "exploded").exists()


def test_the_end_token_comes_from_the_tokenizer_where_an_old_config_names_another(tokenizer, tmp_path):
    falcon = fk.load(legacy(tmp_path / "old", "7b", tokenizer))
    assert falcon.model.generation_config.eos_token_id == 11


def test_a_start_token_that_is_stated_stays(checkpoint):
    (checkpoint / "generation_config.json").write_text('{"bos_token_id": 5}')
    config = fk.load(checkpoint).model.generation_config
    assert (config.bos_token_id, config.eos_token_id) == (5, 11)


def test_the_tokenizer_gives_no_token_type_ids(checkpoint):
    file = checkpoint / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": names}))
    assert sorted(fk.load(checkpoint).tokenizer("Hello")) == ["attention_mask", "input_ids"]


def test_the_progress_bar_switch_of_transformers_stays_as_it_was(checkpoint):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    fk.load(checkpoint)
    assert logging.is_progress_bar_enabled() == before


# dtype


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "torch.bfloat16"])
def test_a_dtype_may_be_a_name_or_a_torch_dtype(dtype):
    assert fk.load("falconet", dtype=dtype).model.dtype == torch.bfloat16


def test_a_small_model_is_exact_on_a_cpu_and_says_why(instruct):
    if torch.cuda.is_available():
        pytest.skip("this rule is for machines without a GPU")
    assert instruct.model.dtype == torch.float32
    assert instruct.dtype_reason == "18.5 MiB in float32 fit easily into host memory, and float32 rounds less"


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (None, "the dtype of published Falcons, since the config.json names none"),
        ("float64", "the dtype of published Falcons, since the kit does not compute in float64"),
        ("bfloat16", "as in the checkpoint"),
    ],
)
def test_the_reason_of_a_dtype_is_what_the_config_says(checkpoint, monkeypatch, dtype, reason):
    monkeypatch.setattr("falcon_kit.loading.load.host_memory", lambda: (2**33, 50 * 2**20))
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": dtype}))
    falcon = fk.load(checkpoint)
    assert (falcon.dtype, falcon.dtype_reason) == ("bfloat16", reason)


def test_a_model_on_the_cpu_of_a_machine_with_a_gpu_has_the_dtype_of_a_cpu(tokenizer, tmp_path, monkeypatch):
    small_model("40b").to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = fk.load(tmp_path)
    simulated_gpus(monkeypatch, [2**34])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    falcon = fk.load(tmp_path, device_map="cpu")
    assert (falcon.dtype, falcon.dtype_reason) == (expected.dtype, expected.dtype_reason)


# Decoding: kernels and compilation


@pytest.mark.parametrize("faster", [True, False])
def test_single_rows_take_the_kernel_that_was_faster_at_loading(monkeypatch, faster):
    monkeypatch.setattr("falcon_kit.loading.load.faster_without_onednn", lambda weights: faster)
    assert fk.load("falconet", dtype="bfloat16").model.single_rows_without_onednn == faster


# Memory


def small_machine(monkeypatch):
    monkeypatch.setattr("falcon_kit.loading.load.local_devices", lambda *_: (Device("cpu", "cpu", 2**20),))


def test_what_does_not_fit_is_refused_before_its_weights_are_read(checkpoint, monkeypatch):
    small_machine(monkeypatch)
    (checkpoint / "model.safetensors").write_bytes(b"not even looked at")
    with pytest.raises(fk.NotEnoughMemory, match=r"does not fit into cpu 1.00 MiB") as caught:
        fk.load(checkpoint)
    assert caught.value.plan.suggestions


@pytest.mark.parametrize(
    ("given", "advised"),
    [
        ({"dtype": "float32"}, {"dtype"}),
        ({"attention": "transformers", "dtype": "float32"}, {"attention"}),
        ({"offload": "disk", "dtype": "float32"}, {"dtype"}),
        ({}, set()),
    ],
)
def test_what_is_advised_is_an_argument_of_load_that_helps_by_itself(monkeypatch, tmp_path, given, advised):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    wide = {"hidden_size": 1024, "num_attention_heads": 16, "num_kv_heads": 1, "ffn_hidden_size": 4096}
    config = FalconConfig(**{**fk.spec("falconet").to_config(), **wide})
    FalconForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    fk.load("falconet").tokenizer.save_pretrained(tmp_path)
    cache = given.get("attention", "grouped")
    whole = fk.plan(tmp_path, "float32", devices=[Device("cpu", "cpu", 2**40)], cache=cache).total_bytes
    limit = {"max_memory": {"cpu": whole - 2**20}}
    with pytest.raises(fk.NotEnoughMemory) as refused:
        fk.load(tmp_path, **given, **limit)
    advice = [each.changes for each in refused.value.plan.suggestions if each.changes]
    assert {name for each in advice for name in each} >= advised
    for changes in advice:
        assert fk.load(**{"name": tmp_path} | given | limit | changes).plan.fits


def test_force_tries_all_the_same(checkpoint, layout, monkeypatch):
    small_machine(monkeypatch)
    falcon = fk.load(checkpoint, force=True)
    assert falcon.plan.fits is False
    assert_same_logits(falcon.model, small_model(layout))


def test_a_loaded_falcon_has_its_plan(instruct):
    assert (instruct.plan.fits, instruct.plan.spec) == (True, instruct.spec)


def test_a_device_that_is_asked_for_is_planned_for(checkpoint, monkeypatch):
    monkeypatch.setattr("falcon_kit.planning.devices.host_memory", lambda: (2**33, 2**20))
    for device_map in ("cpu", {"": torch.device("cpu")}):
        with pytest.raises(fk.NotEnoughMemory, match=r"does not fit into cpu 1.00 MiB"):
            fk.load(checkpoint, device_map=device_map)
    falcon = fk.load(checkpoint, device_map="cpu", force=True)
    assert {row.device for row in falcon.plan.rows} == {"cpu"}


def plan_of(monkeypatch, *args, **settings):
    """The plan of a call of `load` that stops before weights are read."""
    plans = []

    def stopped(found, files, plan, settings):
        plans.append(plan)
        raise InterruptedError

    monkeypatch.setattr("falcon_kit.loading.load.read_model", stopped)
    with pytest.raises(InterruptedError):
        fk.load(*args, **settings)
    return plans[0]


PARTS = ("transformer.word_embeddings", "transformer.h", "transformer.ln_f", "lm_head")


@pytest.mark.parametrize(
    ("device_map", "computes", "stores"),
    [
        (dict.fromkeys(PARTS, "cpu") | {"transformer.h": "disk"}, ["cpu"], ["disk"]),
        (dict.fromkeys(PARTS, "cuda:1") | {"transformer.h": torch.device("cpu")}, [1], ["cpu"]),
        (dict.fromkeys(PARTS, 2) | {"transformer.h": 1}, [1, 2], []),
    ],
)
def test_the_devices_of_a_map_are_planned_for_and_no_others(monkeypatch, device_map, computes, stores):
    asked = simulated_gpus(monkeypatch, [2**34] * 3)
    devices = plan_of(monkeypatch, "falconet", device_map=device_map).devices
    assert [each.key for each in devices if not each.offload_target] == computes
    assert [each.key for each in devices if each.offload_target] == stores
    assert set(asked) == {each.key for each in devices} - {"cpu", "disk"}


def test_layers_on_cpu_and_disk_beside_a_gpu_have_the_dtype_of_a_cpu(monkeypatch):
    expected = plan_of(monkeypatch, "falconet", device_map="cpu").dtype
    simulated_gpus(monkeypatch, [2**34])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    on_disk = dict.fromkeys(PARTS, "cpu") | {"transformer.h": "disk"}
    assert plan_of(monkeypatch, "falconet", device_map=on_disk).dtype == expected


def test_max_memory_is_what_the_plan_goes_by(checkpoint):
    with pytest.raises(fk.NotEnoughMemory, match=r"does not fit into cpu 1\.00 MiB"):
        fk.load(checkpoint, max_memory={"cpu": "1MiB"})


def test_beside_a_gpu_that_is_full_the_others_are_advised_and_they_fit(monkeypatch):
    simulated_gpus(monkeypatch, [2**20, 2**34])
    with pytest.raises(fk.NotEnoughMemory, match=r"max_memory=\{1: '16GiB'\}\): the other GPUs have no room"):
        fk.load("falconet")
    planned = plan_of(monkeypatch, "falconet", max_memory={1: "16GiB"})
    assert planned.fits
    assert {*planned.device_map.values()} == {1}


def test_what_is_forced_stays_within_max_memory(checkpoint, instruct, monkeypatch):
    monkeypatch.setattr("falcon_kit.loading.load.local_devices", lambda *_: (Device("T4", 0, 2**20),))
    used = {}
    monkeypatch.setattr(
        "falcon_kit.loading.reading._from_pretrained", lambda *_, **options: used.update(options) or instruct.model
    )
    fk.load(checkpoint, force=True, max_memory={0: "1MiB"})
    assert used == {"device_map": "auto", "max_memory": {0: "1MiB"}}


# Offloading


def on_disk(model):
    return {name.split(".")[2] for name, tensor in model.named_parameters() if tensor.device.type == "meta"}


def room_without_three_layers(monkeypatch, name):
    """Makes this machine one with a disk, and room in memory for a model without three of its layers."""
    whole = fk.plan(name, "float32", devices=[Device("cpu", "cpu", 2**40)]).total_bytes
    layer = 4 * fk.spec(name).layer_parameters
    slots = (Device("cpu", "cpu", whole - 3 * layer), Device("disk", "disk", 2**40, offload_target=True))
    monkeypatch.setattr("falcon_kit.loading.load.local_devices", lambda *_: slots)


def test_adapters_and_gguf_files_are_read_from_disk_too_each_from_a_folder_of_its_own(tmp_path, monkeypatch):
    names = [embedded_directory("falconet-instruct"), fk.export_gguf(fk.load("falconet"), tmp_path / "a.gguf", "f32")]
    expected = [fk.load(name, dtype="float32").model for name in names]
    room_without_three_layers(monkeypatch, "falconet")
    offloaded = [fk.load(name, dtype="float32", offload="disk", offload_folder=tmp_path / "off") for name in names]
    for falcon, model in zip(offloaded, expected, strict=True):
        assert len(on_disk(falcon.model)) == 4
        assert_same_logits(falcon.model, model)


def test_layers_that_find_no_room_are_read_from_disk(layout, tokenizer, tmp_path, monkeypatch):
    small_model(layout, num_hidden_layers=6).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    room_without_three_layers(monkeypatch, tmp_path)
    falcon = fk.load(tmp_path, dtype="float32", offload="disk", offload_folder=tmp_path / "offload")
    assert on_disk(falcon.model) == {"2", "3", "4", "5"}  # one of them visits, where three had to go
    assert "disk" in repr(falcon)
    assert_same_logits(falcon.model, small_model(layout, num_hidden_layers=6))


# Processes


def test_the_processes_of_ranks_look_where_this_one_does(tokenizer, tmp_path, monkeypatch):
    small_model("40b").save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    cached(tmp_path, "somebody/my-falcon", tmp_path / "saved", "v2")
    sent = {}
    monkeypatch.setattr("falcon_kit.parallel.launching.launch", lambda name, request, *_, **__: sent.update(request))
    hub = {"cache_dir": tmp_path, "local_files_only": True, "token": "hf_secret"}
    fk.load("somebody/my-falcon", tensor_parallel=2, revision="v2", **hub)
    assert {name: sent[name] for name in (*hub, "revision")} == {**hub, "cache_dir": str(tmp_path), "revision": None}


# Failures


def falcons_in_memory():
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), FalconForCausalLM)]


def test_a_failure_leaves_nothing_half_loaded_in_memory(checkpoint):
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 3}))
    before = len(falcons_in_memory())
    with pytest.raises(ValueError, match="lacks") as kept:  # the error is kept, as Jupyter keeps the last one
        fk.load(checkpoint)
    assert kept.value.__traceback__ is not None
    assert len(falcons_in_memory()) == before


def test_a_failure_once_the_weights_are_read_leaves_nothing_in_memory(checkpoint, monkeypatch):
    monkeypatch.setattr("falcon_kit.loading.reading._remove_needless_hooks", lambda _: 1 / 0)
    before = len(falcons_in_memory())
    with pytest.raises(ZeroDivisionError) as kept:
        fk.load(checkpoint)
    assert kept.value.__traceback__ is not None
    assert len(falcons_in_memory()) == before


def test_a_shard_that_vanishes_while_it_is_read_is_named(tokenizer, tmp_path, monkeypatch):
    small_model("40b").save_pretrained(tmp_path, max_shard_size="2MB")
    tokenizer.save_pretrained(tmp_path)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    monkeypatch.setattr("falcon_kit.loading.tokenizer.load_tokenizer", lambda _: gone.unlink() or tokenizer)
    with pytest.raises(FileNotFoundError, match=f"removed while it was read .*{gone.name}.*fetch the"):
        fk.load(tmp_path)


# Chat formats


@pytest.mark.parametrize("name", ["falcon", "hub", "baize"])
def test_a_chat_format_asked_for_becomes_the_chat_template(name):
    falcon = fk.load("falconet", chat=name)
    assert falcon.tokenizer.chat_template == fk.chat_format(name).template


@pytest.mark.parametrize("name", ["falcon", "hub", "baize"])
def test_a_directory_is_loaded_with_the_chat_format_of_its_template(name, tokenizer, tmp_path):
    small_model("40b").save_pretrained(tmp_path)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = fk.chat_format(name).template
    tokenizer.save_pretrained(tmp_path)
    assert fk.load(tmp_path).chat_format.name == name


# Processes of a launcher


@pytest.mark.parametrize(("local_rank", "gpus", "own"), [("1", 3, 1), ("2", 3, 2), ("3", 1, 0)])
def test_a_process_of_torchrun_plans_for_its_own_gpu_and_touches_no_other(local_rank, gpus, own, monkeypatch):
    """Also where each process sees one GPU only, whatever its number."""
    asked, current = simulated_gpus(monkeypatch, [40 * 2**30] * gpus), []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    device_map = choose_device_map(None, plan_of(monkeypatch, "falconet"))
    assert (device_map, set(asked), current) == ({"": own}, {own}, [own])


def test_a_process_of_torchrun_plans_for_another_gpu_that_is_asked_for(monkeypatch):
    asked = simulated_gpus(monkeypatch, [2**34] * 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    devices = plan_of(monkeypatch, "falconet", device_map="cuda:2").devices
    assert ([each.key for each in devices], set(asked)) == ([2], {2})
