"""Settings of `fk.load` that are refused, before anything is downloaded."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch

import falcon_kit as fk
from tests.conftest import legacy, logits, small_model


def test_an_unknown_attention_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="attention 'flash' is not one of grouped, transformers"):
        fk.load("falconet", attention="flash")


def test_an_unknown_dtype_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"dtype 'bfloat' is not known: did you mean 'bfloat16'\?"):
        fk.load("no/such/model", dtype="bfloat")


def test_an_unknown_chat_format_is_refused_before_anything_is_loaded():
    with pytest.raises(LookupError, match="Unknown chat format 'vicuna'"):
        fk.load("no/such/directory", chat="vicuna")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_map": "gpu"}, r"Unknown device_map 'gpu'"),
        ({"device_map": "cuda:0"}, r"device_map='cuda:0', but torch finds no GPU here"),
        ({"device_map": {"transformer": "cpu", "lm_head": 1}}, r"device_map=1, but torch finds no GPU here"),
        ({"device_map": {"": torch.device("cuda", 1)}}, r"device_map='cuda:1', but torch finds no GPU here"),
        ({"device_map": {"": "gpu"}}, r"Unknown device_map 'gpu'"),
        ({"max_memory": {3: "20GiB"}}, r"max_memory names 3, but this machine has 'cpu'"),
        ({"max_memory": {"cpu": "lots"}}, r"max_memory has 'lots': give bytes, or a size such as '20GiB'"),
        ({"max_memory": {"cpu": "1GiB"}, "device_map": "cpu"}, r"leave it or device_map='cpu' out"),
        ({"offload": "gpu"}, r"Unknown offload 'gpu'"),
        ({"offload": "cpu"}, r"offload='cpu' moves layers from a GPU to host memory, but there is no GPU here"),
        ({"offload": "disk", "dtype": "nf4"}, r"quantised layers compute where their weights are"),
        ({"offload": "disk", "device_map": "cpu"}, r"offload='disk' chooses the device of each layer"),
        (
            {"dtype": "int8", "device_map": {"transformer.h.4": "cpu", "transformer.h.5": "disk"}},
            r"dtype='int8' with device_map\['transformer.h.5'\]='disk': quantised layers compute where",
        ),
        ({"device_map": {"": "disk"}}, r"device_map\[''\]='disk' offloads the embedding.* the embedding with 'cpu'"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_looked_for(settings, message):
    if torch.cuda.is_available():
        pytest.skip("these are the devices of a machine without a GPU")
    with pytest.raises(ValueError, match=message):
        fk.load("no/such/model", **settings)


@pytest.mark.parametrize("device_map", ["cuda:2", 2, {"transformer": 0, "lm_head": 2}, {"": torch.device("cuda", 2)}])
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(device_map, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"Unknown device_map '(cuda:)?2'\. .*(cuda:0.* cuda:1|cuda:1.* cuda:0)"):
        fk.load("no/such/model", device_map=device_map)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dtype": "int4", "device_map": {"transformer.h.4": 0, "transformer.h.5": "cpu"}},
            r"dtype='int4' with device_map\['transformer.h.5'\]='cpu': quantised layers compute where",
        ),
        (
            {"device_map": {"transformer.word_embeddings": torch.device("cpu"), "transformer.h": "cuda:1"}},
            r"device_map\['transformer.word_embeddings'\]='cpu' offloads the embedding.* the embedding with 'cuda:1'",
        ),
    ],
)
def test_beside_a_gpu_the_cpu_only_stores(settings, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=message):
        fk.load("no/such/model", **settings)


def test_an_embedding_in_memory_takes_inputs_for_layers_on_disk(checkpoint, tmp_path):
    """What the error for an offloaded embedding advises."""
    parts = {"transformer.word_embeddings": "cpu", "transformer.h": "disk", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    offloaded = fk.load(checkpoint, dtype="float32", device_map=parts, offload_folder=tmp_path / "offload")
    expected = fk.load(checkpoint, dtype="float32").generate("The", max_new_tokens=2).tokens
    assert offloaded.generate("The", max_new_tokens=2).tokens == expected


@pytest.mark.parametrize("name", [None, 40, b"falconet", ["falconet"]])
def test_a_name_of_another_type_is_refused(name):
    with pytest.raises(TypeError, match=f"load takes a name, directory or hub id, not a {type(name).__name__}"):
        fk.load(name)


def test_the_run_of_a_tuning_is_answered_with_its_adapter():
    run = SimpleNamespace(adapter="runs/mine/adapter")
    with pytest.raises(TypeError, match=r"not a SimpleNamespace: give its \.adapter"):
        fk.load(run)


@pytest.mark.parametrize(
    ("other", "instead"),
    [
        ("torch_dtype", "give dtype"),
        ("load_in_4bit", "give dtype='nf4'"),
        ("quantization", "give dtype='int8', 'int4', 'nf4' or 'nf4-double'"),
        ("adapter", "give the adapter's folder or hub id as the name, and its base is loaded with it"),
        ("use_auth_token", "give token"),
        ("device", "give device_map"),
        ("trust_remote_code", "no code of a checkpoint is ever run"),
        ("attn_implementation", "call falcon.model.set_attn_implementation after loading"),
        ("devices", "did you mean device_map?"),
        ("dtyp", "did you mean dtype?"),
        ("revison", "did you mean revision?"),
        ("cachedir", "did you mean cache_dir?"),
        ("tokens", "did you mean token?"),
        ("colour", "its arguments are in its documentation"),
        ("other", "its arguments are in its documentation"),
    ],
)
def test_an_argument_that_load_has_not_is_answered_with_what_stands_for_it(other, instead):
    with pytest.raises(TypeError, match=re.escape(f"load has no '{other}': {instead}")):
        fk.load("falconet", **{other: "x"})


def test_pickled_checkpoints_that_the_disk_cannot_take_are_refused_first(tokenizer, tmp_path, monkeypatch):
    directory = legacy(tmp_path / "old", "40b", tokenizer)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(OSError, match=r"writes up to .* MiB of weights to .*, where 1000 B are free"):
        fk.load(directory, offload="disk", offload_folder=tmp_path / "offload")
    assert not (tmp_path / "offload").exists()


@pytest.mark.parametrize("call", [fk.load, fk.serve, fk.playground, "tune", "export_gguf", "merge"])
@pytest.mark.parametrize("pair", [True, False])
def test_who_gives_a_transformers_model_is_told_how_it_becomes_a_falcon(call, pair, tokenizer, tmp_path):
    model = small_model("40b")
    given, folder = (model, tokenizer) if pair else model, tmp_path / "mine"
    calls = {
        "tune": lambda given: fk.tune(given, [{"prompt": "Hi", "completion": "Hello."}]),
        "export_gguf": lambda given: fk.export_gguf(given, tmp_path / "a.gguf"),
        "merge": lambda given: fk.merge(tmp_path, given),
    }
    with pytest.raises((TypeError, ValueError)) as refused:
        calls.get(call, call)(given)
    advice = "model.save_pretrained(folder), tokenizer.save_pretrained(folder), and take fk.load(folder)"
    assert str(refused.value).endswith(f"{type(given).__name__}: {advice}")
    *steps, last = advice.replace(" and take", "").split(", ")
    for step in steps:
        exec(step, {"model": model, "tokenizer": tokenizer, "folder": folder})  # noqa: S102  # the advice itself
    torch.testing.assert_close(logits(eval(last, {"fk": fk, "folder": folder}).model), logits(model))  # noqa: S307
