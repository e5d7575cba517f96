"""Attention over grouped KV heads: in decoding, the queries that share a KV head become the rows of one attention, so
each key is read once.

Shapes: B batch, T time (queries), K time (keys), G KV heads, R query heads per KV head, H = G x R query heads,
D head_dim.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.falcon import modeling_falcon as stock

from falcon_kit.catalogue.spec import FalconSpec


def fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Fused attention (`scaled_dot_product_attention`), without repeated keys wherever a kernel allows it.

    Returns the output (B, T, H, D) and None. transformers' function repeats keys when compiled or given a mask.
    """
    batch, heads, time, width = query.shape
    grouped = heads != key.shape[1]
    if time == 1:  # the queries of a group become rows of one attention, which reads each key once
        query = query.view(batch, key.shape[1], -1, width)  # (B, G, R, D)
        if attention_mask is not None and attention_mask.shape[1] == heads:
            attention_mask = attention_mask.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B or 1, G, R, K)
        grouped = False
    elif attention_mask is None:  # a static cache is longer than the keys in it
        key, value = key[:, :, :time], value[:, :, :time]
    if grouped and not _takes_groups(query, attention_mask):
        key, value = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (key, value))
        grouped = False
    output = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=attention_mask is None and time > 1,
        scale=scaling,
        enable_gqa=grouped,
    )
    return output.reshape(batch, heads, time, width).transpose(1, 2), None


def _takes_groups(query: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused kernel of the query's device takes grouped keys; else torch computes the whole matrix of scores.

    On CUDA that is FlashAttention alone, which takes 16 bits and no mask, from Ampere on (aten/src/ATen/native/
    transformers/cuda/sdp_utils.cpp, can_use_mem_efficient_attention and check_flash_attention_hardware_support): the
    scores of the 7B, 71 x 2048 x 2048 in float32, take 1.1 GiB on a T4.
    """
    if query.device.type == "cpu":
        return True
    in_16_bits = query.dtype in (torch.float16, torch.bfloat16)
    return query.device.type == "cuda" and mask is None and in_16_bits and _capability(query.device) >= (8, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Unfused attention that also returns the probabilities. Keys are not repeated.

    Returns the output (B, T, H, D) and the attention probabilities (B, H, T, K).
    """
    (batch, heads, time, width), groups = query.shape, key.shape[1]
    rows = query.reshape(batch, groups, -1, width)  # (B, G, R x T, D)
    scores = (rows @ key.transpose(-1, -2) * scaling).view(batch, heads, time, -1)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(probabilities, dropout, module.training)
    output = weights.view(batch, groups, -1, weights.shape[-1]) @ value  # (B, G, R x T, D)
    return output.view(batch, heads, time, width).transpose(1, 2), probabilities


ATTENTION = {"sdpa": fused_attention, "eager": eager_attention}
"""The kit's attention functions by transformers' names. Others, such as flash_attention_2, are transformers' own."""


def alibi(spec: FalconSpec, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """The ALiBi bias (Press et al. 2021) on the attention scores of keys at `positions` (B, K): (B, H, K).

    Computed in bfloat16, as in the code that trained falcon-rw and in transformers.
    """
    two = torch.ones(1, 2, dtype=torch.long, device=positions.device)
    slopes = stock.build_alibi_tensor(two, spec.query_heads, torch.bfloat16)[:, :, 1]  # (H, 1): the bias of position 1
    return (slopes[None] * positions[:, None]).to(dtype) * spec.head_dim**-0.5
