"""Adapters as other people save them: each loads as PEFT loads it, or is refused with a way that works."""

import json
import math
import re
import shutil

import pytest
import safetensors.torch
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, FalconForCausalLM

import falcon_kit as fk
from falcon_kit.loading import adapters
from falcon_kit.loading.merging import attached
from falcon_kit.serving.source import files_for, source_of
from tests.conftest import logits, small_model
from tests.loading.test_adapters import renamed, saved_adapter
from tests.loading.test_checkpoints import cached


@pytest.fixture
def base(tokenizer, tmp_path):
    """A small model of the 40B layout, whose head is tied to its embedding."""
    return saved_base(tokenizer, tmp_path / "base")


def saved_base(tokenizer, directory, **changes):
    small_model("40b", **changes).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def pickled(base, directory):
    saved_adapter(base, directory)
    torch.save(load_file(directory / adapters.WEIGHTS), directory / adapters.PICKLED_WEIGHTS)
    (directory / adapters.WEIGHTS).unlink()


def with_saved_embeddings(base, directory, rows=2048):
    saved_adapter(base, directory)
    weights = load_file(directory / adapters.WEIGHTS)
    embedding = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)) / 10
    weights["base_model.model.transformer.word_embeddings.weight"] = embedding
    weights["base_model.model.lm_head.weight"] = embedding.clone()
    save_file(weights, directory / adapters.WEIGHTS)


def other_kind(config):
    def save(base, directory):
        adapted = get_peft_model(FalconForCausalLM.from_pretrained(base), config())
        for weight in adapted.parameters():
            if weight.requires_grad:
                torch.nn.init.uniform_(weight.data, 0.5, 1.5)
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(directory)

    return save


def lora(**options):
    return lambda base, directory: saved_adapter(base, directory, **options)


def beside_a_config(base, directory):
    saved_adapter(base, directory)
    (directory / "config.json").write_bytes((base / "config.json").read_bytes())


def named_default(base, directory):
    saved_adapter(base, directory)
    rename_weights(directory, lambda key: key.replace(".weight", ".default.weight"))


def rename_weights(adapter, name):
    weights = load_file(adapter / adapters.WEIGHTS)
    save_file({name(key): each for key, each in weights.items()}, adapter / adapters.WEIGHTS)


LOADED = {
    "plain": lora(),
    "pickled, as in 2023": pickled,
    "on two of the layers": lora(layers_to_transform=[1]),
    "beside the config.json of its base": beside_a_config,
    "with the name of the adapter, as in a state_dict()": named_default,
}
MERGED = {
    "LoRA on the embedding": lora(target_modules=["word_embeddings"]),
    "LoRA on the head": lora(target_modules=["lm_head"]),
    "LoRA on both and a layer": lora(target_modules=["word_embeddings", "lm_head", "dense"]),
    "saved embeddings": with_saved_embeddings,
    "DoRA": lora(use_dora=True),
    "IA3": other_kind(lambda: IA3Config(target_modules=["query_key_value"], feedforward_modules=[])),
    "OFT": other_kind(lambda: OFTConfig(r=4, oft_block_size=0, target_modules=["dense"])),
    "LayerNorms": other_kind(lambda: LNTuningConfig(target_modules=["ln_attn"])),
}


def by_peft(base, adapter):
    """The logits of transformers' own Falcon with the adapter attached."""
    return logits(PeftModel.from_pretrained(FalconForCausalLM.from_pretrained(base), adapter).eval())


