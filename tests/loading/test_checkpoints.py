"""Checkpoints: found by name, directory or hub id; errors are raised before the weights are read."""

import json
import re
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import falcon_kit as fk
from falcon_kit.catalogue import hub
from falcon_kit.loading import checkpoints
from tests.conftest import legacy, logits, small_model

# The hub, as its cache on disk looks


def cached(cache, repository, directory, revision="main", commit="0" * 40):
    """Puts a checkpoint into a hub cache, as a download would have left it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    shutil.copytree(directory, folder / "snapshots" / commit)


def test_a_hub_id_that_is_cached_loads_without_network(tokenizer, tmp_path):
    small_model("40b").save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    cached(tmp_path, "somebody/my-falcon", tmp_path / "saved")
    falcon = fk.load("somebody/my-falcon", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(logits(falcon.model), logits(small_model("40b")))
    assert falcon.plan.disk is None  # nothing is to be downloaded any more


def test_a_cached_model_loads_at_once_where_the_hub_cannot_be_reached(tokenizer, tmp_path, monkeypatch):
    small_model("40b").save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    cached(tmp_path, "somebody/my-falcon", tmp_path / "saved")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "is_cut_off", lambda: True)
    monkeypatch.setattr("httpx2.Client.request", lambda *_, **__: pytest.fail("the hub was asked"))
    assert fk.load("somebody/my-falcon", cache_dir=tmp_path).spec.layers == 2


def test_a_model_of_the_hub_is_named_by_its_id(tokenizer, tmp_path):
    small_model("40b").save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    cached(tmp_path, "somebody/my-falcon", tmp_path / "saved")
    falcon = fk.load("somebody/my-falcon", cache_dir=tmp_path, local_files_only=True)
    assert (falcon.name, falcon.spec.hub_id) == ("somebody/my-falcon", "somebody/my-falcon")


def test_a_revision_of_the_hub_is_named_by_its_folder(tokenizer, tmp_path):
    small_model("40b").save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    cached(tmp_path, "somebody/my-falcon", tmp_path / "saved", "v2", "2" * 40)
    falcon = fk.load("somebody/my-falcon", revision="v2", cache_dir=tmp_path, local_files_only=True)
    assert falcon.name == str(tmp_path / "models--somebody--my-falcon" / "snapshots" / ("2" * 40))


def test_a_cached_hub_id_with_pickled_weights_only_loads_too(tokenizer, tmp_path):
    cached(tmp_path, "somebody/old-falcon", legacy(tmp_path / "old", "40b", tokenizer))
    falcon = fk.load("somebody/old-falcon", cache_dir=tmp_path, local_files_only=True, dtype="float32")
    assert torch.equal(logits(falcon.model), logits(small_model("40b")))


def test_the_revision_asked_for_is_the_one_loaded(tokenizer, tmp_path):
    for number, (revision, layout) in enumerate({"main": "40b", "other": "7b"}.items()):
        saved = tmp_path / revision
        small_model(layout).save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        cached(tmp_path, "somebody/my-falcon", saved, revision, str(number) * 40)
    falcon = fk.load("somebody/my-falcon", revision="other", cache_dir=tmp_path, local_files_only=True)
    assert falcon.spec.layout == "multi-query"


def test_a_revision_of_what_is_on_this_machine_is_refused(tokenizer, tmp_path):
    small_model("40b").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = saved_adapter_without_effect(tmp_path / "base", tmp_path / "none")
    gguf = fk.export_gguf(fk.load(tmp_path / "base"), tmp_path / "a.gguf", "f32")
    for name in ("falconet", "falconet-instruct", tmp_path / "base", adapter, gguf):
        with pytest.raises(ValueError, match=rf"revision='v2' is of a hub repository, and {name} is on this machine"):
            fk.load(name, revision="v2")


@pytest.mark.parametrize("name", ["tiiuae/falcon-40b-instruct", "falcon-40b-instruct", "somebody/their-falcon"])
def test_a_hub_id_that_is_not_cached_says_that_the_hub_cannot_be_reached(name, tmp_path):
    with pytest.raises(
        ConnectionError, match=f"{name}.* not in the local cache and the hub cannot be reached.*falconet"
    ) as error:
        fk.load(name, cache_dir=tmp_path)
    assert "If it is no hub id" not in str(error.value)


def test_a_token_never_appears_in_an_error_or_a_repr(tmp_path):
    with pytest.raises(ConnectionError) as error:
        fk.load("somebody/their-falcon", token="hf_secret", cache_dir=tmp_path)
    assert "hf_secret" not in str(error.value) + repr(error.value)


@pytest.fixture
def configs_only(tokenizer, tmp_path):
    """A hub cache with the configs of an adapter and its base, and nothing else of them."""
    small_model("40b").save_pretrained(tmp_path / "base")
    cached(tmp_path, "somebody/my-falcon", tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/my-falcon"}')
    cached(tmp_path, "somebody/falcon-lora", adapter)
    for file in tmp_path.glob("models--*/snapshots/*/*.safetensors"):
        file.unlink()
    return tmp_path


@pytest.mark.parametrize("name", ["somebody/my-falcon", "somebody/falcon-lora"])
def test_the_plan_is_made_before_anything_but_configs_is_fetched(configs_only, name, monkeypatch):
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *_, **__: pytest.fail("weights were fetched"))
    hub = {"cache_dir": configs_only, "local_files_only": True}
    with pytest.raises(fk.NotEnoughMemory, match=f"{name} in .* does not fit"):
        fk.load(name, max_memory={"cpu": "1MiB"}, **hub)
    found = checkpoints.find(name, {**hub, "revision": None, "token": "hf_secret"})
    assert (found.spec.name, found.base.name) == (name, "somebody/my-falcon")
    assert "hf_secret" not in repr(found)


def test_the_disk_of_a_plan_is_that_of_cache_dir(configs_only, monkeypatch):
    monkeypatch.setattr("falcon_kit.planning.downloads.free_disk", lambda path: 7 if path == configs_only else 2**60)
    with pytest.raises(
        fk.NotEnoughMemory, match=r"of disk, and 7 B are free in cache_dir='.*': give a folder on a"
    ) as no:
        fk.load("somebody/my-falcon", max_memory={"cpu": "1MiB"}, cache_dir=configs_only, local_files_only=True)
    assert f"to the disk of {configs_only}: 7 B free" in no.value.plan._repr_html_()


def test_weights_are_fetched_from_the_commit_whose_config_was_read(configs_only, monkeypatch):
    fetched = []
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *given, **options: fetched.append((*given, options)))
    found = checkpoints.find("somebody/falcon-lora", {"cache_dir": configs_only, "local_files_only": True})
    with pytest.raises(FileNotFoundError, match="no weights: expected"):
        checkpoints.fetch(found)
    assert {(repository, options["revision"]) for repository, options in fetched} == {
        ("somebody/my-falcon", "0" * 40),
        ("somebody/falcon-lora", "0" * 40),
    }


@pytest.mark.parametrize(("free", "fetches"), [(10**9 - 1, 0), (10**9, 1)])
@pytest.mark.parametrize(
    ("hub", "advice"),
    [({}, "set HF_HOME to a folder"), ({"cache_dir": "/small"}, "free in cache_dir='/small'")],
)
def test_a_download_that_the_disk_has_no_room_for_is_refused_before_it_begins(
    configs_only, monkeypatch, free, fetches, hub, advice
):
    fetched = []
    files = [SimpleNamespace(file_size=10**9, will_download=True), SimpleNamespace(file_size=7, will_download=False)]
    answer = lambda *_, dry_run=False, **__: files if dry_run else fetched.append("weights")  # noqa: E731
    monkeypatch.setattr(checkpoints, "snapshot_download", answer)
    monkeypatch.setattr(checkpoints, "free_disk", lambda path: free)
    folder = configs_only / "models--somebody--my-falcon" / "snapshots" / ("0" * 40)
    problem = nullcontext() if fetches else pytest.raises(OSError, match=rf"954 MiB of disk.*{advice}")
    with problem:
        checkpoints._download(folder, "somebody/my-falcon", ["*.safetensors"], hub)
    assert len(fetched) == fetches


def test_without_the_hub_the_cache_is_used_whatever_is_free(configs_only, monkeypatch):
    monkeypatch.setattr(checkpoints, "free_disk", lambda path: 0)
    folder = configs_only / "models--somebody--my-falcon" / "snapshots" / ("0" * 40)
    checkpoints._download(folder, "somebody/my-falcon", ["*.json"], {"cache_dir": configs_only})


# What is wrong with a checkpoint


def test_an_empty_name_is_refused():
    with pytest.raises(LookupError, match="the name is empty: give one of falconet"):
        fk.load("")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(LookupError, match=r"Unknown model 'falconet-instrct'\. Nearest: falconet-instruct"):
        fk.load("falconet-instrct")


@pytest.mark.parametrize("name", ["/no/such/place", "./nor/here", "../nor/here", "~/nor-here", "runs/typo", "a/b/c"])
def test_a_directory_that_does_not_exist_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=f"there is no directory {name}: give one that holds a config"):
        fk.load(name)


def test_a_file_of_weights_is_answered_with_its_folder(checkpoint):
    with pytest.raises(ValueError, match=r"model\.safetensors is a file: give the folder that holds it"):
        fk.load(checkpoint / "model.safetensors")


def test_a_directory_without_a_config_is_named_with_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist; its directory contains notes\.txt"):
        fk.load(tmp_path)


def test_another_architecture_is_refused_by_name(checkpoint):
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type is 'llama', not a Falcon's"):
        fk.load(checkpoint)


def test_a_directory_without_weights_names_the_files_expected(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights: expected model\.safetensors, pytorch_model\.bin"):
        fk.load(checkpoint)


@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.999])
def test_a_safetensors_file_that_was_cut_off_is_refused(checkpoint, kept):
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut off or damaged .* fetch it again"):
        fk.load(checkpoint)


def test_a_pickled_shard_that_was_cut_off_is_refused(tokenizer, tmp_path):
    file = legacy(tmp_path / "old", "7b", tokenizer) / "pytorch_model-00002-of-00002.bin"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"pytorch_model-00002-of-00002\.bin is cut off or damaged"):
        fk.load(file.parent)


def test_a_pickled_file_of_torch_before_1_6_is_read_and_one_that_was_cut_off_refused(tokenizer, tmp_path):
    file = legacy(tmp_path / "old", "7b", tokenizer) / "pytorch_model-00002-of-00002.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    loaded = fk.load(file.parent, dtype="float32").model
    torch.testing.assert_close(logits(loaded), logits(small_model("7b")), rtol=1e-4, atol=1e-4)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"pytorch_model-00002-of-00002\.bin is cut off or damaged"):
        fk.load(file.parent)


def test_control_characters_in_the_names_of_shards_are_written_out(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "\x1b[2J.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"names: \\x1b\[2J\.safetensors; fetch"):
        fk.load(checkpoint)


def test_control_characters_in_the_names_of_other_files_are_written_out(tmp_path):
    (tmp_path / "\x1b[2J").touch()
    with pytest.raises(FileNotFoundError, match=r"its directory contains \\x1b\[2J\.$"):
        fk.load(tmp_path)


def test_a_tokenizer_at_which_its_library_panics_is_named(checkpoint):
    file = checkpoint / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["continuing_subword_prefix"] = "longer than a merged token"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be used \(PanicException: range end index"):
        fk.load(checkpoint)


def test_a_missing_shard_is_named(tokenizer, tmp_path):
    small_model("40b").save_pretrained(tmp_path, max_shard_size="2MB")
    tokenizer.save_pretrained(tmp_path)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of the . shards.*{gone.name}"):
        fk.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_single_file_is_read_before_an_index_as_transformers_reads_them(tokenizer, tmp_path, name):
    small_model("40b").save_pretrained(tmp_path / "old", max_shard_size="2MB")
    if name == "pytorch_model.bin":
        legacy(tmp_path / "pickled", "40b", tokenizer)
    base = tmp_path / ("pickled" if name == "pytorch_model.bin" else "old")
    other = small_model("40b")
    other.transformer.ln_f.weight.data.mul_(3)
    if name == "pytorch_model.bin":
        torch.save(other.state_dict(), base / name)
    else:
        save_file({key: each.clone() for key, each in other.state_dict().items()}, base / name, {"format": "pt"})
    tokenizer.save_pretrained(base)
    adapter = saved_adapter_without_effect(base, tmp_path / "none")
    for found in (fk.load(base, dtype="float32"), fk.load(adapter, dtype="float32")):
        torch.testing.assert_close(logits(found.model), logits(other), rtol=1e-4, atol=1e-4)


def saved_adapter_without_effect(base, directory):
    """An adapter that changes nothing, so that the logits are those of the weights that were read."""
    config = LoraConfig(r=1, target_modules=["dense"], base_model_name_or_path=str(base))
    adapted = get_peft_model(small_model("40b"), config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("shard", ["../x.bin", "/etc/passwd", "sub/x.bin", ".."])
def test_a_shard_outside_of_its_folder_is_refused(tokenizer, tmp_path, shard):
    index = legacy(tmp_path / "old", "7b", tokenizer) / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"transformer.ln_f.weight": shard}}))
    with pytest.raises(ValueError, match=rf"names the shard '{shard}', but shards lie beside their index"):
        fk.load(index.parent)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_code_from_the_hub_is_refused(tokenizer, tmp_path, key):
    small_model("7b").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "someone/kernel"}))
    with pytest.raises(ValueError, match=rf"has {key}='someone/kernel', code that .* remove the key"):
        fk.load(tmp_path)
    file.write_text(json.dumps({name: each for name, each in json.loads(file.read_text()).items() if name != key}))
    torch.testing.assert_close(logits(fk.load(tmp_path).model), logits(small_model("7b")), rtol=1e-4, atol=1e-4)


def test_a_pickle_with_code_is_refused_in_our_own_words(tokenizer, tmp_path):
    file = legacy(tmp_path / "old", "7b", tokenizer) / "pytorch_model-00002-of-00002.bin"
    torch.save({"transformer.ln_f.weight": re.compile("x")}, file)
    with pytest.raises(ValueError, match=r"other objects than tensors, .* so it is not read: get the weights") as error:
        fk.load(file.parent)
    assert "weights_only" not in str(error.value)


def test_weights_that_the_config_asks_for_and_the_file_lacks_are_not_made_up(checkpoint):
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 3}))
    with pytest.raises(
        ValueError, match=r"lacks \d+ weights that its config\.json asks for, such as transformer\.h\.2"
    ):
        fk.load(checkpoint)


def test_a_directory_without_a_tokenizer_says_so(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        fk.load(checkpoint)
