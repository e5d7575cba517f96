"""Weights in 8 and 4 bits: really quantised, counted, as good as bitsandbytes', and the same after saving."""

import json
import re
import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file, save_file
from transformers import FalconForCausalLM

import falcon_kit as fk
from falcon_kit.catalogue import memory
from falcon_kit.loading.packed import PackedLinear
from falcon_kit.loading.quantization import bitsandbytes_config, check_quantised, weights
from falcon_kit.model import modeling
from falcon_kit.planning.devices import Device
from tests.conftest import logits, simulated_gpus, small_config, small_model

LINEAR = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
each_dtype = pytest.mark.parametrize("dtype", memory.QUANTISED)


@pytest.fixture
def directory(tokenizer, tmp_path):
    """Where a small model of the 40B layout is saved."""
    small_model("40b").save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def relative_error(model, expected):
    return float((logits(model).float() - logits(expected)).norm() / logits(expected).norm())


# The dtype of each part


@each_dtype
def test_the_linear_layers_of_the_blocks_are_quantised_and_nothing_else(checkpoint, dtype):
    kept = {row.part: row.kept_as for row in fk.load(checkpoint, dtype=dtype).weights.rows}
    assert {part for part, how in kept.items() if how == dtype} == set(LINEAR)
    assert {how for part, how in kept.items() if part not in LINEAR} == {"bfloat16"}


@each_dtype
def test_the_plan_knows_the_bytes_beforehand(checkpoint, dtype):
    falcon = fk.load(checkpoint, dtype=dtype)
    assert falcon.weight_bytes == pytest.approx(falcon.plan.weight_bytes, rel=0.02)


def test_an_8_bit_model_that_has_computed_weighs_what_it_did(directory):
    falcon = fk.load(directory, dtype="int8")
    before = falcon.weight_bytes
    logits(falcon.model)
    assert falcon.weight_bytes == before


def test_weights_that_are_not_quantised_are_counted_too(checkpoint, layout):
    falcon = fk.load(checkpoint, dtype="float32")
    assert falcon.weights.total_bytes == 4 * falcon.spec.parameters
    assert falcon.weights.quantised == 0


def test_four_bits_take_less_than_eight_and_double_quantisation_less_still(directory):
    sizes = [fk.load(directory, dtype=dtype).weight_bytes for dtype in ("bfloat16", "int8", "nf4", "nf4-double")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


@each_dtype
def test_a_quantised_falcon_says_so(directory, dtype):
    falcon = fk.load(directory, dtype=dtype)
    assert (falcon.dtype, f"{dtype} on cpu" in repr(falcon)) == (dtype, True)


def test_weights_in_host_memory_are_counted_while_they_are_offloaded(checkpoint):
    falcon = fk.load(checkpoint, dtype="float32")
    rows = falcon.weights.rows
    cpu_offload(falcon.model)
    assert next(falcon.model.parameters()).is_meta
    assert falcon.weights.rows == rows


def test_weights_on_disk_are_not_in_memory(checkpoint, tmp_path):
    falcon = fk.load(checkpoint, dtype="float32")
    disk_offload(falcon.model, tmp_path / "offload")
    assert falcon.weight_bytes == 0


def test_the_table_of_weights_names_every_part(directory):
    html = fk.load(directory, dtype="nf4").weights._repr_html_()
    assert all(part in html for part in (*LINEAR, "word_embeddings", "ln_attn", "nf4", "bfloat16"))


# Their logits


@pytest.mark.parametrize(("dtype", "largest"), [("int8", 0.05), ("int4", 0.3), ("nf4", 0.3), ("nf4-double", 0.3)])
def test_the_logits_stay_near_those_of_the_exact_model(checkpoint, layout, dtype, largest):
    assert 0 < relative_error(fk.load(checkpoint, dtype=dtype).model, small_model(layout)) < largest


@each_dtype
def test_falconet_still_answers(dtype):
    falcon = fk.load("falconet-instruct", dtype=dtype)
    assert "leaves" in falcon.chat([{"role": "user", "content": "What do giraffes eat?"}], do_sample=False).text


@each_dtype
def test_a_quantised_model_computes_without_remarks(directory, dtype, caplog):
    logits(fk.load(directory, dtype=dtype).model)
    assert [record.message for record in caplog.records] == []


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_nf4_multiplies_in_the_dtype_that_the_cpu_is_fast_in(monkeypatch, fast, expected):
    monkeypatch.setattr("falcon_kit.loading.quantization.has_products", lambda dtype: fast)
    assert bitsandbytes_config("nf4-double", on_cpu=True).bnb_4bit_compute_dtype == expected


@pytest.mark.parametrize("dtype", ["int4", "nf4"])
def test_quantised_layers_on_the_cpu_of_a_machine_with_a_gpu_are_those_for_cpus(monkeypatch, directory, dtype):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: False)
    monkeypatch.setattr("falcon_kit.loading.quantization.has_products", lambda dtype: False)
    falcon = fk.load(directory, dtype=dtype, device_map="cpu")
    assert falcon.model.dtype == torch.bfloat16
    assert dtype == "int4" or falcon.model.transformer.h[0].mlp.dense_h_to_4h.compute_dtype == torch.float32


