"""The faults of transformers' Falcon that the kit fixes.

When one of these tests fails, transformers has fixed the fault and the kit's own fix can go.
"""

import pytest
import torch
from transformers import FalconConfig
from transformers import FalconForCausalLM as StockFalcon

from falcon_kit.model.modeling import FalconForCausalLM
from tests.model.conftest import (
    IDS,
    assert_close,
    assert_documents_stay_apart,
    eager,
    greedy,
    pair,
    run,
)


@pytest.mark.parametrize(("layout", "factor"), [("40b", 2), ("180b", 3)])
def test_fault_transformers_caches_a_copy_of_each_key_for_every_query_head(layout, factor):
    stock, kit = (run(model).past_key_values.layers[0].keys.nbytes for model in pair(layout))
    assert stock == factor * kit


def test_fault_packed_documents_see_each_other_in_transformers(layout):
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_documents_stay_apart(pair(layout)[0], IDS[:1], [10, 14])


def test_fault_transformers_always_builds_a_mask(masks):
    run(pair("40b")[0])
    assert all(mask is not None for mask, _ in masks)


def test_fault_quantisers_pass_over_the_linear_layers_of_transformers(tmp_path):
    from transformers import BitsAndBytesConfig

    pair("40b")[0].save_pretrained(tmp_path)
    quantised = []
    for kind in (StockFalcon, FalconForCausalLM):
        model = kind.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
        quantised.append(sum(type(module).__name__ == "Linear4bit" for module in model.modules()))
    assert quantised == [0, 8]


def test_fault_attention_probabilities_beside_fused_attention_look_into_the_future():
    future = torch.ones(24, 24).triu(1).bool()
    stock, kit = (run(model, output_attentions=True).attentions[0][..., future].max() for model in pair("40b"))
    assert (stock > 0.01, kit) == (True, 0)


def test_fault_eager_attention_of_transformers_adds_alibi_twice():
    stock, kit = pair("rw")
    error = (run(eager("rw")).logits - run(stock).logits).abs().max()
    assert error > 0.1
    assert_close(run(kit).logits, run(stock).logits)


def test_fault_alibi_and_a_static_cache_do_not_go_together_in_transformers():
    stock, kit = pair("rw")
    with pytest.raises((RuntimeError, ValueError), match=r"must match the size|too many values"):
        greedy(stock, new=4, cache_implementation="static")
    assert greedy(kit, new=4, cache_implementation="static").shape == (3, 4)


def test_fault_transformers_has_no_tensor_parallel_plan_for_falcon():
    assert (StockFalcon._tp_plan or {}, FalconConfig.base_model_tp_plan or {}) == ({}, {})
