"""Falcons loaded from GGUF files: the weights, tokenizer and chat format that were exported."""

import json
import os

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, FalconForCausalLM, PreTrainedTokenizerFast

import falcon_kit as fk
from falcon_kit.catalogue.gguf import gguf_file, stored_names
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.generation.control_tokens import encode_text
from falcon_kit.loading.adapters import digest
from falcon_kit.loading.gguf import PRE_TOKENIZER, gguf_tokenizer, grouped, ungrouped
from falcon_kit.loading.packed import PackedLinear
from falcon_kit.serving.gguf import write_gguf
from falcon_kit.serving.gguf_kinds import FILE_TYPES
from tests.catalogue.test_gguf import SHAPES, changed, spec_of
from tests.conftest import logits, small_model
from tests.serving.test_gguf import TEXTS

CHAT = [{"role": "user", "content": "What do owls eat?"}]


def written(folder, model, dtype, tokenizer):
    return write_gguf(model, spec_of(model.config), folder / "small.gguf", dtype, tokenizer)


def with_ggufs_values(path, model):
    """The model with the values that gguf's own reader and `dequantize` give for each tensor."""
    stored = {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in gguf.GGUFReader(path).tensors}
    weights = model.state_dict()
    for ours, theirs in stored_names(spec_of(model.config)).items():
        values = torch.tensor(stored[theirs])
        weights[ours].copy_(grouped(values, spec_of(model.config)) if "query_key_value" in ours else values)
    return model


# Weights


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_gives_the_logits_of_the_exported_model(name, tokenizer, tmp_path):
    layout, changes = SHAPES[name]
    model = small_model(layout, **changes)
    loaded = fk.load(written(tmp_path, model, "f32", tokenizer), dtype="float32")
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(weight, loaded.model.state_dict()[key]) for key, weight in model.state_dict().items())
    assert loaded.spec.to_config() == spec_of(model.config).to_config()


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_every_kind_gives_the_values_that_gguf_dequantises(kind, tokenizer, tmp_path):
    model = small_model("40b", num_hidden_layers=1)
    path = written(tmp_path, model, kind, tokenizer)
    loaded = fk.load(path, dtype="float32").model
    expected = with_ggufs_values(path, model).state_dict()
    assert all(torch.equal(weight, loaded.state_dict()[key]) for key, weight in expected.items())


def test_a_fused_projection_is_regrouped_and_back():
    spec = spec_of(small_model("180b").config)
    fused = torch.arange(10 * 64 * 384.0).view(-1, 384)
    assert torch.equal(grouped(ungrouped(fused, spec), spec), fused)
    queries = ungrouped(fused, spec)[: 6 * 64].view(2, 3 * 64, 384)
    assert torch.equal(queries, fused.view(2, 5 * 64, 384)[:, : 3 * 64])


@pytest.mark.parametrize("dtype", ["int4", "int8", "nf4"])
def test_dequantised_weights_are_quantised_again(dtype, instruct, tmp_path):
    path = fk.export_gguf(instruct, tmp_path / "a.gguf", "q8_0")
    from_file, direct = fk.load(path, dtype=dtype), fk.load("falconet-instruct", dtype=dtype)
    assert (from_file.dtype, from_file.weight_bytes) == (dtype, direct.weight_bytes)
    assert from_file.chat(CHAT).text == direct.chat(CHAT).text
    if dtype == "int4":
        full = fk.load(path, dtype="bfloat16").model.state_dict()
        for name, module in from_file.model.named_modules():
            if isinstance(module, PackedLinear):
                gap = (module.dequantised(torch.float32) - full[f"{name}.weight"]).abs().max()
                assert gap < full[f"{name}.weight"].abs().max() / 5


def test_weights_are_bfloat16_where_float32_is_not_easily_held(instruct, tmp_path, monkeypatch):
    path = fk.export_gguf(instruct, tmp_path / "a.gguf", "q4_k_m")
    monkeypatch.setattr("falcon_kit.loading.load.host_memory", lambda: (2**33, 2**27))
    loaded = fk.load(path)
    assert (loaded.dtype, loaded.dtype_reason) == ("bfloat16", "dequantised from Q4_K, Q8_0, Q5_K, Q6_K")


