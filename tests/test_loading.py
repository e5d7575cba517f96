"""`fk.load`: what it hands back equals what transformers loads; what is wrong is said before the weights are read."""

import json
import shutil

import pytest
import torch
from conftest import small_model
from transformers import FalconForCausalLM

import falcon_kit as fk
from falcon_kit.catalogue import embedded_directory

IDS = torch.tensor([[23, 900, 77, 1500, 42]])


@torch.inference_mode()
def logits(model):
    return model(IDS).logits


def legacy(directory, layout, tokenizer):
    """A checkpoint as published in 2023: RefinedWeb config, pickled shards with an index, remote code beside them."""
    directory.mkdir()
    model = small_model(layout)
    config = {
        "model_type": "RefinedWeb" if layout == "40b" else "RefinedWebModel",
        "architectures": ["RWForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modelling_RW.RWForCausalLM"},
        "vocab_size": 2048,
        "hidden_size": 256,
        "n_layer": 2,
        "n_head": 4,
        "torch_dtype": "bfloat16",
        "bos_token_id": 11,
        "eos_token_id": 11,
        **({"n_head_kv": 2, "parallel_attn": True} if layout == "40b" else {}),
        **({"multi_query": True, "parallel_attn": True, "bias": False} if layout == "7b" else {}),
        **({"alibi": True, "bias": True, "parallel_attn": False, "multi_query": False} if layout == "rw" else {}),
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modelling_RW.py").write_text("raise SystemExit('remote code ran')")
    (directory / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    names = sorted(model.state_dict())
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, held in shards.items():
        torch.save({name: model.state_dict()[name].clone() for name in held}, directory / file)
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: file for file, held in shards.items() for name in held},
    }
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    tokenizer.save_pretrained(directory)
    return directory


# What comes back


@pytest.mark.parametrize("name", ["falconet", "falconet-instruct"])
def test_an_embedded_model_gives_the_logits_that_transformers_gives(name):
    expected = FalconForCausalLM.from_pretrained(embedded_directory(name), dtype=torch.float32)
    assert torch.equal(logits(fk.load(name, dtype="float32").model), logits(expected))


def test_a_falcon_unpacks_into_model_and_tokenizer(instruct):
    model, tokenizer = instruct
    assert (model, tokenizer) == (instruct.model, instruct.tokenizer)


def test_what_comes_back_is_a_plain_transformers_model_in_evaluation_mode(instruct):
    assert (type(instruct.model), instruct.model.training) == (FalconForCausalLM, False)


def test_a_directory_gives_the_model_that_was_saved_into_it(checkpoint, layout):
    assert torch.equal(logits(fk.load(checkpoint).model), logits(small_model(layout)))


def test_sharded_safetensors_give_the_model_that_was_saved(tokenizer, tmp_path):
    small_model("40b").save_pretrained(tmp_path, max_shard_size="2MB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(fk.load(tmp_path).model), logits(small_model("40b")))


def test_a_checkpoint_of_2023_gives_the_model_that_was_saved(layout, tokenizer, tmp_path):
    directory = legacy(tmp_path / "old", layout, tokenizer)
    assert torch.equal(logits(fk.load(directory, dtype="float32").model), logits(small_model(layout)))


def test_a_pickle_that_would_run_code_is_refused(checkpoint, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (checkpoint / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights.?only"):
        fk.load(checkpoint)
    assert not (tmp_path / "exploded").exists()


def test_the_end_token_comes_from_the_tokenizer_where_an_old_config_names_another(tokenizer, tmp_path):
    falcon = fk.load(legacy(tmp_path / "old", "7b", tokenizer))
    assert falcon.model.generation_config.eos_token_id == 11


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
    assert instruct.dtype_reason == "on a CPU 18.5 MiB of weights are little, and float32 is exact"


def test_an_unknown_dtype_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="dtype 'bf16' is not one of auto, float32, bfloat16, float16"):
        fk.load("falconet", dtype="bf16")


# Chat formats


@pytest.mark.parametrize("name", ["falcon", "hub", "baize"])
def test_a_chat_format_asked_for_becomes_the_chat_template(name):
    falcon = fk.load("falconet", chat=name)
    assert falcon.tokenizer.chat_template == fk.chat_format(name).template


def test_an_unknown_chat_format_is_refused_before_anything_is_loaded():
    with pytest.raises(LookupError, match="Unknown chat format 'vicuna'"):
        fk.load("no/such/directory", chat="vicuna")


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


@pytest.mark.parametrize("name", ["tiiuae/falcon-40b-instruct", "falcon-40b-instruct", "somebody/their-falcon"])
def test_a_hub_id_that_is_not_cached_says_that_the_hub_cannot_be_reached(name, tmp_path):
    with pytest.raises(
        ConnectionError, match=f"{name}.* not in the local cache and the hub cannot be reached.*falconet"
    ):
        fk.load(name, cache_dir=tmp_path)


def test_a_token_never_appears_in_an_error_or_a_repr(tmp_path):
    with pytest.raises(ConnectionError) as error:
        fk.load("somebody/their-falcon", token="hf_secret", cache_dir=tmp_path)
    assert "hf_secret" not in str(error.value) + repr(error.value)


# What is wrong with a checkpoint


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(LookupError, match=r"Unknown model 'falconet-instrct'\. Nearest: falconet-instruct"):
        fk.load("falconet-instrct")


@pytest.mark.parametrize("name", ["/no/such/place", "./nor/here", "~/nor-here"])
def test_a_directory_that_does_not_exist_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=f"there is no directory {name}: give one that holds a config"):
        fk.load(name)


def test_a_directory_without_a_config_is_named_with_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist; its directory holds notes\.txt"):
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


def test_a_missing_shard_is_named(tokenizer, tmp_path):
    small_model("40b").save_pretrained(tmp_path, max_shard_size="2MB")
    tokenizer.save_pretrained(tmp_path)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of the . shards.*{gone.name}"):
        fk.load(tmp_path)


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


# How a Falcon shows itself


def test_the_repr_gives_size_dtype_and_device(instruct):
    dtype, device = str(instruct.model.dtype).removeprefix("torch."), instruct.model.device
    assert repr(instruct) == f"Falcon(falconet-instruct, 4,856,320 parameters, {dtype} on {device})"


def test_the_html_escapes_the_name_of_a_directory(tokenizer, tmp_path):
    directory = tmp_path / "<img onerror=alert(1)>"
    small_model("7b").save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    assert "<img" not in fk.load(directory)._repr_html_()
