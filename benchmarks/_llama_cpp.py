"""llama.cpp for comparison, by the server in the package xllamacpp, which is ready built: prefill, and decoding steps.

Its kernels are chosen when it starts, among all of this processor's instructions.
"""

from pathlib import Path
from typing import Any

import xllamacpp


class LlamaCpp:
    """A GGUF file with a tokenizer. `fill` starts a server with a place for each row, and reads a prompt."""

    def __init__(self, path: Path, threads: int) -> None:
        self._path, self._threads = path, threads
        self._server: Any = None
        self._room, self._batch, self._ids = 0, 1, [7]

    def fill(self, batch: int, context: int) -> None:
        """Fills a KV cache with `context` tokens in each of `batch` rows."""
        self._start(batch, context)
        self._batch, self._ids = batch, [7] * context
        self.decode(1)

    def decode(self, tokens: int) -> None:
        """Computes new tokens in every row. The cached prompt, which the rows share, stays."""
        self._complete(self._ids, tokens, n=self._batch)

    def prefill(self, ids: list[int]) -> dict[int, float]:
        """Computes a prompt with an empty cache. Returns the log-probabilities of the ten most probable next tokens."""
        if self._room < len(ids):
            self._start(1, len(ids))
        reply = self._complete(ids, 1, cache_prompt=False, logprobs=10)
        return {each["id"]: each["logprob"] for each in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}

    def _complete(self, ids: list[int], tokens: int, **options: Any) -> dict[str, Any]:
        request = {"prompt": ids, "n_predict": tokens, "cache_prompt": True, "ignore_eos": True, "temperature": 0}
        reply: dict[str, Any] = self._server.handle_completions(request | options)
        if "usage" not in reply:
            raise RuntimeError(f"llama.cpp answered {reply}")
        return reply

    def _start(self, rows: int, context: int) -> None:
        self._server, self._room = None, context  # ends the one before
        params = xllamacpp.CommonParams()
        params.model.path, params.hostnames, params.port, params.verbosity = str(self._path), ["127.0.0.1"], 0, 0
        params.n_ctx, params.n_parallel, params.kv_unified = rows * (context + 256), rows, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._threads
        params.warmup = False
        self._server = xllamacpp.Server(params)
