"""Real servers on loopback, for tests: they listen on ports that are free, and end with the tests."""

import ctypes
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import xllamacpp


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def die_with_parent() -> None:
    """In a child: ends when the tests do, however they do (PR_SET_PDEATHSIG of Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@contextmanager
def transformers_serve(directory: Path) -> Iterator[str]:
    """`transformers serve` on a checkpoint: its address, once it is up."""
    port = free_port()
    command = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        directory,
        "--device",
        "cpu",
        "--port",
        str(port),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent
    ) as process:
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], seconds: float = 90) -> None:
    """Returns when `url` answers with 200."""
    for _ in range(int(seconds * 5)):
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            if httpx2.get(url, timeout=1).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"{url} was not up after {seconds} s")


def llama_cpp(path: Path, context: int = 2048, **settings: Any) -> tuple[xllamacpp.Server, str]:
    """llama.cpp's server on a GGUF file: the server, which has to be kept, and its address."""
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(path), [path.stem]
    params.hostnames, params.port, params.verbosity = ["127.0.0.1"], 0, 0  # port 0: any that is free
    params.n_ctx, params.cpuparams.n_threads, params.n_parallel, params.warmup = context, 2, 1, False
    for name, value in settings.items():
        setattr(params, name, value)
    server = xllamacpp.Server(params)
    return server, server.listening_address
