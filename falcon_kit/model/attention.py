"""How grouped keys are read, and which matmul kernel a single row takes on a CPU.

**Attention.** In decoding, the queries that share a KV head are rows of one attention, so each key is read once.

**Single rows.** Decoding one text multiplies one row with every weight, so it takes as long as reading the weights.
oneDNN, torch's default, is built for many rows; for a single one, torch's own kernel reads 16-bit weights faster on
some CPUs. `faster_without_onednn` measures which is which on the machine at hand.

Shapes: B batch, T time (queries), K time (keys), G KV heads, R query heads per KV head, H = G x R query heads,
D head_dim.
"""

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.falcon import modeling_falcon as stock

from falcon_kit.catalogue.spec import FalconSpec

_MKLDNN: Any = torch.backends.mkldnn  # oneDNN under its old name; torch leaves its properties untyped
_SAMPLE = 128 * 2**20  # bytes of weights to time, or a little more: no CPU's caches keep as much
_ROUNDS = 5
_MARGIN = 0.9  # noise must not switch kernels: the other one has to be a tenth faster


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
    """torch's fused attention, (B, T, H, D). transformers' own repeats keys when compiled, or where there is a mask."""
    batch, heads, time, width = query.shape
    grouped = heads != key.shape[1]
    if time == 1:  # the queries of a group are rows of one attention, which reads each key once
        query = query.view(batch, key.shape[1], -1, width)  # (B, G, R, D)
        if attention_mask is not None and attention_mask.shape[1] == heads:
            attention_mask = attention_mask.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B or 1, G, R, K)
        grouped = False
    elif attention_mask is None:  # a static cache is longer than what it holds
        key, value = key[:, :, :time], value[:, :, :time]
    elif grouped and query.device.type != "cpu":  # elsewhere no fused kernel takes a mask together with groups
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
    """Attention in the open, (B, T, H, D), with its probabilities (B, H, T, K); keys are not repeated here either."""
    (batch, heads, time, width), groups = query.shape, key.shape[1]
    rows = query.reshape(batch, groups, -1, width)  # (B, G, R x T, D)
    scores = (rows @ key.transpose(-1, -2) * scaling).view(batch, heads, time, -1)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    kept = functional.dropout(probabilities, dropout, module.training)
    output = kept.view(batch, groups, -1, kept.shape[-1]) @ value  # (B, G, R x T, D)
    return output.view(batch, heads, time, width).transpose(1, 2), probabilities


ATTENTION = {"sdpa": fused_attention, "eager": eager_attention}
"""Attention by transformers' names; any other, such as flash_attention_2, is transformers' own and takes GQA."""


class _Switch:
    """torch's oneDNN switch, which is the process's, off for as long as anybody wants it off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = True

    def enter(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = _MKLDNN.enabled
                _MKLDNN.enabled = False
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and not _MKLDNN.enabled:  # if somebody else has switched it on meanwhile, it stays on
                _MKLDNN.enabled = self._before


_onednn = _Switch()


@contextmanager
def without_onednn() -> Iterator[None]:
    """torch's own CPU kernels inside. Threads may overlap; what others compute meanwhile is as right, not as fast.

    Nothing happens where `torch.backends.disable_global_flags` has locked the switch.
    """
    if torch.backends.flags_frozen():
        yield
        return
    _onednn.enter()
    try:
        yield
    finally:
        _onednn.leave()


def faster_without_onednn(weights: Sequence[Tensor]) -> bool:
    """Whether torch's own kernel multiplies one row with these weights at least a tenth faster than oneDNN does.

    `weights`: matrices (out, in). Only 16-bit ones on a CPU are looked at, about 128 MiB of them, a tenth of a second;
    False without any. Both kernels take turns, and their medians count.
    """
    sample = _sample(weights)
    if not sample or not _MKLDNN.is_available():
        return False
    with torch.inference_mode():
        rows = [torch.ones(1, weight.shape[1], dtype=weight.dtype) for weight in sample]
        theirs, ours = [], []
        for _ in range(_ROUNDS):
            theirs.append(_seconds(rows, sample))
            with without_onednn():
                ours.append(_seconds(rows, sample))
    return statistics.median(ours) < _MARGIN * statistics.median(theirs)


def _sample(weights: Sequence[Tensor]) -> list[Tensor]:
    """The first of the weights that count, until they are `_SAMPLE` bytes."""
    sample: list[Tensor] = []
    for weight in weights:
        if weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16):
            sample.append(weight)
            if sum(each.nbytes for each in sample) >= _SAMPLE:
                break
    return sample


def _seconds(rows: list[Tensor], weights: list[Tensor]) -> float:
    start = time.perf_counter()
    for row, weight in zip(rows, weights, strict=True):
        functional.linear(row, weight)
    return time.perf_counter() - start


def alibi(spec: FalconSpec, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """What ALiBi (Press et al. 2021) adds to the scores of keys at `positions` (B, K): (B, H, K).

    In bfloat16, like the code that falcon-rw was trained with, and transformers'.
    """
    two = torch.ones(1, 2, dtype=torch.long, device=positions.device)
    slopes = stock.build_alibi_tensor(two, spec.query_heads, torch.bfloat16)[:, :, 1]  # (H, 1), at position 1
    return (slopes[None] * positions[:, None]).to(dtype) * spec.head_dim**-0.5
