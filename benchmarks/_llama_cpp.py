"""llama.cpp as a peer: a Falcon's weights as a GGUF file, prefill, and decoding steps over a filled cache.

Needs the extra "bench" (gguf and llama-cpp-python, which pip compiles for the processor it runs on).
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from transformers import FalconForCausalLM

from falcon_kit import FalconSpec


def write_gguf(model: FalconForCausalLM, spec: FalconSpec, path: Path) -> None:
    """The weights of a Falcon in bfloat16, without a tokenizer: llama.cpp is given token ids here."""
    writer = gguf.GGUFWriter(path, "falcon")
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.d_model)
    writer.add_feed_forward_length(spec.feed_forward)
    writer.add_block_count(spec.layers)
    writer.add_head_count(spec.query_heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_layer_norm_eps(model.config.layer_norm_epsilon)
    writer.add_vocab_size(spec.vocabulary)
    writer.add_tokenizer_model("none")
    for name, tensor in _tensors(model, spec):
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: FalconForCausalLM, spec: FalconSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """llama.cpp's name of each weight; the fused projection as all queries, all keys, all values."""
    weights: dict[str, torch.Tensor] = model.state_dict()
    names = {"ln_mlp": "attn_norm", "ln_attn": "attn_norm_2", "input_layernorm": "attn_norm"}
    names |= {"self_attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"}
    yield "token_embd.weight", weights["transformer.word_embeddings.weight"]
    yield from ((f"output_norm.{kind}", weights[f"transformer.ln_f.{kind}"]) for kind in ("weight", "bias"))
    for layer in range(spec.layers):
        prefix = f"transformer.h.{layer}."
        for name in (key for key in weights if key.startswith(prefix)):
            module, _, kind = name.removeprefix(prefix).rpartition(".")
            if module == "self_attention.query_key_value":
                groups = weights[name].view(spec.kv_heads, -1, spec.head_dim, spec.d_model)  # (G, R + 2, D, d_model)
                split = (groups[:, :-2], groups[:, -2], groups[:, -1])
                yield f"blk.{layer}.attn_qkv.{kind}", torch.cat([part.reshape(-1, spec.d_model) for part in split])
            else:
                yield f"blk.{layer}.{names[module]}.{kind}", weights[name]


class LlamaCpp:
    """A GGUF file, loaded; `fill` a cache, then `step` as often as wanted: each step is undone."""

    def __init__(self, path: Path, spec: FalconSpec, threads: int) -> None:
        self._spec, self._threads = spec, threads
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C calls it
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if self._model is None:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self._context: Any = None
        self._batch, self._filled = 0, 0

    def fill(self, batch: int, context: int) -> None:
        """A cache with `context` tokens in each of `batch` rows."""
        self._open(batch, context + 8)
        self._decode([(7, at, 0) for at in range(context)], last_only=True)
        memory = llama_cpp.llama_get_memory(self._context)
        for row in range(1, batch):  # streams of their own, so this copies
            llama_cpp.llama_memory_seq_cp(memory, 0, row, -1, -1)
        self._batch, self._filled = batch, context

    def step(self) -> None:
        """One new token in every row."""
        self._decode([(7, self._filled, row) for row in range(self._batch)])
        memory = llama_cpp.llama_get_memory(self._context)
        for row in range(self._batch):
            llama_cpp.llama_memory_seq_rm(memory, row, self._filled, -1)

    def prefill(self, ids: list[int]) -> np.ndarray:
        """Reads a prompt into an empty cache and returns the logits (V,) after its last token."""
        if self._context is None or self._filled < len(ids):
            self._open(1, len(ids) + 8)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._decode([(token, at, 0) for at, token in enumerate(ids)], last_only=True)
        self._filled = len(ids)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (self._spec.vocabulary,)).copy()

    def close(self) -> None:
        """Frees the cache."""
        if self._context is not None:
            llama_cpp.llama_free(self._context)
            self._context = None

    def _open(self, rows: int, length: int) -> None:
        self.close()
        options = llama_cpp.llama_context_default_params()
        padded = -(-length // 256) * 256  # llama.cpp rounds up to this
        options.n_ctx, options.n_seq_max, options.kv_unified = rows * padded, rows, False
        options.n_batch = options.n_ubatch = max(512, rows)
        options.n_batch = max(options.n_batch, length)
        options.n_threads = options.n_threads_batch = self._threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if self._context is None:
            raise RuntimeError(f"llama.cpp could not make a cache for {rows} rows of {length} tokens")

    def _decode(self, entries: list[tuple[int, int, int]], last_only: bool = False) -> None:
        """Computes (token, position, row) entries; logits for all of them, or the last."""
        with _batch(entries, last_only) as batch:
            if code := llama_cpp.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode returned {code}")


@contextmanager
def _batch(entries: list[tuple[int, int, int]], last_only: bool) -> Iterator[Any]:
    batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
    batch.n_tokens = len(entries)
    for index, (token, position, row) in enumerate(entries):
        batch.token[index], batch.pos[index] = token, position
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
        batch.logits[index] = not last_only or index == len(entries) - 1
    try:
        yield batch
    finally:
        llama_cpp.llama_batch_free(batch)
