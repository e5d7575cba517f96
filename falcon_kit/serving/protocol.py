"""What all protocols share: a request, the events of a response, retries, and the exception for each failure."""

import asyncio
import json
import math
import random
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx2

from falcon_kit.display.errors import require, unknown_name
from falcon_kit.generation.chat import Message
from falcon_kit.generation.prompts import DEFAULT_NEW_TOKENS
from falcon_kit.generation.sampling import SAMPLING_FIELDS, Sampling
from falcon_kit.generation.text import FinishReason

FIRST_PAUSE = 0.5  # seconds before the second attempt; doubled for each further one
MAX_PAUSE, MAX_RETRY_AFTER = 8.0, 60.0  # seconds: limits of the doubled pause, and of an endpoint's Retry-After
T = TypeVar("T")
_SUPPORTED = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "num_return_sequences", "stop", "seed")
"""Fields of `Sampling` that every protocol supports, or that the kit handles itself."""
_ADVICE = {
    "max_length": "the prompt's tokens are counted at the endpoint; give max_new_tokens",
    "truncate": "only the endpoint has the tokenizer; shorten the prompt",
}
"""What to do instead of an unsupported field."""


@dataclass(frozen=True)
class Request:
    """One text to generate."""

    prompt: str | Sequence[int] | None
    """What to continue; None for a conversation that the endpoint's own chat template renders."""
    messages: Sequence[Message]
    """That conversation."""
    sampling: Sampling
    """The kit's own settings."""
    options: Mapping[str, Any]
    """Further settings, by transformers' names."""
    stop: tuple[str, ...]
    """All stop strings."""

    @property
    def new_tokens(self) -> int:
        """The maximum number of new tokens."""
        return self.sampling.max_new_tokens or DEFAULT_NEW_TOKENS


@dataclass(frozen=True)
class Delta:
    """What one event of a response adds."""

    text: str = ""
    """New characters."""
    token_id: int | None = None
    """The token, if the endpoint reports it."""
    logprob: float = math.nan
    """Its natural log-probability, if the endpoint reports it."""
    finish: FinishReason | None = None
    """Why the text has ended, in the last event."""
    prompt_tokens: int | None = None
    """Tokens of the prompt, if the endpoint reports them."""
    new_tokens: int | None = None
    """Tokens generated so far, if the endpoint reports them."""


@dataclass(frozen=True)
class Facts:
    """What an endpoint reports about itself."""

    server: str
    """Its software: "vLLM", "llama.cpp", "transformers serve", "TGI", "SageMaker (tgi)"."""
    address: str
    """Its URL without a query."""
    model: str
    """The model's name at the endpoint."""
    context: int | None = None
    """The limit for tokens of prompt and answer together; None if it is not reported."""


class Server(Protocol):
    """One endpoint, with the protocol that it uses."""

    facts: Facts
    accepts_stop: bool
    """Whether requests contain the stop strings, so that the endpoint itself ends soon after one."""
    accepts_messages: bool
    """Whether a request can contain a conversation, which the endpoint's own chat template renders."""

    def body(self, request: Request) -> dict[str, Any]:
        """The request in the endpoint's protocol; raises ValueError for what the protocol has no field for."""

    def deltas(self, body: dict[str, Any]) -> AsyncIterator[Delta]:
        """Sends the request and yields the events of the response."""


@dataclass(frozen=True)
class Connection:
    """How to reach an endpoint."""

    token: str | None = field(repr=False)
    """The API key, which is never shown."""
    timeout: float
    """Seconds without a byte from the endpoint until a request fails."""
    retries: int
    """Further attempts while the endpoint is busy or refuses connections."""

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    @property
    def http_timeout(self) -> httpx2.Timeout:
        """The timeout for httpx2; at most 10 seconds for the TCP connection."""
        return httpx2.Timeout(self.timeout, connect=min(self.timeout, 10))

    def redact(self, text: str) -> str:
        """The text without the API key, which some endpoints repeat in errors, and with at most 500 characters."""
        text = text.replace(self.token, "***") if self.token else text
        return text if len(text) <= 500 else text[:497] + "..."


