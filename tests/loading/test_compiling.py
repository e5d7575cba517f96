"""Compiled decoding: the same text, nothing compiled twice, and an error where transformers would not compile."""

import functools

import pytest
import torch
from transformers import CompileConfig, StaticCache

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.loading.compiling import check_compilable, compiled
from falcon_kit.model.modeling import FalconForCausalLM
from falcon_kit.model.static_cache import slots_read
from tests.conftest import small_model


def aot_eager():
    options = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    options._compile_all_devices = True  # transformers compiles on a CPU only when told so
    return options


@pytest.fixture(scope="module")
def falcon():
    """Falconet decoding compiled, traced in full; without inductor, which takes a minute on two cores."""
    return fk.load("falconet", compile=aot_eager())


def test_compiled_decoding_writes_the_same_text(falcon):
    expected = fk.load("falconet").generate(fk.CARD.prompt, max_new_tokens=30, do_sample=False)
    assert falcon.generate(fk.CARD.prompt, max_new_tokens=30, do_sample=False).tokens == expected.tokens


def test_a_checkpoint_with_several_end_tokens_is_compiled(tokenizer, tmp_path):
    model = small_model("40b", max_position_embeddings=128)
    model.generation_config.eos_token_id = [11, 900]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    falcon = fk.load(tmp_path, compile=aot_eager())
    assert falcon.generate("The", max_new_tokens=3).tokens == fk.load(tmp_path).generate("The", max_new_tokens=3).tokens


def test_an_ablation_affects_compiled_decoding_too(falcon):
    """torch.compile does not notice a hook that was added after the compilation."""
    texts = []
    for each in (falcon, fk.load("falconet")):
        with fk.ablated(each, kv_heads=[(layer, 0) for layer in range(each.spec.layers)]):
            texts.append(each.generate(fk.CARD.prompt, max_new_tokens=20, do_sample=False).tokens)
    assert texts[0] == texts[1]


def test_compiled_decoding_compiles_nothing_more_for_a_longer_text(falcon):
    torch._dynamo.utils.counters.clear()
    falcon.generate("The", max_new_tokens=5, do_sample=False)
    falcon.generate(fk.CARD.prompt, max_new_tokens=40, do_sample=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_compiled_decoding_compiles_nothing_more_after_a_model_of_another_class(falcon):
    class Another(FalconForCausalLM):
        pass

    Another(small_model("40b").config)
    torch._dynamo.utils.counters.clear()
    falcon.generate("The", max_new_tokens=5, do_sample=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("field", ["hidden_states", "attentions"])
def test_a_compiled_step_returns_what_is_asked_for(field):
    """Also if it is asked for the first time, when transformers has put no hooks into the model yet."""
    models, ids = [fk.load("falconet").model for _ in range(2)], torch.arange(20, 30)[None]
    for each in models:
        each.set_attn_implementation("eager")  # which alone has attentions
    with torch.no_grad():
        found = torch.compile(models[0], backend="aot_eager")(ids, **{f"output_{field}": True})[field]
        expected = models[1](ids, **{f"output_{field}": True})[field]
    assert len(found) >= models[0].config.num_hidden_layers
    torch.testing.assert_close(found, expected)


def test_the_warm_up_decodes_with_each_number_of_slots(falcon, monkeypatch):
    """CUDA graphs are recorded for each; before torch 2.13, threads of others cannot record (pytorch#123177)."""
    read, prepare = set(), FalconForCausalLM.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def prepared(model, *given, **options):
        inputs = prepare(model, *given, **options)
        if not options.get("is_first_iteration"):
            read.add(inputs["attention_mask"].shape[-1])
        return inputs

    monkeypatch.setattr(FalconForCausalLM, "prepare_inputs_for_generation", prepared)
    compiled(falcon.model, "float32", aot_eager())
    context = falcon.spec.context
    assert read == {slots_read(length, context + 1) for length in range(1, context + 1)}
    assert len(read) > 1


def test_the_cache_of_compiled_decoding_is_kept_and_emptied(falcon, monkeypatch):
    """A CUDA graph is of one cache: another would have to be recorded for each call."""
    expected = falcon.generate("The", max_new_tokens=5, do_sample=False).tokens
    made = []
    monkeypatch.setattr(
        "falcon_kit.generation.kept_cache.StaticCache", lambda **given: made.append(1) or StaticCache(**given)
    )
    falcon.generate(fk.CARD.prompt, max_new_tokens=30, do_sample=False)
    assert falcon.generate("The", max_new_tokens=5, do_sample=False).tokens == expected
    assert made == []


def test_two_streams_at_once_have_a_cache_each(falcon):
    prompts = ("The", fk.CARD.prompt)
    expected = [falcon.generate(each, max_new_tokens=8, do_sample=False).tokens for each in prompts]
    streams = [falcon.stream(each, max_new_tokens=8, do_sample=False) for each in prompts]
    pieces = list(zip(*streams, strict=True))
    assert [tuple(piece.token_id for piece in each) for each in zip(*pieces, strict=True)] == expected


def test_a_model_merged_from_a_compiled_one_decodes_with_its_own_weights(falcon):
    expected = fk.load("falconet-instruct").generate(fk.CARD.prompt, max_new_tokens=12, do_sample=False)
    falcon.generate("The", max_new_tokens=2, do_sample=False)
    merged = fk.merge(embedded_directory("falconet-instruct"), falcon)
    assert merged.generate(fk.CARD.prompt, max_new_tokens=12, do_sample=False).tokens == expected.tokens


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


def test_compile_on_the_cpu_of_a_machine_with_a_gpu_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ValueError, match="compile with device_map='cpu': transformers compiles on GPUs only"):
        fk.load(checkpoint, compile=True, device_map="cpu", dtype="float32")


def test_a_model_on_several_devices_is_not_compiled():
    with pytest.raises(ValueError, match=r"compile with layers on 2 devices: .* leave compile out"):
        check_compilable("bfloat16", {"transformer": 0, "lm_head": 1})
    check_compilable("bfloat16", {"": 0})
