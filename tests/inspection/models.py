"""Small models with random weights, which tests leave unchanged."""

from functools import cache

import numpy as np
import torch
from transformers import FalconForCausalLM as StockFalcon

from falcon_kit.model.modeling import FalconForCausalLM
from tests.conftest import small_config, small_model


@cache
def model(layout: str, kind: type = FalconForCausalLM) -> StockFalcon:
    """The kit's or transformers' model of a layout. Its weights are spread so that attention is far from uniform."""
    found = kind(small_config(layout)).eval()
    found.load_state_dict(small_model(layout).state_dict())
    return found


def logits(model: StockFalcon, ids) -> np.ndarray:
    """The logits (T, V) after each token."""
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
