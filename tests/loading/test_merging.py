"""`fk.merge`: W + scale * B A as `fk.load` computes it, checked by the logits, saved completely or not at all."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from transformers import FalconForCausalLM

import falcon_kit as fk
from falcon_kit.generation.chat import plain_template
from falcon_kit.loading import merging
from falcon_kit.loading.adding import LazyMergedWeight
from falcon_kit.loading.merging import attached
from falcon_kit.planning.devices import Device
from tests.conftest import logits, simulated_gpus, small_model
from tests.loading.test_adapters import TARGETS, renamed, saved_adapter
from tests.loading.test_checkpoints import cached


@pytest.fixture
def base(tokenizer, tmp_path):
    """The checkpoint of a small model of the 40B layout."""
    small_model("40b").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    """An adapter for it."""
    return saved_adapter(base, tmp_path / "wise")


def attached_by_peft(model, adapter):
    """The logits of a model with the adapter attached."""
    return logits(PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval())


# The merged weights


def test_a_merged_checkpoint_has_a_plain_template_and_is_marked_for_training_when_it_is_loaded(base, adapter, tmp_path):
    merged = fk.merge(adapter, base, output_dir=tmp_path / "merged")
    saved = (tmp_path / "merged" / "chat_template.jinja").read_text()
    again = fk.load(tmp_path / "merged")
    assert (saved, "generation %}" in saved) == (plain_template(merged.chat_format.template), False)
    assert again.tokenizer.chat_template == merged.tokenizer.chat_template == merged.chat_format.template
    rows = [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}]
    assert fk.tune(again, rows, output_dir=tmp_path / "run", held_out=0, max_steps=1, quiet=True).adapter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merged_weights_are_those_that_load_reads(base, adapter, dtype):
    small_model("40b").to(getattr(torch, dtype)).save_pretrained(base)
    loaded = fk.load(adapter, dtype=dtype).model.state_dict()
    merged = fk.merge(adapter, fk.load(base, dtype=dtype)).model.state_dict()
    assert [name for name, weight in merged.items() if not torch.equal(weight, loaded[name])] == []


def test_float64_is_merged_too(base, adapter):
    falcon = fk.load(base, dtype="float32")
    falcon.model.double()
    assert fk.merge(adapter, falcon).gap < 1e-6


def test_plain_lora_is_merged_without_peft(monkeypatch, base, adapter):
    monkeypatch.setattr(Linear, "merge", lambda *_, **__: pytest.fail("PEFT merges"))
    merged = fk.merge(adapter, base)
    expected = attached_by_peft(FalconForCausalLM.from_pretrained(base), adapter)
    torch.testing.assert_close(logits(merged.model), expected, rtol=1e-4, atol=1e-4)
    assert not hasattr(merged.model, "peft_config")


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"rank_pattern": {"dense": 2}}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}]
)
def test_more_than_plain_lora_is_merged_by_peft(tokenizer, tmp_path, options):
    small_model("rw").save_pretrained(tmp_path / "base")  # the layout with biases
    tokenizer.save_pretrained(tmp_path / "base")
    falcon = fk.load(tmp_path / "base", dtype="float32")
    adapter = saved_adapter(tmp_path / "base", tmp_path / "more", **options)
    merged = fk.merge(adapter, falcon)
    torch.testing.assert_close(logits(merged.model), attached_by_peft(falcon.model, adapter), rtol=1e-4, atol=1e-4)
    assert not hasattr(merged.model, "peft_config")


def test_the_weights_of_a_falcon_count_as_they_are_in_memory(base, adapter):
    falcon = fk.load(base)
    with torch.no_grad():
        falcon.model.transformer.h[0].mlp.dense_h_to_4h.weight.mul_(2)
    merged = fk.merge(adapter, falcon)
    torch.testing.assert_close(logits(merged.model), attached_by_peft(falcon.model, adapter), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged.model), logits(fk.load(adapter).model), atol=0.1)


def test_a_quantised_base_is_read_again_from_where_it_was(tokenizer, tmp_path):
    small_model("40b").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    cached(tmp_path, "tiiuae/falcon-40b", tmp_path / "base")
    base = fk.load("falcon-40b", dtype="int8", cache_dir=tmp_path, local_files_only=True, force=True)
    adapter = saved_adapter(tmp_path / "base", tmp_path / "wise")
    assert fk.merge(adapter, base).dtype == "bfloat16"


@pytest.fixture
def stored(base, tmp_path):
    """The base saved in int8, in which it is stored then."""
    quantised = fk.load(base, dtype="int8")
    quantised.model.save_pretrained(tmp_path / "int8")
    quantised.tokenizer.save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("given", [lambda _: None, str, fk.load], ids=["by the adapter", "by name", "loaded"])
def test_a_base_that_is_stored_quantised_is_refused_before_it_is_loaded(base, stored, tmp_path, given):
    adapter = saved_adapter(base, tmp_path / "wise")
    renamed(adapter, str(stored))
    advice = rf"original that was quantised, fk\.merge\('{adapter}', original\), or attach the adapter to these, peft\."
    with pytest.raises(
        ValueError, match=rf"wise is to be added to .*int8, whose weights are stored in int8: .*{advice}"
    ):
        fk.merge(adapter, given(stored))


def test_an_adapter_for_a_base_that_is_stored_quantised_is_used_as_advised(base, stored, adapter):
    attached = logits(PeftModel.from_pretrained(fk.load(stored).model, adapter)).float()
    merged, without = logits(fk.merge(adapter, base).model), logits(fk.load(base).model)
    assert (attached - merged).norm() < 0.05 * merged.norm() < (merged - without).norm()


def test_an_offloaded_falcon_is_refused_with_what_to_do(base, adapter, tmp_path):
    parts = {"transformer.word_embeddings": "cpu", "transformer.h": "disk", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    falcon = fk.load(base, dtype="float32", device_map=parts, offload_folder=tmp_path / "offload")
    advice = (
        rf"fk\.merge\('{adapter}', '{base}'\) loads it completely, and fk\.load\('{adapter}', offload='disk'\) adds"
    )
    with pytest.raises(ValueError, match=rf"a part of the model is offloaded .*: {advice}"):
        fk.merge(adapter, falcon)


@pytest.mark.usefixtures("base", "adapter")
def test_a_tilde_is_the_users_own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    merged = fk.merge("~/wise", "~/base", output_dir="~/merged")
    assert torch.equal(logits(merged.model), logits(fk.load(tmp_path / "merged").model))


def test_an_adapter_is_merged_into_a_merged_model(base, adapter, tmp_path):
    second = saved_adapter(base, tmp_path / "wiser", seed=2)
    first = fk.merge(adapter, base)
    merged = fk.merge(second, first)
    torch.testing.assert_close(logits(merged.model), attached_by_peft(first.model, second), rtol=1e-4, atol=1e-4)
    assert merged.gap != first.gap


def test_merging_does_not_change_the_base(base, adapter):
    falcon = fk.load(base)
    before = {name: (each.clone(), each.requires_grad) for name, each in falcon.model.named_parameters()}
    merged = fk.merge(adapter, falcon)
    for name, each in falcon.model.named_parameters():
        assert torch.equal(each, before[name][0])
        assert each.requires_grad == before[name][1]
    assert merged.model is not falcon.model
    changed = [name for name, each in merged.model.named_parameters() if not torch.equal(each, before[name][0])]
    assert {name.split(".")[-2] for name in changed} == set(TARGETS)


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_merged_weights_that_change_the_logits_are_refused(monkeypatch, base, adapter, factor):
    right = LazyMergedWeight.__getitem__
    monkeypatch.setattr(LazyMergedWeight, "__getitem__", lambda self, index: factor * right(self, index))
    with pytest.raises(RuntimeError, match=r"after merging, logits differ by .* of the largest, more than rounding"):
        fk.merge(adapter, base)


def test_a_model_is_as_it_was_after_an_interruption_while_an_adapter_is_attached(monkeypatch, base, adapter):
    falcon = fk.load(base)
    before, expected = [name for name, _ in falcon.model.named_modules()], logits(falcon.model)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.set_peft_model_state_dict", interrupt)
        with pytest.raises(KeyboardInterrupt), attached(falcon, adapter):
            pass
    assert [name for name, _ in falcon.model.named_modules()] == before
    assert torch.equal(logits(falcon.model), expected)
    fk.merge(adapter, falcon)


# The saved checkpoint


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def sharded(tokenizer, tmp_path):
    """An older checkpoint in shards, where the merged one is to be saved."""
    small_model("7b").save_pretrained(tmp_path / "merged", max_shard_size="2MB")
    tokenizer.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    return tmp_path / "merged"


def test_a_saved_model_replaces_a_sharded_checkpoint_with_its_index(base, adapter, sharded):
    merged = fk.merge(adapter, base, output_dir=sharded)
    assert [path.name for path in sharded.glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits(fk.load(sharded).model), logits(merged.model))
    assert sorted(path.name for path in sharded.parent.iterdir()) == ["base", "merged", "wise"]


def test_a_merged_model_is_named_by_the_folder_it_was_saved_in(base, tmp_path):
    adapter = saved_adapter(base, tmp_path / "dora", use_dora=True)  # which fk.load alone refuses
    merged = fk.merge(adapter, base, output_dir=tmp_path / "merged")
    assert merged.name == str(tmp_path / "merged")
    assert torch.equal(logits(fk.load(merged.name).model), logits(merged.model))


@pytest.mark.parametrize("failing", [FalconForCausalLM, "tokenizer"])
def test_a_checkpoint_stays_whole_where_saving_fails(monkeypatch, base, adapter, sharded, tokenizer, failing):
    before = files(sharded)
    kind = type(tokenizer) if failing == "tokenizer" else failing

    def half(self, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise OSError("the disk is full")

    monkeypatch.setattr(kind, "save_pretrained", half)
    with pytest.raises(OSError, match="the disk is full"):
        fk.merge(adapter, base, output_dir=sharded)
    assert files(sharded) == before
    assert sorted(path.name for path in sharded.parent.iterdir()) == ["base", "merged", "wise"]


def test_the_size_is_checked_before_anything_is_merged(monkeypatch, base, adapter, sharded):
    falcon, before = fk.load(base), files(sharded)
    monkeypatch.setattr("falcon_kit.loading.merging._merge", lambda *_: pytest.fail("the adapter was merged"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(OSError, match=r"merged needs .* MiB, and .* has 1000 B free"):
        fk.merge(adapter, falcon, output_dir=sharded)
    assert files(sharded) == before


@pytest.fixture
def nothing_loads(monkeypatch):
    monkeypatch.setattr("falcon_kit.loading.merging.load", lambda *_, **__: pytest.fail("the base was loaded"))


@pytest.mark.usefixtures("nothing_loads")
def test_an_output_dir_that_is_a_file_is_refused_first(base, adapter, tmp_path):
    (tmp_path / "merged").write_text("notes")
    with pytest.raises(NotADirectoryError, match=r"output_dir='.*merged' is a file: give a folder"):
        fk.merge(adapter, base, output_dir=tmp_path / "merged")
    assert (tmp_path / "merged").read_text() == "notes"


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("name", ["notes.md", "config.json.old", "model.gguf"])
def test_a_file_of_the_user_beside_a_checkpoint_is_never_removed(base, adapter, sharded, name):
    (sharded / name).write_text("a week of work")
    with pytest.raises(FileExistsError, match=rf"holds {name}, which saving a model there would remove"):
        fk.merge(adapter, base, output_dir=sharded)
    assert (sharded / name).read_text() == "a week of work"


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("folder", [".", "wise", "run"])
def test_an_output_dir_with_more_than_a_checkpoint_is_refused_first(base, adapter, tmp_path, folder):
    shutil.copytree(base, tmp_path / "run")
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    before = sorted((tmp_path / folder).rglob("*"))
    with pytest.raises(FileExistsError, match=r"holds \S+, which saving a model there would remove: give a new folder"):
        fk.merge(adapter, base, output_dir=tmp_path / folder)
    assert sorted((tmp_path / folder).rglob("*")) == before


def test_a_copy_that_finds_no_room_is_refused_with_what_to_do(monkeypatch, base, adapter):
    falcon = fk.load(base)
    monkeypatch.setattr("falcon_kit.loading.merging.devices_by_key", lambda _: (Device("cpu", "cpu", 1000),))
    with pytest.raises(MemoryError, match=r"takes .* on device 'cpu', where 1000 B are free: delete .* its name"):
        fk.merge(adapter, falcon)


def test_a_copy_on_the_gpu_of_another_process_needs_room_there(monkeypatch):
    simulated_gpus(monkeypatch, [10**9, 1000])
    monkeypatch.setenv("WORLD_SIZE", "2")
    weight = SimpleNamespace(device=torch.device("cuda", 1), nbytes=2000)
    base = SimpleNamespace(name="falcon-7b", model=SimpleNamespace(parameters=lambda: [weight]))
    with pytest.raises(MemoryError, match=r"takes 1\.95 KiB on device 1, where 1000 B are free: delete"):
        merging._check_room_for_a_copy(base)