class Unavailable(ConnectionError):
    """The endpoint is busy, starting, or refuses or closes connections: `retry_stream` tries again."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


async def retry_stream(attempt: Callable[[], AsyncIterator[T]], retries: int) -> AsyncIterator[T]:
    """Yields the items of `attempt()`; calls it again when it raises `Unavailable` before its first item."""
    for number in range(retries + 1):
        begun = False
        try:
            async with aclosing(attempt()) as items:  # type: ignore[type-var]  # typed as an iterator, made as a generator
                async for item in items:
                    begun = True
                    yield item
            return
        except Unavailable as error:
            if begun or number == retries:
                raise
            doubled = min(FIRST_PAUSE * 2**number, MAX_PAUSE) * random.uniform(0.75, 1.25)
            pause = doubled if error.retry_after is None else min(error.retry_after, MAX_RETRY_AFTER)
        await asyncio.sleep(pause)


def map_settings(request: Request, server: str, names: Mapping[str, str]) -> dict[str, Any]:
    """The request's options under the endpoint's names; `names` maps transformers' names to these.

    Raises ValueError for a setting that has no field, with what to do instead: no setting is dropped silently.
    """
    sampling = request.sampling
    for each in fields(sampling):
        value = getattr(sampling, each.name)
        advice = _ADVICE.get(each.name, "leave it out")
        supported = each.name in _SUPPORTED or value == each.default
        require(supported, f"{server} has no field for {each.name}={value!r}: {advice}")
    require(
        sampling.top_k is None or "top_k" in names,
        f"{server} has no field for top_k={sampling.top_k}: give top_p instead",
    )
    known = dict.fromkeys([*SAMPLING_FIELDS, *names])
    for name in request.options:
        require(name in names, unknown_name(f"setting for {server}:", name, list(known)))
    return {names[name]: value for name, value in request.options.items()}


def redact_url(url: str) -> str:
    """The URL without query and fragment, which may contain a key."""
    return urlsplit(url)._replace(query="", fragment="").geturl()


def http_error(status: int, message: str, address: str, headers: Mapping[str, str]) -> Exception:
    """The exception for an HTTP error status; `message` is the endpoint's own, and may be empty."""
    quoted = f"{address} reports: {message}" if message else f"{address} gives no reason"
    if status in (401, 403):
        return PermissionError(
            f"the endpoint refused the key (HTTP {status}): pass token=..., or set FALCON_KIT_TOKEN before "
            f"connecting. {quoted}"
        )
    if status in (429, 503):
        return Unavailable(f"the endpoint is busy (HTTP {status}): try again later. {quoted}", _retry_after(headers))
    if status == 404 or "pinned to" in message:  # `transformers serve` for another model than its own
        return LookupError(
            f"the endpoint has no such model or path (HTTP {status}): check model= and the URL. {quoted}"
        )
    if status in (400, 413, 422):
        hint = ": shorten the prompt or lower max_new_tokens" if re.search("context|token|length", message) else ""
        return ValueError(f"the endpoint refused the request (HTTP {status}){hint}. {quoted}")
    return ConnectionError(f"the endpoint failed (HTTP {status}). {quoted}")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds in the Retry-After header (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "")
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else None


def connection_error(error: httpx2.HTTPError, address: str, timeout: float) -> Exception:
    """The exception for a connection that was refused, timed out or broke."""
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return Unavailable(f"nothing answers at {address}: start the server, or check host and port")
    if isinstance(error, httpx2.TimeoutException):
        return TimeoutError(f"{address} sent nothing for {timeout:g} s: give a longer timeout=, or read its log")
    message = f"the connection to {address} broke ({type(error).__name__}): read the server's log"
    # A server may close an idle connection at the moment when the next request is sent over it.
    return Unavailable(message) if isinstance(error, httpx2.RemoteProtocolError) else ConnectionError(message)


async def get_json(url: str, connection: Connection) -> tuple[int, Any]:
    """The status of a GET, and its content if that is JSON. Raises for a refused key and a busy endpoint."""
    try:
        async with httpx2.AsyncClient(headers=connection.headers, timeout=connection.http_timeout) as client:
            response = await client.get(url)
    except httpx2.HTTPError as error:
        raise connection_error(error, redact_url(url), connection.timeout) from None
    if response.status_code in (401, 403, 429, 503):
        message = connection.redact(error_message(response.text))
        raise http_error(response.status_code, message, redact_url(url), response.headers)
    return response.status_code, parse_json(response.text)


def parse_json(text: str) -> Any:
    """The content of a JSON text; None if the text is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def error_message(content: Any) -> str:
    """The message in an error response: a text, or {"error": {"message": ...}}, {"error": ...}, {"detail": ...}."""
    if isinstance(content, str):
        content = parse_json(content) or content
    for key in ("error", "detail", "message"):
        if isinstance(content, Mapping) and content.get(key):
            return error_message(content[key])
    return str(content)
