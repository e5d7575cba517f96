"""Attention over grouped KV heads, and the choice of the matmul kernel for a single row on a CPU.

**Attention.** In decoding, the queries that share a KV head become the rows of one attention, so each key is read once.

**Single rows.** A decoding step of one text multiplies one row by every weight matrix, so reading the weights limits
its speed. oneDNN, torch's default on CPUs, is optimised for many rows. On some CPUs torch's own kernel reads 16-bit
weights faster for a single row. `faster_without_onednn` measures both kernels.

Shapes: B batch, T time (queries), K time (keys), G KV heads, R query heads per KV head, H = G x R query heads,
D head_dim.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache
from transformers.models.falcon import modeling_falcon as stock

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.model.packed import Documents, packed_attention

_MKLDNN: Any = torch.backends.mkldnn  # the old name of oneDNN; torch does not type its properties
_SAMPLE = 128 * 2**20  # bytes of weights to time: more than the caches of a CPU hold
_ROUNDS = 5
_MARGIN = 0.9  # torch's own kernel must be 10% faster, so that noise does not change the choice


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
    batch, heads, time, width = query.shape
    grouped = heads != key.shape[1]
    if attention_mask is not None:  # a static cache is longer than the slots to read
        key, value = (each.narrow(2, 0, attention_mask.shape[-1]) for each in (key, value))
    if time == 1:  # the queries of a group become rows of one attention, which reads each key once
        query = query.view(batch, key.shape[1], -1, width)  # (B, G, R, D)
        if attention_mask is not None and attention_mask.shape[1] == heads:
            attention_mask = attention_mask.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B or 1, G, R, K)
        grouped = False
        if attention_mask is not None and not dropout and _takes_products(query):
            output = masked_products(query, key, value, attention_mask, scaling or width**-0.5)
            return output.reshape(batch, heads, time, width).transpose(1, 2), None
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


def _takes_products(query: Tensor) -> bool:
    """Whether one token's masked attention is computed as products: in 16 bits on CUDA, without gradients.

    There, the fused kernel that takes a mask (memory-efficient attention) reads all keys of a group in one thread
    block: for the 7B and one text, one or two of a GPU's hundred processors work. FlashAttention divides the keys among
    blocks, and takes no mask.
    """
    in_16_bits = query.dtype in (torch.float16, torch.bfloat16)
    return query.device.type == "cuda" and in_16_bits and not torch.is_grad_enabled()


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


class _Switch:
    """Turns a setting of the whole process off until the last of several users has left."""

    def __init__(self, read: Callable[[], bool], write: Callable[[bool], None]) -> None:
        self._read, self._write = read, write
        self._lock = threading.Lock()
        self._users = 0
        self._before = True

    def enter(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = self._read()
                self._write(False)
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and not self._read():  # other code may have turned it on: then it stays on
                self._write(self._before)

    @contextmanager
    def off(self) -> Iterator[None]:
        """A context with the setting off. Several threads may enter it at once."""
        self.enter()
        try:
            yield
        finally:
            self.leave()


def _set_onednn(enabled: bool) -> None:
    _MKLDNN.enabled = enabled


_onednn = _Switch(lambda: bool(_MKLDNN.enabled), _set_onednn)
_cudnn_attention = _Switch(torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp)


def without_onednn() -> AbstractContextManager[None]:
    """A context in which torch uses its own CPU kernels instead of oneDNN. Several threads may enter it at once.

    The setting also affects other threads: their results stay correct, but may take longer. The context has no effect
    after `torch.backends.disable_global_flags`, which locks the setting.
    """
    return nullcontext() if torch.backends.flags_frozen() else _onednn.off()


def without_cudnn_attention() -> AbstractContextManager[None]:
    """A context in which scaled_dot_product_attention takes its other kernels, FlashAttention first.

    On Hopper, torch prefers cuDNN, which plans anew for each number of keys. In decoding that is each token: it took 29
    of the 36 ms of a token of the 7B on an H200 (torch 2.11). A prompt needs one plan, and keeps cuDNN.
    """
    return _cudnn_attention.off()


def step_kernels(
    weight: Tensor, tokens: Tensor | None, past: Cache | None, without: bool
) -> AbstractContextManager[None]:
    """The context of a step, by the device and dtype of a weight.

    On a CPU, `without_onednn` for one token in 16 bits, if `without`. On CUDA, `without_cudnn_attention` where keys are
    cached. Otherwise nothing, as in compiled code.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if weight.device.type == "cuda" and past is not None and not past.is_compileable and past.get_seq_length() > 0:
        return without_cudnn_attention()
    one = tokens is not None and tokens.numel() == 1
    on_cpu = weight.device.type == "cpu" and weight.dtype.itemsize == 2
    return without_onednn() if without and one and on_cpu else nullcontext()


def faster_without_onednn(weights: Sequence[Tensor]) -> bool:
    """Whether torch's own kernel multiplies one row by these weights at least 10% faster than oneDNN.

    `weights`: matrices (out, in). Only 16-bit weights on a CPU are timed, about 128 MiB of them, in about 0.1 seconds;
    without any, returns False. The kernels alternate, and their median times are compared.
    """
    sample = _sample(weights)
    if not sample or not _MKLDNN.is_available():
        return False
    with torch.inference_mode():
        rows = [torch.ones(1, weight.shape[1], dtype=weight.dtype) for weight in sample]
        onednn, own = [], []
        for _ in range(_ROUNDS):
            onednn.append(_seconds(rows, sample))
            with without_onednn():
                own.append(_seconds(rows, sample))
    return statistics.median(own) < _MARGIN * statistics.median(onednn)


def _sample(weights: Sequence[Tensor]) -> list[Tensor]:
    """The first 16-bit weights on a CPU, up to about `_SAMPLE` bytes."""
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
    """The ALiBi bias (Press et al. 2021) on the attention scores of keys at `positions` (B, K): (B, H, K).

    Computed in bfloat16, as in the code that trained falcon-rw and in transformers.
    """
    two = torch.ones(1, 2, dtype=torch.long, device=positions.device)
    slopes = stock.build_alibi_tensor(two, spec.query_heads, torch.bfloat16)[:, :, 1]  # (H, 1): the bias of position 1
    return (slopes[None] * positions[:, None]).to(dtype) * spec.head_dim**-0.5
