"""What other libraries and users do to a model: longer contexts, prefix tuning, another attention, padding, dtypes."""

import copy

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model

import falcon_kit as fk
from tests.conftest import LAYOUTS, small_model
from tests.model.conftest import IDS, assert_close, pair, run, same_weights

SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", SCALED)
def test_every_function_takes_the_longer_context_of_a_scaled_model(kind, tokenizer, tmp_path):
    small_model("40b", max_position_embeddings=32, rope_parameters=SCALED[kind]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    falcon = fk.load(tmp_path, dtype="float32")
    ids = IDS.flatten().tolist()  # 72 tokens

    assert falcon.spec.context == falcon.plan.context == 128
    assert len(falcon.generate(ids, max_new_tokens=56, min_new_tokens=56).tokens) == 56
    assert fk.lens(falcon, ids).top_ids.shape[0] == 72
    assert len(fk.attention(falcon, ids).ids) == 72
    assert fk.plan(tmp_path, context=128).context == 128
    conversation = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello there."}]
    assert fk.pack(fk.dialogues([{"messages": conversation}]), falcon).context == 128
    with pytest.raises(ValueError, match="the text has 129 tokens, the model's context is 128"):
        fk.lens(falcon, [5] * 129)
    with pytest.raises(ValueError, match=f"rotary positions are scaled \\({kind}\\)"):
        fk.export_gguf(falcon, tmp_path / "falcon.gguf")


def test_the_context_is_that_of_the_live_config(tokenizer, tmp_path):
    small_model("40b", max_position_embeddings=32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    falcon = fk.load(tmp_path, dtype="float32")
    falcon.model.config.max_position_embeddings = 128
    ids = IDS.flatten().tolist()
    assert falcon.generate(ids, max_new_tokens=1).tokens
    assert len(fk.lens(falcon, ids).ids) == 72
    assert len(fk.attention(falcon, ids).ids) == 72


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefix_tuning_runs_with_its_defaults_and_config_json_is_transformers_own(layout, tmp_path):
    stock = small_model(layout)
    kit = same_weights(stock)
    again = type(kit)(copy.deepcopy(kit.config))
    for name, model in {"stock": stock, "kit": kit, "again": again}.items():
        model.save_pretrained(tmp_path / name)
    written = {(tmp_path / name / "config.json").read_bytes() for name in ("stock", "kit", "again")}
    assert len(written) == 1
    assert kit.config.num_key_value_heads == kit.transformer.spec.kv_heads

    tuned = get_peft_model(kit, PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    assert tuned(IDS).logits.shape == (3, 24, 2048)


def test_the_attention_can_be_set_after_transformers_own_was(monkeypatch):
    stock, kit = (copy.deepcopy(each) for each in pair("40b"))
    stock_class = type(stock).__mro__[1]
    monkeypatch.setattr(stock_class, "_can_set_attn_implementation_cached_value", False, raising=False)
    stock.set_attn_implementation("eager")
    kit.set_attn_implementation("eager")
    assert kit.config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_with_alibi_is_computed_as_in_transformers(dtype):
    stock, kit = pair("rw", dtype)
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    assert_close(run(kit, attention_mask=mask).logits, run(stock, attention_mask=mask).logits)


def test_padding_with_alibi_has_the_gradients_of_unfused_attention():
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    labels = IDS.masked_fill(mask == 0, -100)  # the first label is predicted by padding
    gradients = []
    for attention in ("sdpa", "eager"):
        kit = same_weights(small_model("rw"))
        kit.set_attn_implementation(attention)
        kit(IDS, attention_mask=mask, labels=labels).loss.backward()
        gradients.append(torch.cat([each.grad.flatten() for each in kit.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rotary_frequencies_stay_exact_in_another_dtype(dtype):
    kit = same_weights(small_model("40b"))
    exact = kit.transformer.rotary_emb.inv_freq.clone()
    assert torch.equal(kit.to(dtype).transformer.rotary_emb.inv_freq, exact)
    assert kit.dtype == dtype
