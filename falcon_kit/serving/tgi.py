"""Text Generation Inference's own protocol: POST /generate_stream, answered by server-sent events.

Archived since March 2026, TGI still runs in many SageMaker images, and LMI's containers write the same events as JSON
lines. Schema: https://huggingface.github.io/text-generation-inference (StreamResponse).
"""

from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2

from falcon_kit.display.errors import require, unknown_name
from falcon_kit.generation.text import FinishReason
from falcon_kit.serving.protocol import (
    UNKNOWN,
    Connection,
    Delta,
    Facts,
    Request,
    as_json,
    failure,
    get_json,
    map_settings,
    message_in,
    redact_url,
    unreachable,
)

MOST_STOPS = 4  # TGI's --max-stop-sequences, unless it was started with more
_NAMES = {"top_k": "top_k", "repetition_penalty": "repetition_penalty", "typical_p": "typical_p"}
_FINISHED: Mapping[str, FinishReason] = {"length": "length", "eos_token": "eos", "stop": "eos", "stop_sequence": "stop"}


class TGIServer:
    """Speaks with one endpoint of this kind."""

    stops = True
    chats = False

    def __init__(self, url: str, facts: Facts, wire: Connection) -> None:
        self.facts, self._url, self._wire = facts, url, wire
        self._client = httpx2.AsyncClient(headers=wire.headers, timeout=wire.waiting)

    def body(self, request: Request) -> dict[str, Any]:
        """See `body`."""
        return body(request, self.facts.server)

    async def deltas(self, body: dict[str, Any]) -> AsyncIterator[Delta]:
        """Sends the request and yields what each event says."""
        address = self.facts.address
        try:
            async with self._client.stream("POST", f"{self._url}/generate_stream", json=body) as response:
                if response.is_error:
                    text = (await response.aread()).decode(errors="replace")
                    said = self._wire.scrub(message_in(as_json(text) or text))
                    raise failure(response.status_code, said, address, response.headers)
                async for line in response.aiter_lines():
                    if delta := read(line, address):
                        yield delta
        except httpx2.HTTPError as error:
            raise unreachable(error, address, self._wire.timeout) from None


def body(request: Request, server: str) -> dict[str, Any]:
    """GenerateRequest: the prompt, and its GenerateParameters."""
    sampling = request.sampling
    carried = map_settings(request, server, _NAMES)
    require(
        isinstance(request.prompt, str),
        f"{server} has no field for token ids or a conversation: give a text, or connect with chat='falcon'",
    )
    parameters: dict[str, Any] = {"max_new_tokens": request.new_tokens, "details": True, "return_full_text": False}
    # More than it allows would be refused; the others are cut here all the same.
    parameters |= {"stop": list(request.stop)[:MOST_STOPS], "do_sample": sampling.samples}
    if sampling.samples:
        top_p = None if sampling.top_p == 1 else sampling.top_p  # it has to be below 1 there
        chosen = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": top_p}
        parameters |= {name: value for name, value in chosen.items() if value is not None}
    if sampling.seed is not None:
        parameters["seed"] = sampling.seed
    return {"inputs": request.prompt, "parameters": parameters | carried}


def read(line: str, address: str) -> Delta | None:
    """What a line says, of server-sent events or of JSON; None for an empty one, a comment or the end mark."""
    line = line.removeprefix("data:").strip()
    if not line or line.startswith((":", "event:")) or line == "[DONE]":
        return None
    event = as_json(line)
    if isinstance(event, dict) and event.get("error"):
        raise ConnectionError(f"{address} reports: {message_in(event)}")
    if not isinstance(event, dict) or not isinstance(event.get("token"), dict):
        raise ConnectionError(f"{address} answers with what is no event of TGI: {line[:80]!r}")
    token, details = event["token"], event.get("details") or {}
    text = "" if token.get("special") else str(token.get("text") or "")
    logprob = token.get("logprob", token.get("log_prob"))  # LMI's name has an underscore
    return Delta(
        text=text,
        token_id=token["id"] if isinstance(token.get("id"), int) else None,
        logprob=UNKNOWN if logprob is None else logprob,
        finish=_FINISHED.get(details.get("finish_reason", "")),
        prompt_tokens=details.get("input_length"),
        new_tokens=details.get("generated_tokens"),
    )


async def discover(url: str, model: str | None, wire: Connection) -> TGIServer | None:
    """The TGI at `url`, None if what answers there is none."""
    _, info = await get_json(f"{url}/info", wire)
    if not isinstance(info, dict) or "model_id" not in info:
        return None
    if model not in (None, info["model_id"]):
        raise LookupError(unknown_name("model", str(model), [info["model_id"]]))
    return TGIServer(url, Facts("TGI", redact_url(url), info["model_id"], info.get("max_total_tokens")), wire)
