"""Attention over grouped KV heads, and the kernel for a single row with the setting behind it."""

import copy
import threading
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

WEIGHTS = [torch.ones(8, 4, dtype=torch.bfloat16)]


def on():
    return torch.backends.mkldnn.enabled


@pytest.mark.parametrize(("own", "faster"), [(1.0, False), (0.95, False), (0.85, True), (2.0, False)])
def test_the_other_kernel_must_be_a_tenth_faster(monkeypatch, own, faster):
    monkeypatch.setattr(attention, "_seconds", lambda rows, weights: 1.0 if on() else own)
    assert attention.faster_without_onednn(WEIGHTS) is faster


def test_both_kernels_are_really_timed():
    assert attention.faster_without_onednn([torch.ones(512, 512, dtype=torch.bfloat16)]) in (True, False)


@pytest.mark.parametrize("weights", [[], [torch.ones(8, 4)], [torch.ones(8, 4, dtype=torch.bfloat16, device="meta")]])
def test_only_16_bit_weights_on_a_cpu_are_looked_at(monkeypatch, weights):
    monkeypatch.setattr(attention, "_seconds", lambda *_: pytest.fail("timed"))
    assert attention.faster_without_onednn(weights) is False


def test_timing_ends_when_the_sample_is_large_enough():
    weights = [torch.empty(2**13, 2**12, dtype=torch.bfloat16)] * 5  # 64 MiB each
    assert len(attention._sample(weights)) == 2


SWITCHES = pytest.mark.parametrize(
    ("off", "is_on"),
    [
        (attention.without_onednn, on),
        (attention.without_cudnn_attention, torch.backends.cuda.cudnn_sdp_enabled),
    ],
    ids=["onednn", "cudnn"],
)


@SWITCHES
def test_a_setting_is_off_inside_and_back_on_afterwards(off, is_on):
    with off():
        inside = is_on()
    assert (inside, is_on()) == (False, True)


@SWITCHES
def test_an_error_inside_switches_it_back_on(off, is_on):
    with pytest.raises(KeyboardInterrupt), off():
        raise KeyboardInterrupt
    assert is_on()


@SWITCHES
def test_threads_may_overlap(off, is_on):
    """Whoever comes first does not switch it on while the other one is inside, and the last one does."""
    entered, leave = threading.Event(), threading.Event()

    def other():
        with off():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with off():
        thread.start()
        entered.wait()
    between = is_on()
    leave.set()
    thread.join()
    assert (between, is_on()) == (False, True)


@pytest.mark.parametrize(
    ("device", "cached", "static", "used"),
    [("cuda", 5, False, True), ("cuda", 0, False, False), ("cuda", 5, True, False), ("cpu", 5, False, False)],
)
def test_cudnn_is_left_out_where_keys_are_cached_on_cuda(device, cached, static, used):
    weight = SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16)
    past = SimpleNamespace(is_compileable=static, get_seq_length=lambda: cached)
    with attention.step_kernels(weight, IDS, past, False):
        assert torch.backends.cuda.cudnn_sdp_enabled() is not used


def test_a_user_who_has_switched_it_off_finds_it_off(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with attention.without_onednn():
        pass
    assert not on()


def test_a_user_who_switches_it_on_meanwhile_finds_it_on():
    torch.backends.mkldnn.enabled = False
    with attention.without_onednn():
        torch.backends.mkldnn.enabled = True
    assert on()


def test_a_locked_switch_is_left_alone(monkeypatch):
    monkeypatch.setattr("torch.backends.flags_frozen", lambda: True)
    with attention.without_onednn():
        assert on()


def test_a_step_of_one_row_computes_without_onednn_when_told_so():
    kit = copy.deepcopy(pair("40b", torch.bfloat16)[1])
    kit.single_rows_without_onednn = True
    seen = []
    kit.lm_head.register_forward_hook(lambda *_: seen.append(torch.backends.mkldnn.enabled))
    run(kit, IDS[:1, :1])
    run(kit, IDS[:2, :1])
    run(kit, None, inputs_embeds=kit.get_input_embeddings()(IDS[:1, :1]))
    assert (seen, torch.backends.mkldnn.enabled) == ([False, True, False], True)


def test_single_rows_give_the_same_logits_by_either_kernel(layout):
    kit = copy.deepcopy(pair(layout, torch.bfloat16)[1])
    expected = run(kit, IDS[:1, :1]).logits.float()
    kit.single_rows_without_onednn = True
    assert_close(run(kit, IDS[:1, :1]).logits.float(), expected, 0.02 * expected.abs().max())


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
        shapes.append((tuple(query.shape[:3]), tuple(key.shape[:3]), kwargs["enable_gqa"]))
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
    monkeypatch.setattr("falcon_kit.model.attention._capability", lambda _: capability)
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
