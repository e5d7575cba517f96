"""llama.cpp for comparison, by the server in the package xllamacpp, which is ready built: prefill, and decoding steps.

Its kernels are chosen when it starts, among all of this processor's instructions.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xllamacpp

TOKENS = 16
"""Tokens of a `step`: a request costs about a millisecond beside its tokens."""


class LlamaCppServer:
    """A GGUF file with a tokenizer. `fill` starts a server with a slot for each row, and reads a prompt into each."""

    tokens_per_step = TOKENS

    def __init__(self, path: Path, threads: int) -> None:
        self._path, self._threads = path, threads
        self._server: Any = None
        self._batch, self._ids = 0, [7]

    def fill(self, batch: int, context: int) -> None:
        """Fills a KV cache with `context` tokens in each of `batch` rows."""
        self._start(batch, context + 256)
        self._batch, self._ids = batch, [7] * context
        self.step()

    def step(self) -> None:
        """Computes `TOKENS` new tokens in every row, each row as a request of its own. The cached prompt stays."""
        settings = {"prompt": self._ids, "n_predict": TOKENS, "cache_prompt": True, "ignore_eos": True}
        with ThreadPoolExecutor(self._batch) as requests:
            list(requests.map(lambda row: self._complete(settings | {"id_slot": row}), range(self._batch)))

    def prefill(self, ids: list[int]) -> None:
        """Computes a prompt with an empty cache, and one token."""
        self._complete({"prompt": ids, "n_predict": 1, "cache_prompt": False})

    def _complete(self, request: dict[str, Any]) -> None:
        reply = self._server.handle_completions(request | {"temperature": 0})
        if "usage" not in reply:
            raise RuntimeError(f"llama.cpp answered {reply}")

    def _start(self, rows: int, length: int) -> None:
        self._server = None  # ends the one before
        params = xllamacpp.CommonParams()
        params.model.path, params.hostnames, params.port, params.verbosity = str(self._path), ["127.0.0.1"], 0, 0
        params.n_ctx, params.n_parallel, params.kv_unified, params.warmup = rows * length, rows, False, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._threads
        self._server = xllamacpp.Server(params)
