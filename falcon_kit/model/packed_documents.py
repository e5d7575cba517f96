"""Documents that are packed into rows: where they begin, and attention within them without a mask, on GPUs that have
a kernel for it.

A mask has B x T x T values, and torch's fused kernels that take one compute all pairs of tokens and want a key for
every query head. `torch.nn.attention.varlen` computes the pairs within each document, and takes grouped keys.

Shapes: B batch, T time, H query heads, G KV heads, D head_dim.
"""

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils.import_utils import is_tracing


class Documents(NamedTuple):
    """Where documents begin and end; stands in the place of an attention mask."""

    bounds: Tensor
    """The first token of each document in the rows one after another, and B x T: (documents + 1), int32."""
    longest: int
    """Tokens of the longest document."""


def document_numbers(positions: Tensor) -> Tensor | None:
    """The number of each token's document in its row (B, T), for positions (B, T); None if each row is one document.

    A document begins where the positions start again. transformers' `find_packed_sequence_indices` also divides a text
    whose positions have a gap.
    """
    numbers = functional.pad(positions.diff(dim=-1) <= 0, (1, 0)).cumsum(dim=-1)
    if not is_tracing(numbers) and not numbers[:, -1].any():  # what is traced cannot depend on values
        return None
    return numbers


def find_documents(numbers: Tensor) -> Documents:
    """The documents of rows (B, T), in which each token has the number of its document in the row."""
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    bounds = functional.pad(first.flatten().nonzero().flatten(), (0, 1), value=numbers.numel()).to(torch.int32)
    return Documents(bounds, int(bounds.diff().max()))


def has_kernel(hidden_states: Tensor) -> bool:
    """Whether the device has the kernel for hidden states, which is FlashAttention.

    Not in compiled code, where the number of documents would be a shape that depends on values.
    """
    return not torch.compiler.is_compiling() and has_flash_attention(hidden_states) and _kernel() is not None


def has_flash_attention(values: Tensor) -> bool:
    """Whether FlashAttention takes values of this dtype on their device: 16 bits, on CUDA, from Ampere on."""
    in_16_bits = values.dtype in (torch.float16, torch.bfloat16)
    return values.device.type == "cuda" and in_16_bits and _capability(values.device) >= (8, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None) -> Tensor:
    """Causal attention within each document. query (B, H, T, D), key and value (B, G, T, D); returns (B, T, H, D)."""
    rows = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]  # (B x T, H or G, D)
    bounds, longest = documents
    causal = (-1, 0)  # all tokens before, none after
    output: Tensor = _kernel()(
        *rows,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.unflatten(0, (len(query), -1))


@cache
def _kernel() -> Any:
    """torch's function, or None: older ones take no grouped keys."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    taken = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= taken.keys() else None
