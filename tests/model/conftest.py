"""transformers' Falcon and the kit's with the same weights, and what the tests of the model do with them."""

import copy
from functools import cache

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import FalconForCausalLM as StockFalcon

from falcon_kit.model.modeling import FalconForCausalLM
from tests.conftest import small_config, small_model

IDS = torch.randint(3, 2048, (3, 24), generator=torch.Generator().manual_seed(1))
"""Three rows of 24 tokens (B, T)."""


@cache
def pair(layout: str, dtype: torch.dtype = torch.float32) -> tuple[StockFalcon, FalconForCausalLM]:
    """transformers' model and the kit's with the same weights; shared by tests, so they must leave them as they are."""
    stock = small_model(layout).to(dtype)
    return stock, same_weights(stock)


def same_weights(stock: StockFalcon) -> FalconForCausalLM:
    kit = FalconForCausalLM(copy.deepcopy(stock.config)).to(stock.dtype).eval()
    kit.load_state_dict(stock.state_dict())
    return kit


def eager(layout: str) -> StockFalcon:
    """transformers' model with its attention written out, the only one whose probabilities are right."""
    model = StockFalcon._from_config(small_config(layout), attn_implementation="eager").eval()
    model.load_state_dict(small_model(layout).state_dict())
    return model


def run(model, ids=IDS, **arguments):
    with torch.inference_mode():
        return model(ids, **arguments)


def greedy(model, ids=IDS, new=64, **arguments):
    """The new tokens (B, `new`) of a greedy generation that no end token cuts short."""
    arguments = {"attention_mask": torch.ones_like(ids), "pad_token_id": 11, **arguments}
    return model.generate(ids, do_sample=False, max_new_tokens=new, min_new_tokens=new, **arguments)[:, ids.shape[1] :]


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def assert_documents_stay_apart(model, ids, lengths, **arguments):
    """Logits of documents packed into one row equal those of each document by itself."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = run(model, ids, position_ids=positions, **arguments).logits
    alone = torch.cat([run(model, document).logits for document in ids.split(lengths, dim=1)], dim=1)
    assert_close(packed, alone)


@pytest.fixture
def masks(monkeypatch):
    """What each call of torch's fused attention got: (mask, is_causal)."""
    seen = []

    def watched(*args, **kwargs):
        seen.append((kwargs["attn_mask"], kwargs.get("is_causal", False)))
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    return seen
