"""A server of Text Generation Inference's protocol for one Falcon, on loopback: to try a client without its container.

It has the schema of TGI 3: GET /info, POST /tokenize, and POST /generate_stream with server-sent events.
Source: https://huggingface.co/docs/text-generation-inference
"""

import json
import threading
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from falcon_kit.loading.falcon import Falcon

_LARGEST_REQUEST = 1 << 20  # bytes
_SETTINGS = "max_new_tokens do_sample temperature top_k top_p typical_p repetition_penalty seed".split()


class TgiServer(ThreadingHTTPServer):
    """A running server, used as `with TgiServer(falcon) as server: fk.connect(server.address)`."""

    def __init__(self, falcon: Falcon) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.falcon, self.address = falcon, f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stops the server and frees the port."""
        self.shutdown()
        self.server_close()

    def __exit__(self, *_: object) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    server: TgiServer

    def handle(self) -> None:
        """Answers a client, which may hang up at any time."""
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        if self.path == "/info":
            self._json(200, info(self.server.falcon))
        else:
            self._json(404, {"error": "not found"})

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        if length > _LARGEST_REQUEST:
            self._json(413, {"error": "too long"})
            return
        if self.path not in ("/generate_stream", "/tokenize"):
            self._json(404, {"error": "not found"})
            return
        body = json.loads(self.rfile.read(length) or b"{}")
        if self.path == "/tokenize":
            self._json(200, tokenize(self.server.falcon, body))
        elif wrong := refusal(self.server.falcon, body):
            self._json(422, {"error": f"Input validation error: {wrong}", "error_type": "validation"})
        else:
            self._stream(body)

    def _stream(self, body: Mapping[str, Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        with closing(events(self.server.falcon, body)) as made:
            for each in made:
                self.wfile.write(b"data:" + json.dumps(each).encode() + b"\n\n")
                self.wfile.flush()

    def _json(self, status: int, content: Any) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        """Logs nothing: a request may contain a key."""


def info(falcon: Falcon) -> dict[str, Any]:
    """The answer to GET /info, as far as clients need it."""
    context = falcon.spec.context
    return {"model_id": falcon.spec.name, "max_input_tokens": context - 1, "max_total_tokens": context}


def tokenize(falcon: Falcon, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answer to POST /tokenize; clients read the ids."""
    tokens = falcon.tokenizer(body["inputs"])["input_ids"]
    return [{"id": each, "text": "", "start": 0, "stop": 0} for each in tokens]


def refusal(falcon: Falcon, body: Mapping[str, Any]) -> str | None:
    """The error of TGI's validation for a request; None if it is valid."""
    parameters, context = body.get("parameters", {}), falcon.spec.context
    length, wanted = len(falcon.tokenizer(body["inputs"])["input_ids"]), parameters["max_new_tokens"]
    total = f"`inputs` tokens + `max_new_tokens` must be <= {context}. Given: {length} and {wanted}"
    rules = {
        "`temperature` must be strictly positive": parameters.get("temperature", 1) > 0,
        "`top_p` must be > 0.0 and < 1.0": 0 < parameters.get("top_p", 0.5) < 1,
        "`typical_p` must be > 0.0 and < 1.0": 0 < parameters.get("typical_p", 0.5) < 1,
        "`typical_p` needs `do_sample`": "typical_p" not in parameters or parameters.get("do_sample"),
        "`repetition_penalty` must be strictly positive": parameters.get("repetition_penalty", 1) > 0,
        "`stop` supports up to 4 stop sequences": len(parameters.get("stop", [])) <= 4,
        total: length + wanted <= context,
    }
    return next((rule for rule, holds in rules.items() if not holds), None)


def events(falcon: Falcon, body: Mapping[str, Any]) -> Generator[dict[str, Any]]:
    """TGI's StreamResponse events; a stop sequence ends the text and stays in it."""
    given = body["parameters"]
    text, end, count = "", falcon.tokenizer.eos_token_id, 0
    length = len(falcon.tokenizer(body["inputs"])["input_ids"])
    settings = {name: given[name] for name in _SETTINGS if name in given}
    with closing(falcon.stream(body["inputs"], alternatives=given.get("top_n_tokens", 0), **settings)) as stream:
        for count, piece in enumerate(stream, 1):
            special = piece.token_id == end
            text += piece.text
            ends = {
                "eos_token": special,
                "stop_sequence": any(text.endswith(word) for word in given.get("stop", [])),
                "length": count == given["max_new_tokens"],
            }
            event = _event(piece, special, count) | {"generated_text": None, "details": None}
            if reason := next((name for name, holds in ends.items() if holds), None):
                details = {"finish_reason": reason, "generated_tokens": count, "seed": given.get("seed")}
                yield event | {"generated_text": text, "details": details | {"input_length": length}}
                return
            yield event


def _event(piece: Any, special: bool, index: int) -> dict[str, Any]:
    shown = "<|endoftext|>" if special else piece.text
    token = {"id": piece.token_id, "text": shown, "logprob": piece.logprob, "special": special}
    top = [{"id": each.token_id, "text": each.text, "logprob": each.logprob} for each in piece.alternatives]
    return {"index": index, "token": token, **({"top_tokens": top} if top else {})}
