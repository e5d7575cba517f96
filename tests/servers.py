"""Real servers on loopback, for tests: llama.cpp's inside this process."""

from pathlib import Path
from typing import Any

import xllamacpp


def llama_cpp(path: Path, context: int = 2048, **settings: Any) -> tuple[xllamacpp.Server, str]:
    """llama.cpp's server on a GGUF file: the server, which has to be kept, and its address."""
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(path), path.stem
    params.hostnames, params.port, params.verbosity = ["127.0.0.1"], 0, 0  # port 0: any that is free
    params.n_ctx, params.cpuparams.n_threads, params.n_parallel, params.warmup = context, 2, 1, False
    for name, value in settings.items():
        setattr(params, name, value)
    server = xllamacpp.Server(params)
    return server, server.listening_address
