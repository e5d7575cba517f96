"""Compiled decoding: the same text, nothing compiled twice, and an error where transformers would not compile."""

import pytest
import torch
from transformers import CompileConfig

import falcon_kit as fk
from falcon_kit.loading.compiling import compiled


@pytest.fixture(scope="module")
def falcon():
    """Falconet decoding compiled, traced in full; without inductor, which takes a minute on two cores."""
    options = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    options._compile_all_devices = True  # transformers compiles on a CPU only when told so
    return fk.load("falconet", compile=options)


def test_compiled_decoding_writes_the_same_text(falcon):
    expected = fk.load("falconet").generate(fk.CARD.prompt, max_new_tokens=30, do_sample=False)
    assert falcon.generate(fk.CARD.prompt, max_new_tokens=30, do_sample=False).tokens == expected.tokens


def test_compiled_decoding_compiles_nothing_more_for_a_longer_text(falcon):
    torch._dynamo.utils.counters.clear()
    falcon.generate("The", max_new_tokens=5, do_sample=False)
    falcon.generate(fk.CARD.prompt, max_new_tokens=40, do_sample=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_compiled_decoding_leaves_other_modes_and_saved_checkpoints_alone(falcon, tmp_path):
    expected = fk.load("falconet").generate(fk.CARD.prompt, max_new_tokens=10, num_beams=2, do_sample=False)
    assert falcon.generate(fk.CARD.prompt, max_new_tokens=10, num_beams=2, do_sample=False).text == expected.text
    falcon.model.save_pretrained(tmp_path)
    assert "static" not in (tmp_path / "generation_config.json").read_text()


@pytest.mark.parametrize("given", ["static", {"mode": "default"}, 1])
def test_compile_takes_a_switch_or_a_config_and_nothing_else(given):
    with pytest.raises(ValueError, match="is neither True, False nor a transformers"):
        fk.load("no/such/model", compile=given)


def test_compile_without_a_gpu_is_refused_before_anything_is_loaded():
    if torch.cuda.is_available():
        pytest.skip("this rule is for machines without a GPU")
    for given in (True, CompileConfig()):
        with pytest.raises(ValueError, match="is for GPUs, and torch finds none here"):
            fk.load("no/such/model", compile=given)


def compiling_anywhere():
    options = CompileConfig()
    options._compile_all_devices = True
    return options


@pytest.mark.parametrize("settings", [{"dtype": "int8"}, {"device_map": {"transformer": "cpu", "lm_head": "disk"}}])
def test_what_transformers_would_not_compile_is_refused_before_its_weights_are_read(settings, checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"not even looked at")
    with pytest.raises(ValueError, match=r"compile with .*not compiled: leave"):
        fk.load(checkpoint, compile=compiling_anywhere(), **settings)


@pytest.mark.parametrize(("places", "whole"), [({"": 0}, True), ({"a": 0, "b": 1}, False)])
def test_a_model_on_several_devices_is_compiled_in_pieces(places, whole, instruct, monkeypatch):
    monkeypatch.setattr(instruct.model, "hf_device_map", places, raising=False)
    monkeypatch.setattr("falcon_kit.loading.compiling._warm_up", lambda *_: None)
    decoding = compiled(instruct.model, "bfloat16", CompileConfig(fullgraph=True), True)
    assert decoding["compile_config"].fullgraph == whole