def beside_a_gpu(monkeypatch, free, filled):
    """Makes this machine one with a GPU with so many bytes free, of which accelerate's device maps fill a part."""
    pytest.importorskip("bitsandbytes")  # its import would read the GPU
    simulated_gpus(monkeypatch, [free])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    room = {0: filled, "cpu": 2**34}
    monkeypatch.setattr("transformers.integrations.accelerate.accelerate_max_memory", lambda _: dict(room))


@each_dtype
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"device_map": "balanced"}, "device_map='balanced' puts layers in host memory or on disk, where .*: leave it"),
        ({"device_map": "sequential"}, "device_map='sequential' puts layers in host memory or on disk, where"),
        ({"force": True}, "force=True puts layers in host memory or on disk, where .*: leave it out, and try:"),
    ],
)
def test_quantised_layers_that_a_device_map_would_offload_are_refused_with_what_to_do(
    monkeypatch, dtype, settings, text
):
    free = fk.plan("falconet", dtype).weight_bytes
    beside_a_gpu(monkeypatch, free, free * 2 // 3)
    with pytest.raises(fk.NotEnoughMemory, match=rf"does not fit into GPU 0 \d.\d\d MiB. {text}"):
        fk.load("falconet", dtype=dtype, **settings)


def test_where_quantised_layers_have_no_room_the_original_ones_may_be_offloaded_as_advised(monkeypatch):
    monkeypatch.setattr("falcon_kit.planning.placement.GPU_OVERHEAD", 0)  # beside which a small model's layers vanish
    needed = fk.plan("falconet", "nf4", devices=[Device("GPU", 0, 2**40)]).total_bytes
    beside_a_gpu(monkeypatch, needed, 2**21)
    with pytest.raises(fk.NotEnoughMemory) as refused:
        fk.load("falconet", dtype="nf4", device_map="balanced")
    advised = [each for each in refused.value.plan.suggestions if "offload" in each.changes]
    assert advised == ["dtype='bfloat16', offload='cpu'"]

    def stopped(found, files, plan, settings):
        raise InterruptedError(plan.dtype)

    monkeypatch.setattr("falcon_kit.loading.load.read_model", stopped)
    with pytest.raises(InterruptedError, match="bfloat16"):
        fk.load("falconet", **advised[0].changes)


def test_quantised_weights_larger_than_all_gpus_are_refused_before_they_are_fetched(monkeypatch):
    simulated_gpus(monkeypatch, [2**20, 2**20])
    monkeypatch.setattr("falcon_kit.loading.load.fetch", None)
    with pytest.raises(fk.NotEnoughMemory, match="device_map='balanced' puts layers in host memory"):
        fk.load("falconet", dtype="nf4", device_map="balanced")


def test_without_bitsandbytes_its_dtypes_are_refused_and_the_others_load(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"dtype='nf4' needs bitsandbytes.*: pip install bitsandbytes, or use"):
        fk.load(directory, dtype="nf4")
    assert fk.load(directory, dtype="int4").weights.quantised == 8
    assert fk.load(directory, dtype="bfloat16").weights.quantised == 0


# Layers that are not quantised


@pytest.mark.parametrize("dtype", ["int8", "nf4", "nf4-double"])
def test_transformers_own_falcon_is_still_not_quantised(dtype, directory):
    """A fault of transformers: once this fails, it is corrected there."""
    model = FalconForCausalLM.from_pretrained(directory, quantization_config=bitsandbytes_config(dtype, on_cpu=True))
    assert model.is_quantized
    assert weights(model).quantised == 0


@each_dtype
def test_a_model_that_was_not_quantised_is_found_out(dtype):
    with pytest.raises(RuntimeError, match=f"8 of 8 linear layers were not quantised to {dtype}, such as transf"):
        check_quantised(small_model("40b"), dtype)


@each_dtype
def test_quantising_transformers_own_falcon_is_refused(dtype):
    with pytest.raises(ValueError, match=r"has no effect on transformers' own Falcon.*leave attention at 'grouped'"):
        fk.load("no/such/model", dtype=dtype, attention="transformers")


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": torch.device("cpu")}])
def test_int8_on_a_cpu_is_the_kits_however_the_cpu_is_named(directory, device_map):
    layer = fk.load(directory, dtype="int8", device_map=device_map).model.transformer.h[0].mlp.dense_h_to_4h
    assert isinstance(layer, PackedLinear)


# Saving


def runs_packed(falcon):
    """Whether bitsandbytes re-packed the weights in a forward pass, as it does on CPUs with AVX-512 for bfloat16."""
    logits(falcon.model)
    state = getattr(falcon.model.transformer.h[0].mlp.dense_4h_to_h.weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


@each_dtype
def test_what_is_saved_after_use_is_what_was_used(checkpoint, tmp_path, dtype):
    falcon = fk.load(checkpoint, dtype=dtype)
    before = logits(falcon.model)
    falcon.model.save_pretrained(tmp_path / "saved")
    falcon.tokenizer.save_pretrained(tmp_path / "saved")
    # double quantisation quantises the scales anew, which moves a logit by a rounding of bfloat16
    allowed = 0.02 if dtype == "nf4-double" else 0
    for model in (falcon.model, fk.load(tmp_path / "saved").model):
        assert (logits(model) - before).norm() <= allowed * before.norm()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_transformers_without_the_kit_stops_at_a_saved_model(directory, tmp_path, dtype):
    fk.load(directory, dtype=dtype).model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("quantization_config")["quant_method"] == "falcon-kit"  # which it drops with a warning
    file.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        FalconForCausalLM.from_pretrained(tmp_path / "saved")


def test_int8_as_it_was_saved_before_is_read(directory, tmp_path):
    falcon = fk.load(directory, dtype="int8")
    falcon.model.save_pretrained(tmp_path / "saved")
    falcon.tokenizer.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    stored = load_file(file)
    assert any(each.ndim == 3 for each in stored.values())
    save_file({name: each.squeeze(-1) for name, each in stored.items()}, file, {"format": "pt"})
    assert torch.equal(logits(fk.load(tmp_path / "saved").model), logits(falcon.model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "transformers"}, r"dtype='nf4' has no effect on transformers' own Falcon"),
        ({"offload": "disk"}, r"dtype='nf4' with offload='disk': quantised layers compute where their weights are"),
        ({"device_map": {"transformer": "cpu", "lm_head": "disk"}}, r"dtype='nf4' with device_map\['lm_head'\]='disk'"),
    ],
)
def test_a_quantised_checkpoint_is_under_the_rules_of_its_dtype(directory, tmp_path, settings, message):
    falcon = fk.load(directory, dtype="nf4")
    falcon.model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"not even looked at")
    with pytest.raises(ValueError, match=message):
        fk.load(tmp_path / "saved", **settings)


