"""llama.cpp for comparison: prefill, and decoding steps with a filled KV cache.

Needs the extra "bench" (llama-cpp-python, which pip compiles for this processor).
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from falcon_kit import FalconSpec


class LlamaCpp:
    """A loaded GGUF file. After `fill`, `step` can be called any number of times: it removes its token again."""

    def __init__(self, path: Path, spec: FalconSpec, threads: int) -> None:
        self._spec, self._threads = spec, threads
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)  # C code keeps a pointer to it
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if self._model is None:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self._context: Any = None
        self._batch, self._filled = 0, 0

    def fill(self, batch: int, context: int) -> None:
        """Fills a KV cache with `context` tokens in each of `batch` rows."""
        self._open(batch, context + 8)
        self._decode([(7, at, 0) for at in range(context)], last_only=True)
        memory = llama_cpp.llama_get_memory(self._context)
        for row in range(1, batch):  # each row is a stream, so this copies the data
            llama_cpp.llama_memory_seq_cp(memory, 0, row, -1, -1)
        self._batch, self._filled = batch, context

    def step(self) -> None:
        """Computes one new token in every row."""
        self._decode([(7, self._filled, row) for row in range(self._batch)])
        memory = llama_cpp.llama_get_memory(self._context)
        for row in range(self._batch):
            llama_cpp.llama_memory_seq_rm(memory, row, self._filled, -1)

    def prefill(self, ids: list[int]) -> np.ndarray:
        """Computes a prompt with an empty cache and returns the logits (V,) after its last token."""
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
            raise RuntimeError(f"llama.cpp could not allocate a cache for {rows} rows of {length} tokens")

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