@pytest.mark.parametrize("kind", LOADED)
def test_an_adapter_from_elsewhere_loads_as_peft_loads_it(base, tmp_path, kind):
    LOADED[kind](base, tmp_path / "wise")
    for found in (fk.load(tmp_path / "wise"), fk.merge(tmp_path / "wise")):
        torch.testing.assert_close(logits(found.model), by_peft(base, tmp_path / "wise"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MERGED)
def test_an_adapter_that_load_refuses_is_merged_as_its_message_says(base, tmp_path, kind):
    MERGED[kind](base, adapter := tmp_path / "wise")
    with pytest.raises(ValueError, match=r"is more than plain LoRA \(.+\): fk\.merge\(adapter, base\) merges"):
        fk.load(adapter)
    falcon = fk.load(base)
    fk.merge(adapter, falcon, output_dir=tmp_path / "merged")
    expected = by_peft(base, adapter)
    torch.testing.assert_close(logits(fk.load(tmp_path / "merged").model), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(falcon.model), logits(fk.load(base).model))
    assert not torch.allclose(expected, logits(falcon.model), atol=1e-2)


def test_prompt_tuning_is_refused_with_a_way_to_attach_it(base, tmp_path):
    save = other_kind(lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    save(base, adapter := tmp_path / "wise")
    for call in (fk.load, fk.merge):
        with pytest.raises(ValueError, match=r"PROMPT_TUNING.*peft\.PeftModel\.from_pretrained\(fk\.load\(base\)"):
            call(adapter)
    attached = PeftModel.from_pretrained(fk.load(base).model, adapter)
    torch.testing.assert_close(logits(attached), by_peft(base, adapter), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained_on", ["grouped", "transformers"])
def test_a_prefix_is_refused_with_the_model_whose_cache_it_fits(base, tmp_path, trained_on):
    model = fk.load(base, attention=trained_on).model
    adapted = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    adapted.save_pretrained(adapter := tmp_path / "wise")
    for call in (fk.load, fk.merge):
        with pytest.raises(ValueError, match=r"from_pretrained\(.*, or to fk\.load\(base, attention='transformers'\)"):
            call(adapter)
    again = PeftModel.from_pretrained(fk.load(base, attention=trained_on).model, adapter)
    torch.testing.assert_close(logits(again.eval()), logits(adapted.eval()))


def test_an_adapter_that_begins_with_the_weights_of_its_base_is_merged_as_by_peft(base, tmp_path):
    adapter = saved_adapter(base, tmp_path / "pissa", init_lora_weights="pissa")
    expected = logits(PeftModel.from_pretrained(FalconForCausalLM.from_pretrained(base), adapter).eval())
    torch.testing.assert_close(logits(fk.merge(adapter).model), expected, rtol=1e-4, atol=1e-4)
    falcon = fk.load(base)
    before = logits(falcon.model)
    with attached(falcon, adapter):
        pass
    torch.testing.assert_close(logits(falcon.model), before)


def test_an_adapter_that_peft_cannot_merge_is_refused_with_a_way_to_attach_it(base, tmp_path):
    adapter = saved_adapter(base, tmp_path / "biased", lora_bias=True)
    with pytest.raises(ValueError, match=r"PEFT cannot merge the adapter .*lora_bias.* attach it, peft\.PeftModel"):
        fk.merge(adapter)
    PeftModel.from_pretrained(fk.load(base).model, adapter)


def test_an_adapter_that_begins_at_certain_tokens_is_refused_with_a_way_to_attach_it(base, tmp_path):
    adapter = saved_adapter(base, tmp_path / "wise")
    changed_config(alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM")(adapter)
    for call in (fk.load, fk.merge):
        with pytest.raises(ValueError, match=r"is an aLoRA: .* attach it: peft\.PeftModel\.from_pretrained"):
            call(adapter)
    PeftModel.from_pretrained(fk.load(base).model, adapter)


def test_an_adapter_is_added_to_a_base_without_the_prefix_of_its_weights(base, tokenizer, tmp_path):
    AutoModel.from_pretrained(base).save_pretrained(tmp_path / "headless")
    tokenizer.save_pretrained(tmp_path / "headless")
    adapter = saved_adapter(base, tmp_path / "wise")
    expected = by_peft(base, adapter)
    renamed(adapter, str(tmp_path / "headless"))
    for found in (fk.load(adapter), fk.merge(adapter)):
        torch.testing.assert_close(logits(found.model), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_trained_on_the_model_without_its_head_is_added_to_the_model_with_it(base, tmp_path):
    adapter = saved_adapter(base, tmp_path / "wise")
    expected = by_peft(base, adapter)
    rename_weights(adapter, lambda key: key.replace(".transformer.", "."))
    for found in (fk.load(adapter), fk.merge(adapter)):
        torch.testing.assert_close(logits(found.model), expected, rtol=1e-4, atol=1e-4)


def test_embeddings_of_a_larger_vocabulary_are_merged_after_the_resize_that_the_message_names(base, tmp_path):
    with_saved_embeddings(base, adapter := tmp_path / "wise", rows=2056)
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(2056\); fk\.merge\(adapter, falcon\)"):
        fk.merge(adapter, base)
    falcon = fk.load(base)
    falcon.model.resize_token_embeddings(2056)
    stock = FalconForCausalLM.from_pretrained(base)
    stock.resize_token_embeddings(2056)
    expected = logits(PeftModel.from_pretrained(stock, adapter).eval())
    torch.testing.assert_close(logits(fk.merge(adapter, falcon).model), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("there", ["/home/alice/falcon-7b", "C:\\models\\falcon", "models/falcon", "alice/falcon-40b"])
def test_a_base_of_another_machine_is_named_with_the_way_out(base, tmp_path, there):
    adapter = saved_adapter(base, tmp_path / "wise")
    expected = by_peft(base, adapter)
    renamed(adapter, there)
    for call in (fk.load, fk.spec, fk.merge):
        with pytest.raises((OSError, LookupError), match=r"the base model of the adapter in .*wise, .* is not found"):
            call(adapter)
    torch.testing.assert_close(logits(fk.merge(adapter, base).model), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_beside_its_base_is_added_to_it(base):
    expected = fk.load(base)
    saved_adapter(base, base)
    torch.testing.assert_close(logits(fk.load(base).model), by_peft_beside(base), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(fk.load(base).model), logits(expected.model), atol=0.1)
    with pytest.raises(ValueError, match=r"holds the adapter and its base: fk\.load\("):
        fk.merge(base)


def by_peft_beside(directory):
    config = fk.load(directory).model.config  # transformers reads the adapter by itself, so weights are given
    stock = FalconForCausalLM(config)
    stock.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    return logits(PeftModel.from_pretrained(stock, directory).eval())


# Broken adapters


def changed_config(**values):
    def change(adapter):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def changed_weights(keep):
    def change(adapter):
        weights = load_file(adapter / adapters.WEIGHTS)
        save_file({key: each for key, each in weights.items() if keep(key)}, adapter / adapters.WEIGHTS)

    return change


def named_twice(adapter):
    weights = load_file(adapter / adapters.WEIGHTS)
    for side in "AB":
        name = f"base_model.model.transformer.h.0.mlp.dense_h_to_4h.lora_{side}.weight"
        weights[name.replace(".lora_", ".lora_A.lora_")] = weights[name].clone()
    save_file(weights, adapter / adapters.WEIGHTS)


def with_tensors(name, value):
    """Adds a tensor to every layer that has LoRA, or replaces it."""

    def change(adapter):
        weights = load_file(adapter / adapters.WEIGHTS)
        layers = {key.partition(".lora_")[0] for key in weights}
        save_file(weights | {f"{each}.{name}": value.clone() for each in layers}, adapter / adapters.WEIGHTS)

    return change


def with_flat_matrices(adapter):
    weights = load_file(adapter / adapters.WEIGHTS)
    save_file({key: each[:, 0].clone() for key, each in weights.items()}, adapter / adapters.WEIGHTS)


def with_code(adapter):
    (adapter / adapters.WEIGHTS).unlink()
    torch.save({"weight": re.compile("x")}, adapter / adapters.PICKLED_WEIGHTS)


def names_itself(adapter):
    renamed(adapter, str(adapter))


BROKEN = {
    "no weight": (changed_weights(lambda key: False), "holds no weights: the adapter was not saved completely"),
    "no A": (changed_weights(lambda key: "lora_A" not in key), r"lacks lora_A\.weight of transformer\.h\.0"),
    "no B": (changed_weights(lambda key: "h.1.mlp.dense_h_to_4h.lora_B" not in key), r"lacks lora_B\.weight of tran"),
    "two names of LoRA": (named_twice, r"wise was made .*\.lora_A\.lora_A\.weight is .* the model has no such layer"),
    "flat matrices": (with_flat_matrices, r"wise was made .*\.lora_A\.weight is \(4,\), but the model has a weight of"),
    "r=-1": (changed_config(r=-1), r"r=-1 and lora_alpha=6, but r is a whole number, at least 1"),
    "r=8": (changed_config(r=8), r"has r=8, but lora_A\.weight of .* has the rank 4"),
    "a number that is infinite in float32": (
        changed_config(lora_alpha=-1e308),
        r"lora_alpha=-1e\+308, but .* lora_alpha is finite in float32",
    ),
    "NaN": (changed_config(lora_alpha=math.nan), r"lora_alpha=nan, but .* lora_alpha is finite"),
    "B of another rank": (
        with_tensors("lora_B.weight", torch.zeros(256, 5)),
        r"has lora_A\.weight of .* with the rank 4, but lora_B\.weight with the rank 5",
    ),
    "a matrix with NaN": (
        with_tensors("lora_B.weight", torch.full((256, 4), math.nan)),
        r"numbers that are not finite in .*lora_[AB]\.weight, .*: take an earlier checkpoint",
    ),
    "DoRA that the config does not name": (
        with_tensors("lora_magnitude_vector", torch.ones(256)),
        r"has .*\.lora_magnitude_vector, which an adapter with the settings .* does not use: write .*use_dora",
    ),
    "a tensor of no kind": (
        with_tensors("scale_vector", torch.ones(256)),
        r"has .*\.scale_vector, which an adapter with the settings .* does not use",
    ),
    "matrices of another layer": (
        changed_config(layers_to_transform=[0]),
        r"has matrices of transformer\.h\.1\..*, which target_modules, exclude_modules and layers_to_transform",
    ),
    "matrices of other modules": (changed_config(target_modules=["dense"]), "has matrices of .* leave out: write the"),
    "matrices of excluded modules": (
        changed_config(exclude_modules=["query_key_value"]),
        "has matrices of .* leave out",
    ),
    "a switch of a newer PEFT": (
        changed_config(use_superlora=True),
        "has use_superlora=True, which this version of PEFT does not know .*: update PEFT",
    ),
    "MergedLinear of the first PEFT": (
        changed_config(enable_lora=[True, False, True]),
        r"has enable_lora=\[True, False, True\], which this version",
    ),
    "numbers that PEFT draws": (
        changed_config(init_lora_weights="pissa_niter_4"),
        r"has init_lora_weights='pissa_niter_4': PEFT draws .*: save it as plain LoRA where it was trained",
    ),
    "texts that it began with": (
        changed_config(init_lora_weights="corda", corda_config={}),
        r"has init_lora_weights='corda': PEFT would need the texts .*: save it as plain LoRA where it was trained",
    ),
    "its own base": (names_itself, r"names itself as its base model.*fk\.merge\(adapter, base\)"),
    "a pickle with code": (with_code, r"other objects than tensors, .* so it is not read: get the weights as saf"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_adapter_is_refused_with_the_true_reason(base, tmp_path, kind):
    adapter = saved_adapter(base, tmp_path / "wise")
    spoil, message = BROKEN[kind]
    spoil(adapter)
    with pytest.raises(ValueError, match=message) as error:
        fk.load(adapter)
    assert "weights_only" not in str(error.value)


NAMES = {
    "no prefix": (lambda key: key.removeprefix("base_model.model."), "which does not begin with base_model.model.;"),
    "half a prefix": (lambda key: key.replace(".model.", ".", 1), "which does not begin with base_model.model.;"),
    "DDP": (lambda key: f"module.{key}", "to which DistributedDataParallel added 'module';"),
    "torch.compile": (
        lambda key: key.replace("transformer", "_orig_mod.transformer"),
        "to which torch.compile added '_orig_mod';",
    ),
    "FSDP": (
        lambda key: f"_fsdp_wrapped_module.{key}",
        "to which FullyShardedDataParallel added '_fsdp_wrapped_module';",
    ),
}


@pytest.mark.parametrize("pickle", [False, True], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("kind", NAMES)
def test_names_of_weights_that_peft_leaves_out_are_refused_with_how_to_rename_them(base, tmp_path, kind, pickle):
    expected = by_peft(base, saved_adapter(base, adapter := tmp_path / "wise"))
    rename, message = NAMES[kind]
    rename_weights(adapter, rename)
    if pickle:
        torch.save(load_file(adapter / adapters.WEIGHTS), adapter / adapters.PICKLED_WEIGHTS)
        (adapter / adapters.WEIGHTS).unlink()
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        assert not torch.allclose(by_peft(base, adapter), expected, atol=1e-2)
    for call in (fk.load, fk.merge):
        with pytest.raises(ValueError, match=message) as error:
            call(adapter)
    advice = str(error.value).partition("or rename its weights: ")[2]
    exec(advice, {"file": adapters.weights_file(adapter), "torch": torch, "safetensors": safetensors})  # noqa: S102  # our own line
    for call in (fk.load, fk.merge):
        torch.testing.assert_close(logits(call(adapter).model), expected, rtol=1e-4, atol=1e-4)


def test_loftq_is_refused_without_a_gpu_and_is_plain_lora_beside_the_base_that_it_changed(base, tmp_path):
    expected = by_peft(base, saved_adapter(base, adapter := tmp_path / "wise"))
    changed_config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})(adapter)
    for call in (fk.load, fk.merge):
        with pytest.raises(ValueError, match=r"init_lora_weights='loftq': .* takes a GPU, .* write init_lora_weights="):
            call(adapter)
    changed_config(init_lora_weights=True)(adapter)
    for call in (fk.load, fk.merge):
        torch.testing.assert_close(logits(call(adapter).model), expected, rtol=1e-4, atol=1e-4)


def test_two_adapters_that_name_each_other_are_refused(base, tmp_path):
    one, other = (saved_adapter(base, tmp_path / name) for name in ("one", "other"))
    renamed(one, str(other))
    renamed(other, str(one))
    for call in (fk.load, fk.spec):
        with pytest.raises(ValueError, match="names itself as its base model, directly or through other adapters"):
            call(one)


# On the hub


def test_an_adapter_on_the_hub_has_the_spec_and_the_plan_of_its_directory(monkeypatch, base, tmp_path):
    adapter = saved_adapter(base, tmp_path / "wise")
    cached(tmp_path, "somebody/falcon-lora", adapter)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    spec = fk.spec("somebody/falcon-lora")
    assert (spec.name, spec.parameters) == ("somebody/falcon-lora", fk.spec(adapter).parameters)
    planned = fk.plan("somebody/falcon-lora", devices="T4")
    assert planned.total_bytes == fk.plan(str(adapter), devices="T4").total_bytes


def test_a_repository_that_holds_an_adapter_and_its_base_loads_both(base, tmp_path):
    both = saved_adapter(base, tmp_path / "both")
    for file in base.iterdir():
        shutil.copyfile(file, both / file.name)
    renamed(both, "somebody/both")
    cached(tmp_path, "somebody/both", both)
    falcon = fk.load("somebody/both", cache_dir=tmp_path, local_files_only=True)
    assert falcon.spec.name == "somebody/both"
    torch.testing.assert_close(logits(falcon.model), by_peft(base, both), rtol=1e-4, atol=1e-4)


# Nothing is added twice


@pytest.fixture
def both(base, tmp_path, monkeypatch):
    """A copy of the repository somebody/both, which holds an adapter and its base; its snapshot is in the cache."""
    both = saved_adapter(base, tmp_path / "both")
    for file in base.iterdir():
        shutil.copyfile(file, both / file.name)
    renamed(both, "somebody/both")
    cached(tmp_path, "somebody/both", both)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return both


def test_the_snapshot_of_a_repository_that_holds_both_loads_as_the_repository_does(base, both, tmp_path):
    (snapshot,) = tmp_path.glob("models--somebody--both/snapshots/*")
    torch.testing.assert_close(logits(fk.load(snapshot).model), by_peft(base, both), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"holds the adapter and its base: fk\.load\("):
        fk.merge(snapshot)


OF_ANOTHER_KIND = [
    *(("base_model_name_or_path", value) for value in (True, 7, "(", "\ud800", [[1]])),
    *(("target_modules", value) for value in (True, 7, "(", "\ud800", [[1]])),
    *(("exclude_modules", value) for value in (True, 7, "(")),
    *(("layers_to_transform", value) for value in (True, 7, "(", [[1]])),
    ("bias", "some"),
]


@pytest.mark.parametrize("call", [fk.load, fk.merge])
@pytest.mark.parametrize(("field", "value"), OF_ANOTHER_KIND, ids=repr)
def test_a_field_of_another_kind_is_refused_with_the_name_of_its_file(base, tmp_path, field, value, call):
    file = saved_adapter(base, tmp_path / "odd") / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises((ValueError, FileNotFoundError, LookupError)) as refusal:
        call(file.parent)
    assert type(refusal.value) in (ValueError, FileNotFoundError, LookupError)
    assert str(file.parent) in str(refusal.value)


@pytest.mark.parametrize("field", ["base_model_name_or_path", "task_type"])
def test_control_characters_in_the_config_of_an_adapter_are_written_out(base, tmp_path, field):
    file = saved_adapter(base, tmp_path / "odd") / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: "\x1b[2J"}))
    with pytest.raises((ValueError, LookupError), match=r"\\x1b\[2J") as refusal:
        fk.load(file.parent)
    assert "\x1b" not in str(refusal.value)


def test_a_config_of_an_adapter_imports_no_module(base, tmp_path, monkeypatch):
    """PEFT before 0.20 imports any module that megatron_core names, such as one beside the config."""
    folder = saved_adapter(base, tmp_path / "foreign_adapter")
    (folder / "payload.py").write_text("raise SystemExit('code of an adapter runs')")
    changes = {"megatron_config": {"hidden_size": 1}, "megatron_core": "foreign_adapter.payload"}
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    monkeypatch.syspath_prepend(tmp_path)  # as the folder of a notebook is
    for call in (fk.load, fk.merge):
        with pytest.raises(ValueError, match="foreign_adapter"):
            call(folder)


@pytest.mark.parametrize("call", [fk.load, fk.merge])
def test_a_copy_of_a_repository_that_holds_both_is_not_added_to_the_repository(both, call):
    with pytest.raises(ValueError, match="is in somebody/both already, and would count twice: use somebody/both as"):
        call(both)


def test_an_adapter_is_not_merged_into_a_model_that_has_it(base, tmp_path):
    adapter = saved_adapter(base, tmp_path / "wise")
    merged = fk.merge(adapter, base, output_dir=tmp_path / "merged")
    for model in (merged, tmp_path / "merged", fk.load(adapter)):
        with pytest.raises(ValueError, match=r"the adapter in .*wise is in .* already, and would count twice: use"):
            fk.merge(adapter, model)


@pytest.mark.parametrize("name", ["a folder", "somebody/both"])
@pytest.mark.parametrize("gguf", [False, True])
def test_a_model_beside_its_adapter_is_served_with_it(base, both, tmp_path, name, gguf):
    if name == "a folder":
        name = str(both)
        renamed(both, name)
    (tmp_path / "files").mkdir()
    files = files_for(source_of(name), tmp_path / "files", "f32", gguf)
    served = fk.load(files.path, dtype="float32")
    torch.testing.assert_close(logits(served.model), by_peft(base, both), rtol=1e-4, atol=1e-4)
    assert "merge" not in files.again