def test_a_loaded_file_is_named_by_its_path(instruct, tmp_path):
    path = fk.export_gguf(instruct, tmp_path / "a.gguf", "q4_k_m")
    loaded = fk.load(tmp_path)
    assert (loaded.name, loaded.spec.name) == (str(path), "a")
    assert (
        fk.load(loaded.name).generate("Owls", max_new_tokens=8).text == loaded.generate("Owls", max_new_tokens=8).text
    )


def test_a_loaded_file_can_be_exported_and_saved(instruct, tmp_path):
    loaded = fk.load(fk.export_gguf(instruct, tmp_path / "a.gguf", "f32"), dtype="float32")
    again = fk.gguf_file(fk.export_gguf(loaded, tmp_path / "b.gguf", "f32"))
    assert again.config == fk.gguf_file(tmp_path / "a.gguf").config
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(fk.load(tmp_path / "saved", dtype="float32").model), logits(instruct.model))


def test_an_adapter_is_added_to_a_file(instruct, tmp_path):
    path = fk.export_gguf(instruct, tmp_path / "a.gguf", "f32")
    base = fk.load(path, dtype="float32")
    peft = get_peft_model(base.model, LoraConfig(target_modules=["dense"], init_lora_weights=False))
    expected = logits(peft)
    peft.save_pretrained(tmp_path / "adapter")
    loaded = fk.load(tmp_path / "adapter", dtype="float32")
    torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-3, atol=1e-3)
    assert (loaded.spec.fine_tuned_from, fk.spec(tmp_path / "adapter").layers) == ("a", 6)


def test_a_file_knows_which_adapters_are_in_its_weights(instruct, tmp_path):
    adapter = embedded_directory("falconet-instruct")
    loaded = fk.load(fk.export_gguf(instruct, tmp_path / "a.gguf", "f32"), dtype="float32")
    assert loaded.model.config.merged_adapters == [digest(adapter)]
    again = fk.export_gguf(loaded, tmp_path / "b.gguf", "f32")
    with pytest.raises(ValueError, match=r"was made for falconet, not for .*b\.gguf, which has other weights"):
        fk.merge(adapter, again)


# The tokenizer


@pytest.fixture(scope="module")
def restored(instruct, tmp_path_factory):
    return fk.load(fk.export_gguf(instruct, tmp_path_factory.mktemp("gguf") / "a.gguf", "q8_0"))


def test_the_tokenizer_is_the_original_one(restored, tokenizer):
    ours, theirs = (json.loads(each.backend_tokenizer.to_str()) for each in (restored.tokenizer, tokenizer))
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"] == PRE_TOKENIZER
    assert ours["added_tokens"] == theirs["added_tokens"]
    assert ours["model"]["merges"] == theirs["model"]["merges"]
    assert restored.tokenizer.get_vocab() == tokenizer.get_vocab()
    for name in ("bos_token", "eos_token", "pad_token", "model_input_names"):
        assert getattr(restored.tokenizer, name) == getattr(tokenizer, name)


@given(text=st.one_of(st.sampled_from(TEXTS), st.text()))
def test_any_text_is_cut_into_the_same_tokens(restored, tokenizer, text):
    assert encode_text(text, restored.tokenizer) == encode_text(text, tokenizer)
    assert restored.tokenizer.encode(text) == tokenizer.encode(text)
    assert restored.tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.skipif("FALCON_TOKENIZER" not in os.environ, reason="FALCON_TOKENIZER names no published tokenizer")
def test_the_published_tokenizer_is_restored(tmp_path):
    published = PreTrainedTokenizerFast.from_pretrained(os.environ["FALCON_TOKENIZER"])
    path = written(tmp_path, small_model("40b", vocab_size=65024, num_hidden_layers=1), "q8_0", published)
    restored = gguf_tokenizer(gguf_file(path))
    assert [restored.encode(text) for text in TEXTS] == [published.encode(text) for text in TEXTS]
    assert restored.get_vocab() == published.get_vocab()


