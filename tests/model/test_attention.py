"""Attention over grouped KV heads."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from falcon_kit.model import attention
from tests.model.conftest import (
    IDS,
    assert_close,
    eager,
    pair,
    run,
)

# Masks and kernels


@pytest.mark.parametrize("layout", ["7b", "40b", "180b"])
def test_attention_probabilities_equal_eager_attention(layout):
    kit = run(pair(layout)[1], output_attentions=True).attentions
    assert_close(torch.stack(kit), torch.stack(run(eager(layout), output_attentions=True).attentions))


def test_attention_probabilities_with_alibi_follow_the_paper():
    kit = pair("rw")[1]
    embeddings, *_ = run(kit, output_hidden_states=True).hidden_states
    block = kit.transformer.h[0]
    with torch.inference_mode():
        query, key, _ = block.self_attention.project(block.input_layernorm(embeddings), None)
    slopes = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8])[:, None, None]  # Press et al. 2021, section 3, for 4 heads
    place = torch.arange(IDS.shape[1])
    # falcon-rw divides the bias by sqrt(head_dim) together with the scores
    scores = (query @ key.transpose(-1, -2) + slopes * (place[None] - place[:, None])) / 8
    expected = scores.masked_fill(place[None] > place[:, None], -torch.inf).softmax(-1)
    assert_close(run(kit, output_attentions=True).attentions[0], expected)


def test_eager_attention_equals_the_fused_one(layout):
    kit = pair(layout)[1]
    other = copy.deepcopy(kit)
    other.set_attn_implementation("eager")
    assert_close(run(other).logits, run(kit).logits)


def test_a_mask_of_pairs_is_used_as_it_is(layout):
    kit = pair(layout)[1]
    pairs = torch.ones(24, 24).tril().bool()[None, None]
    assert_close(run(kit, attention_mask=pairs).logits, run(kit).logits)
    pairs = pairs & (torch.arange(24) >= 5)  # nobody looks at the first five
    assert_close(
        run(kit, attention_mask=pairs).logits[:, 5:],
        run(kit, IDS[:, 5:], position_ids=torch.arange(5, 24)[None]).logits,
    )


def test_a_mask_per_head_serves_every_row_of_a_step(layout):
    kit = pair(layout)[1]
    heads = kit.config.num_attention_heads
    pairs = torch.rand(1, heads, 1, 24, generator=torch.Generator().manual_seed(3)) < 0.8
    steps = []
    for mask in (pairs, pairs.expand(3, -1, -1, -1)):
        past = run(kit, IDS[:, :-1]).past_key_values
        steps.append(run(kit, IDS[:, -1:], past_key_values=past, attention_mask=mask).logits)
    past = run(kit, IDS[:, :-1]).past_key_values
    open_attention = run(kit, IDS[:, -1:], past_key_values=past, attention_mask=pairs, output_attentions=True).logits
    assert_close(steps[0], steps[1])
    assert_close(steps[0], open_attention)


@pytest.mark.parametrize("layout", ["7b", "40b", "180b"])
def test_no_mask_is_built_where_causal_says_it_all(layout, masks):
    kit, past = pair(layout)[1], DynamicCache()
    run(kit, IDS[:, :-1], past_key_values=past, attention_mask=torch.ones(3, 23))
    assert masks == [(None, True)] * 2
    run(kit, IDS[:, -1:], past_key_values=past, attention_mask=torch.ones(3, 24))
    assert masks[2:] == [(None, False)] * 2


def test_a_step_reads_each_key_once_however_many_queries_share_it(layout, monkeypatch):
    kit, shapes = pair(layout)[1], []

    def watched(query, key, value, **kwargs):
        shapes.append((tuple(query.shape[:3]), tuple(key.shape[:3]), kwargs.get("enable_gqa", False)))
        return scaled_dot_product_attention(query, key, value, **kwargs)

    past = run(kit, IDS[:, :-1]).past_key_values
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    run(kit, IDS[:, -1:], past_key_values=past)
    spec = kit.transformer.spec
    assert set(shapes) == {((3, spec.kv_heads, spec.queries_per_kv_head), (3, spec.kv_heads, 24), False)}


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "masked", "grouped"),
    [
        ("cpu", None, torch.float32, True, True),
        ("cuda", (8, 0), torch.bfloat16, False, True),
        ("cuda", (9, 0), torch.float16, False, True),
        ("cuda", (8, 0), torch.bfloat16, True, False),
        ("cuda", (8, 0), torch.float32, False, False),
        ("cuda", (7, 5), torch.float16, False, False),
        ("mps", None, torch.float16, False, False),
    ],
)
def test_keys_are_repeated_where_no_fused_kernel_takes_groups(kind, capability, dtype, masked, grouped, monkeypatch):
    monkeypatch.setattr("falcon_kit.model.packed_documents._capability", lambda _: capability)
    query = SimpleNamespace(device=torch.device(kind), dtype=dtype)
    assert attention._takes_groups(query, torch.ones(1) if masked else None) == grouped


@pytest.mark.parametrize("kind", ["7b", "40b"])
def test_repeated_keys_give_the_logits_of_grouped_ones(kind, monkeypatch):
    kit = pair(kind)[1]
    expected = run(kit).logits
    monkeypatch.setattr("falcon_kit.model.attention._takes_groups", lambda *_: False)
    assert_close(run(kit).logits, expected)


def test_a_prompt_reads_a_static_cache_only_as_far_as_it_is_filled(layout, monkeypatch):
    lengths = []

    def watched(query, key, value, **kwargs):
        lengths.append(key.shape[2])
        return scaled_dot_product_attention(query, key, value, **kwargs)

    kit = pair(layout)[1]
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    run(kit, past_key_values=StaticCache(kit.config, max_cache_len=500))
    assert lengths == [500 if layout == "rw" else 24] * 2  # ALiBi comes as a mask, which is as long as the cache


def test_other_attention_functions_of_transformers_get_grouped_keys():
    """flash-attention is called like this one; it cannot run here, but what it is handed can be seen."""
    seen = {}

    def stand_in(module, query, key, value, attention_mask, scaling, dropout, **kwargs):
        seen.update(query=query.shape, key=key.shape, scaling=scaling, positions=kwargs["position_ids"].tolist())
        assert module.num_key_value_groups == 2
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2), None

    AttentionInterface.register("stand_in", stand_in)
    AttentionMaskInterface.register("stand_in", sdpa_mask)
    kit = copy.deepcopy(pair("40b")[1])
    kit.set_attn_implementation("stand_in")
    assert_close(run(kit).logits, run(pair("40b")[1]).logits)
    assert seen == {"query": (3, 4, 24, 64), "key": (3, 2, 24, 64), "scaling": 1 / 8, "positions": [list(range(24))]}


def test_a_step_chooses_its_kernels_by_its_tokens_and_its_cache(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "step_kernels", lambda *given: seen.append(given) or nullcontext())
    kit = pair("40b")[1]
    past = kit(IDS, use_cache=True).past_key_values
    kit(IDS[:, :1], past_key_values=past)
    assert seen[1][0] is kit.lm_head.weight
    assert (seen[1][1].numel(), seen[1][2]) == (len(IDS), past)
