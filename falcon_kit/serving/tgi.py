"""Text Generation Inference's own protocol: POST /generate_stream returns server-sent events.

Archived since March 2026, TGI still runs in many SageMaker images, and LMI's containers write the same events as JSON
lines. Schema: https://huggingface.github.io/text-generation-inference (StreamResponse).
"""

import math
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import aclosing
from typing import Any

from falcon_kit.display.errors import require, unknown_name
from falcon_kit.generation.text import Alternative
from falcon_kit.serving.connection import Connection, redact_url
from falcon_kit.serving.failures import error_message, json_or_none, length, nested, reading, token_count
from falcon_kit.serving.protocol import (
    FINISHED,
    Delta,
    Facts,
    Request,
    ask_about_prompt,
    ask_json,
    likeliest,
    logprob_or,
    map_settings,
    probe,
    stream_data,
)

MAX_STOP_SEQUENCES = 4  # the default of TGI's --max-stop-sequences
_NAMES = {"top_k": "top_k", "repetition_penalty": "repetition_penalty", "typical_p": "typical_p"}


class TGIServer:
    """An endpoint with TGI's protocol."""

    api = "tgi"

    def __init__(self, url: str, facts: Facts, connection: Connection) -> None:
        self.facts, self._url, self.connection = facts, url, connection

    def body(self, request: Request) -> dict[str, Any]:
        return request_body(request, self.facts.server, ("max_length",))

    async def count(self, request: Request) -> int:
        """The tokens of the prompt, by POST /tokenize, which lists them."""
        url, content = f"{self._url}/tokenize", {"inputs": request.prompt}
        return await ask_about_prompt(url, self.connection, content, length)

    async def deltas(self, body: dict[str, Any]) -> AsyncIterator[Delta]:
        address, reshaped = self.facts.address, reshapes(body["parameters"])
        url = f"{self._url}/generate_stream"
        async with aclosing(stream_data(url, body, self.connection, address)) as events:  # type: ignore[type-var]
            async for event in events:
                yield read_event(event, address, reshaped)


def request_body(request: Request, server: str, more: Collection[str] = ()) -> dict[str, Any]:
    """TGI's GenerateRequest: the prompt and its GenerateParameters. more: as in `map_settings`."""
    sampling = request.sampling
    options = map_settings(request, server, _NAMES, ("alternatives", *more))
    require(
        isinstance(request.prompt, str),
        f"{server} has no field for token ids or a conversation: give a text, or connect with chat='falcon'",
    )
    parameters: dict[str, Any] = {"max_new_tokens": request.new_tokens, "details": True, "return_full_text": False}
    # TGI refuses a request with more stop strings; the kit itself cuts the text at the others.
    parameters |= {"stop": list(request.stop)[:MAX_STOP_SEQUENCES], "do_sample": sampling.samples}
    chosen: dict[str, Any] = {"top_n_tokens": sampling.alternatives or None, "seed": sampling.seed}
    if sampling.samples:
        top_p = None if sampling.top_p == 1 else sampling.top_p  # TGI requires a value below 1
        chosen |= {"temperature": sampling.temperature, "top_k": sampling.top_k or None, "top_p": top_p}
    parameters |= {name: value for name, value in chosen.items() if value is not None} | options
    require(
        not (sampling.alternatives and reshapes(parameters)),
        f"{server} reports probabilities after temperature, top_k, top_p and penalties, and alternatives="
        f"{sampling.alternatives} means those before: leave it out, or set do_sample=False",
    )
    return {"inputs": request.prompt, "parameters": parameters}


def reshapes(parameters: Mapping[str, Any]) -> bool:
    """Whether a request changes the probabilities that TGI reports: it computes them from what it draws from."""
    return parameters.get("temperature", 1) != 1 or any(name in parameters for name in ("top_p", *_NAMES.values()))


def read_event(data: str, address: str, reshaped: bool = False) -> Delta:
    """The delta in the data of an event.

    reshaped: the request `reshapes` what TGI reports, so that the log-probability is not known. LMI's is the model's.
    """
    event = json_or_none(data)
    if nested(event, "error"):
        raise ConnectionError(f"{address} reports: {error_message(event)}")
    if not isinstance(nested(event, "token"), dict):
        raise ConnectionError(f"{address} sent a line that is no event of TGI: {data!r}")
    token = event["token"]
    with reading(address):
        details, top = event.get("details") or {}, event.get("top_tokens") or []
        if not isinstance(token.get("special"), bool | None):
            raise TypeError(f"special is {token['special']!r}, neither true nor false")
        return Delta(
            text="" if token.get("special") else token.get("text") or "",
            token_id=token.get("id"),
            logprob=math.nan if reshaped and "log_prob" not in token else _logprob(token, math.nan),
            finish=FINISHED.get(details.get("finish_reason", "")),
            prompt_tokens=details.get("input_length"),
            new_tokens=details.get("generated_tokens"),
            alternatives=likeliest(
                Alternative(each["text"], each.get("id"), _logprob(each, -math.inf)) for each in top
            ),
        )


def _logprob(token: Mapping[str, Any], unknown: float) -> float:
    return logprob_or(unknown, token.get("logprob", token.get("log_prob")))  # LMI's name has an underscore


async def discover(url: str, model: str | None, connection: Connection, certain: bool) -> TGIServer | None:
    """The TGI server at `url`; None if there is another server. certain: whether a refusal is TGI's, and an error."""
    info = (await ask_json(f"{url}/info", connection))[1] if certain else await probe(f"{url}/info", connection)
    if not isinstance(nested(info, "model_id"), str):
        return None
    if model not in (None, info["model_id"]):
        raise LookupError(unknown_name("model", str(model), [info["model_id"]]))
    facts = Facts("TGI", redact_url(url), info["model_id"], token_count(info.get("max_total_tokens")))
    return TGIServer(url, facts, connection)
