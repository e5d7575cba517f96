"""Attention over grouped KV heads: in decoding, the queries that share a KV head become the rows of one attention, so
each key is read once.

Shapes: B batch, T time (queries), K time (keys), G KV heads, R query heads per KV head, H = G x R query heads,
D head_dim.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.torch_version import TorchVersion
from transformers import Cache
from transformers.models.falcon import modeling_falcon as stock

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.model.packed_documents import Documents, has_flash_attention, packed_attention
from falcon_kit.model.products import Switch, fastest_products


def fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Fused attention (`scaled_dot_product_attention`), without repeated keys wherever a kernel allows it.

    attention_mask: a tensor, None, or `Documents`. Returns the output (B, T, H, D) and None. transformers' function
    repeats keys when compiled or given a mask.
    """
    if isinstance(attention_mask, Documents):
        return packed_attention(query, key, value, attention_mask, scaling), None
    if attention_mask is not None:  # a static cache is longer than the slots to read
        key, value = (each.narrow(2, 0, attention_mask.shape[-1]) for each in (key, value))
    attend = _one_token if query.shape[2] == 1 else _several_tokens
    return attend(query, key, value, attention_mask, dropout, scaling).transpose(1, 2), None


def _one_token(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """The output (B, H, 1, D) of one token: the queries of a group become rows of one attention, which reads each key
    once."""
    batch, heads, _, width = query.shape
    rows = query.view(batch, key.shape[1], -1, width)  # (B, G, R, D)
    if mask is not None and mask.shape[1] == heads:
        mask = mask.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B or 1, G, R, K)
    if mask is not None and not dropout and _takes_products(rows):
        output = masked_products(rows, key, value, mask, scaling or width**-0.5)
    else:
        output = functional.scaled_dot_product_attention(
            rows, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    return output.reshape(query.shape)


def _several_tokens(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """The output (B, H, T, D) of several tokens, causal without a mask."""
    heads, time = query.shape[1:3]
    if mask is None:  # a static cache is longer than the keys in it
        key, value = key[:, :, :time], value[:, :, :time]
    if heads != key.shape[1] and not _takes_groups(query, mask):
        key, value = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (key, value))
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=heads != key.shape[1],
    )


def masked_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Masked attention of one token as two products: queries (B, G, R, D), keys and values (B, G, K, D) or slices.

    Returns (B, G, R, D). Scores and probabilities are in float32 until the second product.
    """
    scores = _product(query.flatten(0, 1), key.flatten(0, 1).mT).unflatten(0, query.shape[:2]) * scaling
    return _masked(scores, mask).softmax(dim=-1).to(value.dtype) @ value


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """The scores under a mask: boolean (True: attend), or added."""
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """The product of batches of matrices, in float32."""
    if rows.device.type == "cuda":
        return torch.bmm(rows, columns, out_dtype=torch.float32)
    return rows.float() @ columns.float()


def has_products(version: TorchVersion) -> bool:
    """Whether this torch multiplies 16 bits into float32: `out_dtype` came with 2.8, and 2.9.0 does not compile it."""
    return version >= "2.8" and not "2.9" <= version < "2.9.1"


_HAS_PRODUCTS = has_products(torch.__version__)
_MANY_GROUPS = 32
"""Groups of a batch from which the fused kernel is faster than products."""


def _takes_products(query: Tensor) -> bool:
    """Whether one token's masked attention is computed as products: in 16 bits on CUDA, without gradients, for a few
    groups.

    There, the fused kernel that takes a mask (memory-efficient attention) reads all keys of a group in one thread
    block: for the 7B and one text, one or two of a GPU's hundred processors work. FlashAttention divides the keys among
    blocks, and takes no mask. For one text the products take 0.6 of the fused kernel's time, for 32 texts 1.6 to 1.9
    (eager, H200, the shapes of the 7B and the 40B: `python -m benchmarks gpu`).
    """
    few = query.shape[0] * query.shape[1] < _MANY_GROUPS
    in_16_bits = query.dtype in (torch.float16, torch.bfloat16)
    return few and _HAS_PRODUCTS and query.device.type == "cuda" and in_16_bits and not torch.is_grad_enabled()


def _takes_groups(query: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused kernel of the query's device takes grouped keys; else torch computes the whole matrix of scores.

    On CUDA that is FlashAttention alone, which takes 16 bits and no mask, from Ampere on (aten/src/ATen/native/
    transformers/cuda/sdp_utils.cpp, can_use_mem_efficient_attention and check_flash_attention_hardware_support): the
    scores of the 7B, 71 x 2048 x 2048 in float32, take 1.1 GiB on a T4.
    """
    if query.device.type == "cpu":
        return True
    return mask is None and has_flash_attention(query)


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
    if attention_mask is not None:
        key, value = (each.narrow(2, 0, attention_mask.shape[-1]) for each in (key, value))
    rows = query.reshape(batch, groups, -1, width)  # (B, G, R x T, D)
    scores = (rows @ key.transpose(-1, -2) * scaling).view(batch, heads, time, -1)
    if attention_mask is not None:
        scores = _masked(scores, attention_mask)
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(probabilities, dropout, module.training)
    output = weights.view(batch, groups, -1, weights.shape[-1]) @ value  # (B, G, R x T, D)
    return output.view(batch, heads, time, width).transpose(1, 2), probabilities


ATTENTION = {"sdpa": fused_attention, "eager": eager_attention}
"""The kit's attention functions by transformers' names. Others, such as flash_attention_2, are transformers' own."""


_cudnn_attention = Switch(torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp)


def without_cudnn_attention() -> AbstractContextManager[None]:
    """A context in which scaled_dot_product_attention takes its other kernels, FlashAttention first.

    On Hopper, torch prefers cuDNN, which plans anew for each number of keys. In decoding that is each token: it took 29
    of the 36 ms of a token of the 7B on an H200 (torch 2.11). A prompt needs one plan, and keeps cuDNN.
    """
    return _cudnn_attention.off()


def step_kernels(
    head: Tensor, tokens: Tensor | None, past: Cache | None, single_rows_without_onednn: bool, largest: int
) -> AbstractContextManager[Any]:
    """The context of a step, by the device and dtype of the output head.

    On a CPU, that of `products.fastest_products`. On CUDA, `without_cudnn_attention` where keys are cached. Otherwise
    nothing, as in compiled code.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if head.device.type == "cuda" and past is not None and not past.is_compileable and past.get_seq_length() > 0:
        return without_cudnn_attention()
    if tokens is None or head.device.type != "cpu":
        return nullcontext()
    return fastest_products(tokens.numel(), head, single_rows_without_onednn, largest)


def alibi(spec: FalconSpec, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """The ALiBi bias (Press et al. 2021) on the attention scores of keys at `positions` (B, K): (B, H, K).

    Computed in bfloat16, as in the code that trained falcon-rw and in transformers.
    """
    two = torch.ones(1, 2, dtype=torch.long, device=positions.device)
    slopes = stock.build_alibi_tensor(two, spec.query_heads, torch.bfloat16)[:, :, 1]  # (H, 1): the bias of position 1
    return (slopes[None] * positions[:, None]).to(dtype) * spec.head_dim**-0.5