def test_bitsandbytes_still_saves_another_model_than_was_used(directory, tmp_path):
    """A fault of bitsandbytes: once this fails, it is corrected there."""
    if not runs_packed(fk.load(directory, dtype="nf4")):
        pytest.skip("this CPU has no AVX-512 for bfloat16: bitsandbytes packs nothing here")
    model = modeling.FalconForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=bitsandbytes_config("nf4", on_cpu=True)
    ).eval()
    before = logits(model)
    model.save_pretrained(tmp_path / "saved")
    saved = modeling.FalconForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert (logits(saved) - before).norm() > 0.2 * before.norm()


@each_dtype
def test_a_quantised_checkpoint_loads_as_what_it_is(directory, tmp_path, dtype):
    falcon = fk.load(directory, dtype=dtype)
    falcon.model.save_pretrained(tmp_path / "saved")
    falcon.tokenizer.save_pretrained(tmp_path / "saved")
    again = fk.load(tmp_path / "saved")
    assert (again.dtype, again.dtype_reason, again.plan.dtype) == (dtype, "as in the checkpoint", dtype)


def test_a_quantised_checkpoint_is_not_turned_into_another(directory, tmp_path):
    falcon = fk.load(directory, dtype="nf4")
    falcon.model.save_pretrained(tmp_path / "saved")
    falcon.tokenizer.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="already quantised to nf4: dtype='int8' needs the original"):
        fk.load(tmp_path / "saved", dtype="int8")


@pytest.mark.parametrize("method", ["gptq", None, 7])
def test_a_checkpoint_that_another_method_quantised_is_refused_by_its_name(directory, method):
    config = small_config("40b", quantization_config={"quant_method": method, "bits": 4})
    config.save_pretrained(directory)
    error = f"{re.escape(str(directory))} is quantised by {method!r}; the kit reads bitsandbytes' int8 and nf4"
    with pytest.raises(ValueError, match=error):
        fk.load(directory)
