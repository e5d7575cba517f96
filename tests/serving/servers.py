"""Servers on loopback for tests: they listen on free ports and end with the tests."""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import xllamacpp

from falcon_kit.serving import tgi_server
from tests.children import ends_with_parent

QUESTION = [{"role": "user", "content": "What do giraffes eat?"}]


def free_port() -> int:
    """A free port."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def transformers_serve(directory: Path) -> Iterator[str]:
    """`transformers serve` on a checkpoint: its address, when it is ready."""
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
    environ = os.environ | {"OMP_NUM_THREADS": "1"}  # the tests need the other cores
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(ends_with_parent(command), env=environ, **silent) as process:
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    """Returns when `url` responds with HTTP 200, within 90 s."""
    for _ in range(450):
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            if httpx2.get(url, timeout=1).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"{url} was not up after 90 s")


def llama_cpp(path: Path, **settings: Any) -> tuple[xllamacpp.Server, str]:
    """llama.cpp's server on a GGUF file: the server, which ends when it is garbage-collected, and its address."""
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(path), [path.stem]
    params.hostnames, params.port, params.verbosity = ["127.0.0.1"], 0, 0  # port 0: any free port
    params.n_ctx, params.cpuparams.n_threads, params.n_parallel, params.warmup = 2048, 2, 1, False
    for name, value in settings.items():
        setattr(params, name, value)
    server = xllamacpp.Server(params)
    return server, server.listening_address


@dataclass
class Reply:
    """One response of a scripted server."""

    chunks: Iterable[bytes] = ()
    status: int = 200
    kind: str = "text/event-stream"
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    """Breaks the connection after the chunks."""
    silence: float = 0.0
    """Seconds before the first byte."""
    dropped: bool = False
    """Closes the connection without any response."""
    reset: bool = False
    """Closes or breaks it by a reset."""
    raw: Iterator[bytes] | None = None
    """Bytes in place of an HTTP response."""


Script = Callable[[str, dict[str, Any], dict[str, str]], Reply | Iterator[bytes]]


@dataclass
class Scripted:
    """A server whose responses a test defines: `script` takes path, body and headers of each request."""

    address: str
    script: Script
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)
    """Set when a client closes the connection before the end of the response."""

    def asked(self, path: str) -> list[dict[str, Any]]:
        """The bodies of the requests to a path."""
        return [body for where, body, _ in self.requests if where == path]


class HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that are opened at once


@contextmanager
def scripted(script: Script, kind: type[HTTPServer] = HTTPServer) -> Iterator[Scripted]:
    """A scripted server on loopback."""
    with kind(("127.0.0.1", 0), _Handler) as server:
        server.scripted = Scripted(f"http://127.0.0.1:{server.server_port}", script)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server.scripted
        finally:  # a thread that went on would ask a closed socket again and again
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        scripted = self.server.scripted
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
        headers = {name.lower(): value for name, value in self.headers.items()}
        scripted.requests.append((self.path, body, headers))
        reply = scripted.script(self.path, body, headers)
        try:
            self._answer(reply if isinstance(reply, Reply) else Reply(reply))
        except OSError:
            scripted.hung_up.set()
            self.close_connection = True

    def _answer(self, reply: Reply) -> None:
        time.sleep(reply.silence)
        self.close_connection |= reply.dropped or reply.cut or reply.raw is not None
        if reply.dropped:
            self._hang_up(reply.reset)
            return
        if reply.raw is not None:
            self.wfile.writelines(reply.raw)
            return
        self.send_response(reply.status)
        self.send_header("content-type", reply.kind)
        self.send_header("transfer-encoding", "chunked")
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        for chunk in reply.chunks:
            self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            self.wfile.flush()
        if reply.cut:
            self._hang_up(reply.reset)
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _hang_up(self, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""


def as_reply(content: Any, status: int = 200, **headers: str) -> Reply:
    """A JSON response."""
    return Reply([json.dumps(content).encode()], status, "application/json", headers)


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"


# OpenAI-compatible servers, with responses that a test defines


def chunk(text: str, finish: str | None = None, **more: Any) -> bytes:
    """One chunk of a streamed completion."""
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish}], **more})


def answering(*replies: Any, owner: str = "someone", models: tuple[str, ...] = ("falcon",), **entry: Any) -> Script:
    """A script of an OpenAI-compatible server that returns these replies to completions, one after the other."""
    left = list(replies)

    def script(path: str, body: dict[str, Any], _: dict[str, str]) -> Reply | Iterator[bytes]:
        if path == "/v1/models":
            return as_reply({"data": [{"id": each, "owned_by": owner, **entry} for each in models]})
        if path in ("/v1/completions", "/v1/chat/completions"):
            return left.pop(0) if len(left) > 1 else left[0]
        return as_reply({"error": "not found"}, 404)

    return script


DONE = [chunk("Hello"), chunk(" there", "stop"), b"data: [DONE]\n\n"]


# TGI, from its documented schema (https://huggingface.github.io/text-generation-inference), on a model of this process


def tgi(falcon: Any) -> Script:
    """TGI 3 on a Falcon: GET /info and POST /generate_stream, with TGI's validation."""

    def script(path: str, body: dict[str, Any], _: dict[str, str]) -> Reply | Iterator[bytes]:
        if path == "/info":
            return as_reply(tgi_server.info(falcon))
        if path == "/tokenize":
            return as_reply(tgi_server.tokenize(falcon, body))
        if path != "/generate_stream":
            return as_reply({"error": "not found"}, 404)
        if wrong := tgi_server.refusal(falcon, body):
            return as_reply({"error": f"Input validation error: {wrong}", "error_type": "validation"}, 422)
        return (b"data:" + json.dumps(each).encode() + b"\n\n" for each in tgi_server.events(falcon, body))

    return script


# SageMaker's runtime: AWS's event stream encoding around a container's answer (moto imitates the control plane only)


def frame(payload: bytes, **headers: str) -> bytes:
    """One message of application/vnd.amazon.eventstream."""
    encoded = b"".join(
        bytes([len(name) + 1])
        + b":"
        + name.replace("_", "-").encode()
        + b"\x07"
        + len(value).to_bytes(2)
        + value.encode()
        for name, value in headers.items()
    )
    prelude = (len(encoded) + len(payload) + 16).to_bytes(4) + len(encoded).to_bytes(4)
    message = prelude + zlib.crc32(prelude).to_bytes(4) + encoded + payload
    return message + zlib.crc32(message).to_bytes(4)


def part(payload: bytes) -> bytes:
    """A PayloadPart event."""
    return frame(payload, event_type="PayloadPart", content_type="application/octet-stream", message_type="event")


def container_error(status: int, text: str) -> Reply:
    """SageMaker's answer when the container returns an error."""
    content = {
        "OriginalStatusCode": status,
        "OriginalMessage": json.dumps({"error": text}),
        "Message": "Received an error",
    }
    return as_reply(content, 424, **{"x-amzn-errortype": "ModelError"})