def test_the_chat_format_and_its_end_are_kept(restored, instruct):
    assert restored.chat_format == instruct.chat_format
    assert restored.tokenizer.chat_template == instruct.tokenizer.chat_template
    assert restored.chat(CHAT).text == instruct.chat(CHAT).text
    assert restored.model.generation_config.eos_token_id == instruct.model.generation_config.eos_token_id


def test_a_template_of_its_own_is_kept(instruct, tmp_path):
    own = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}<assistant>"
    falcon = fk.load("falconet-instruct", chat=fk.ChatFormat("mine", template=own, stop=("<|endoftext|>",)))
    loaded = fk.load(fk.export_gguf(falcon, tmp_path / "a.gguf", "q8_0"))
    assert (loaded.tokenizer.chat_template, loaded.chat_format.template) == (own, own)


def test_tokens_that_no_text_can_name_stay_out_of_the_tokenizer(tokenizer, tmp_path):
    path = written(tmp_path, small_model("40b", vocab_size=2050), "f32", tokenizer)
    restored = gguf_tokenizer(gguf_file(path))
    assert restored.get_vocab() == tokenizer.get_vocab()


# What transformers' own reader makes of such files


@pytest.mark.parametrize("name", ["40b", "180b", "40b with a head of its own", "11b, one LayerNorm"])
def test_transformers_reader_fails_with_grouped_heads(name, tokenizer, tmp_path):
    layout, changes = SHAPES[name]
    written(tmp_path, small_model(layout, **changes), "f32", tokenizer)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        FalconForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf")


def test_transformers_reader_makes_other_tokens_of_numbers(restored, instruct, tmp_path):
    fk.export_gguf(instruct, tmp_path / "a.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    text = "1234567 owls"
    assert restored.tokenizer.encode(text) == instruct.tokenizer.encode(text) != theirs.encode(text)


# Refused


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"tokenizer.ggml.model": "llama"}, "no tokenizer of a Falcon .*model is 'llama'.*export it again"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "no tokenizer of a Falcon .*pre 'llama-bpe'"),
        ({"tokenizer.ggml.add_bos_token": True}, "asks for a token before each text"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "does not have the 2048 tokens of the model"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "has 2048 tokens, and types for 2"),
        ({"tokenizer.ggml.merges": ["no", "pairs"]}, "cannot be used"),
        ({"tokenizer.ggml.merges": ["zzzzz yyyyy"]}, "cannot be used"),
        ({"tokenizer.chat_template": 7}, "its chat template is 7"),
    ],
)
def test_another_tokenizer_is_refused(fields, match, tokenizer, tmp_path):
    path = changed(written(tmp_path, small_model("7b"), "f32", tokenizer), **fields)
    with pytest.raises(ValueError, match=rf"changed.gguf.*{match}"):
        fk.load(path)


def test_a_file_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"small.gguf has no tokenizer of a Falcon \(tokenizer.ggml.model is 'none'"):
        fk.load(written(tmp_path, small_model("7b"), "f32", None))


def test_a_kind_that_cannot_be_dequantised_is_refused_before_loading(tokenizer, tmp_path):
    path = written(tmp_path, small_model("7b"), "f32", tokenizer)
    content = path.read_bytes()
    at = content.index(b"blk.0.attn_norm.bias") + len(b"blk.0.attn_norm.bias") + 4 + 8
    path.write_bytes(content[:at] + (26).to_bytes(4, "little") + content[at + 4 :])  # I32
    with pytest.raises(ValueError, match=r"small.gguf has tensors of the kind I32, which gguf .* cannot"):
        fk.load(path)


def test_the_memory_is_planned_for_the_dequantised_weights(restored):
    with pytest.raises(fk.NotEnoughMemory, match=r"a in bfloat16, .* does not fit into cpu"):
        fk.load(restored.name, dtype="bfloat16", max_memory={"cpu": "1MiB"})
