"""Errors for masks, caches and positions that do not fit."""

import copy
import re

import pytest
import torch
from transformers import AttentionInterface

from falcon_kit.model.checks import has_tied_head
from tests.conftest import small_model
from tests.model.conftest import (
    IDS,
    greedy,
    pair,
    run,
    same_weights,
)


@pytest.mark.parametrize("offloaded", [["word_embeddings"], ["lm_head"], ["word_embeddings", "lm_head"]])
@pytest.mark.parametrize("unknown", [True, False])
def test_whether_the_head_of_an_offloaded_model_is_tied_is_not_read_from_its_placeholders(offloaded, unknown):
    kit = same_weights(small_model("40b"))
    assert has_tied_head(kit, not unknown) == kit.config.tie_word_embeddings
    for name, module in {"word_embeddings": kit.transformer.word_embeddings, "lm_head": kit.lm_head}.items():
        if name in offloaded:
            module.weight = torch.nn.Parameter(module.weight.to("meta"))
    assert has_tied_head(kit, unknown) == unknown


@pytest.mark.parametrize("asked", ["attention probabilities", "packed documents in more than one row", "ALiBi"])
def test_what_another_attention_function_cannot_do_is_refused(asked):
    AttentionInterface.register("stand_in", lambda *args, **kwargs: None)
    kit = copy.deepcopy(pair("rw" if asked == "ALiBi" else "40b")[1])
    kit.set_attn_implementation("stand_in")
    positions = torch.cat([torch.arange(7), torch.arange(17)])[None] if "packed" in asked else None
    with pytest.raises(ValueError, match=f"stand_in attention has no {asked}: call model.set_attn_implementation"):
        run(kit, position_ids=positions, output_attentions=asked == "attention probabilities")


@pytest.mark.parametrize("layout", ["40b", "180b"])
def test_a_cache_that_transformers_own_falcon_filled_is_refused(layout):
    stock, kit = pair(layout)
    heads = stock.config.num_attention_heads
    with pytest.raises(
        ValueError, match=f"the cache holds {heads} heads of 64 per layer, this model caches 2 KV heads"
    ):
        run(kit, IDS[:, :1], past_key_values=run(stock).past_key_values)


def test_more_positions_than_the_context_are_refused(layout):
    kit = same_weights(small_model(layout, max_position_embeddings=16))
    with pytest.raises(ValueError, match="17 positions are more than the context of 16"):
        run(kit, IDS[:, :17])
    assert run(kit, IDS[:, :16]).logits.shape == (3, 16, 2048)


def test_a_generation_that_would_pass_the_context_is_refused_before_it_starts():
    kit = same_weights(small_model("40b", max_position_embeddings=32))
    with pytest.raises(ValueError, match=r"24 tokens and up to 9 new ones are more than the context of 32.* at most 8"):
        greedy(kit, new=9)
    assert greedy(kit, new=8).shape == (3, 8)


def test_a_generation_from_embeddings_counts_them_towards_the_context():
    kit = same_weights(small_model("40b", max_position_embeddings=32))
    embeds = kit.get_input_embeddings()(IDS)
    with pytest.raises(ValueError, match="24 tokens and up to 9 new ones are more than the context of 32"):
        kit.generate(inputs_embeds=embeds, attention_mask=torch.ones(3, 24), max_new_tokens=9)


def test_scaled_rotary_embeddings_may_go_further():
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    kit = same_weights(small_model("40b", max_position_embeddings=16, rope_parameters=scaled))
    assert run(kit).logits.shape == (3, 24, 2048)


@pytest.mark.parametrize(
    "shape", [(3, 23), (2, 24), (3, 25), (3, 24, 24), (2, 1, 24, 24), (3, 2, 24, 24), (3, 1, 24, 25)]
)
def test_a_mask_of_the_wrong_shape_is_refused(shape):
    message = f"shape {shape}, but 3 rows of 24 tokens after 0 in the cache need (3, 24), or (3, 1, 24, 24)"
    with pytest.raises(ValueError, match=re.escape(message)):
        run(pair("40b")[1], attention_mask=torch.ones(shape))


def test_a_cache_of_another_number_of_rows_is_refused():
    kit = pair("40b")[1]
    with pytest.raises(ValueError, match="the cache holds 3 rows, but 1 are given"):
        run(kit, IDS[:1, :1], past_key_values=run(kit).past_key_values)
