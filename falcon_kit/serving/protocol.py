"""What every protocol has in common: a request, the pieces of an answer, and how failures are named."""

import asyncio
import json
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

FIRST_PAUSE = 0.5  # seconds before the second attempt; doubled for each one after
LONGEST_PAUSE, LONGEST_ASKED = 8.0, 60.0  # seconds: what the growing ends at, and what an endpoint may ask for
UNKNOWN = float("nan")
T = TypeVar("T")
CARRIED = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "num_return_sequences", "stop", "seed")
"""Fields of `Sampling` that protocols have a field for, or that need none."""
INSTEAD = {
    "max_length": "the tokens of the prompt are counted where the model is; give max_new_tokens",
    "truncate": "prompts are cut where the tokenizer is; shorten the prompt",
}
"""What to do about some of the others."""


@dataclass(frozen=True)
class Request:
    """One text to write, as the caller asked for it."""

    prompt: str | Sequence[int] | None
    """What to continue; None for a conversation that the endpoint's own template writes out."""
    messages: Sequence[Message]
    """That conversation."""
    sampling: Sampling
    """The kit's own settings."""
    options: Mapping[str, Any]
    """Others, by transformers' names."""
    stop: tuple[str, ...]
    """All strings that end the text."""

    @property
    def new_tokens(self) -> int:
        """Tokens to generate at most."""
        return self.sampling.max_new_tokens or DEFAULT_NEW_TOKENS


@dataclass(frozen=True)
class Delta:
    """What one event of an endpoint says."""

    text: str = ""
    """New characters."""
    token_id: int | None = None
    """The token, where the endpoint tells."""
    logprob: float = UNKNOWN
    """Its natural log-probability, where the endpoint tells."""
    finish: FinishReason | None = None
    """Why the text has ended, in the last one."""
    prompt_tokens: int | None = None
    """Tokens of the prompt, where the endpoint counts them."""
    new_tokens: int | None = None
    """Tokens generated so far, where the endpoint counts them."""


@dataclass(frozen=True)
class Facts:
    """What an endpoint says of itself."""

    server: str
    """What runs there: "vLLM", "llama.cpp", "transformers serve", "OpenAI-compatible", "TGI", "SageMaker"."""
    address: str
    """Where, without a query."""
    model: str
    """The name it goes by there."""
    context: int | None = None
    """Tokens of prompt and answer together that it takes; None where it does not tell."""


class Server(Protocol):
    """One protocol, spoken with one endpoint."""

    facts: Facts
    stops: bool
    """Whether it is sent the stop strings, and ends by itself soon after one."""
    chats: bool
    """Whether the protocol carries a conversation for the endpoint's own template."""

    def body(self, request: Request) -> dict[str, Any]:
        """The request as the protocol writes it; ValueError for what it has no field for."""

    def deltas(self, body: dict[str, Any]) -> AsyncIterator[Delta]:
        """Sends it and yields what comes back."""


@dataclass(frozen=True)
class Connection:
    """How to reach an endpoint."""

    token: str | None = field(repr=False)
    """Its key, never shown."""
    timeout: float
    """Seconds without a word from it, after which it counts as gone."""
    retries: int
    """Further attempts where it is busy or not there yet."""

    @property
    def headers(self) -> dict[str, str]:
        """What every request brings along."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    @property
    def waiting(self) -> httpx2.Timeout:
        """The timeout of a request; a connection comes about at once or never."""
        return httpx2.Timeout(self.timeout, connect=min(self.timeout, 10))

    def scrub(self, text: str) -> str:
        """The text without the key, should an endpoint repeat it, and not longer than people read."""
        text = text.replace(self.token, "***") if self.token else text
        return text if len(text) <= 500 else text[:497] + "..."


class Unavailable(ConnectionError):
    """Busy, starting, or not there: worth another attempt as long as no piece has come."""

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


async def retry_stream(attempt: Callable[[], AsyncIterator[T]], retries: int) -> AsyncIterator[T]:
    """Yields what `attempt` does, and begins anew while it is `Unavailable` before its first item."""
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
            growing = min(FIRST_PAUSE * 2**number, LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            pause = growing if error.pause is None else min(error.pause, LONGEST_ASKED)
        await asyncio.sleep(pause)


def map_settings(request: Request, server: str, names: Mapping[str, str]) -> dict[str, Any]:
    """The options under the endpoint's names; `names` are those of transformers that it has a field for.

    Raises ValueError for what it has none for, with what to do instead: nothing is left out silently.
    """
    sampling = request.sampling
    for each in fields(sampling):
        value = getattr(sampling, each.name)
        instead = INSTEAD.get(each.name, "leave it out")
        require(
            each.name in CARRIED or value == each.default, f"{server} has no field for {each.name}={value!r}: {instead}"
        )
    require(
        sampling.top_k is None or "top_k" in names,
        f"{server} has no field for top_k={sampling.top_k}: give top_p instead",
    )
    known = dict.fromkeys(list(SAMPLING_FIELDS) + list(names))
    for name in request.options:
        require(name in names, unknown_name(f"setting for {server}:", name, list(known)))
    return {names[name]: value for name, value in request.options.items()}


def redact_url(url: str) -> str:
    """The address without query and fragment, in which a key may stand."""
    return urlsplit(url)._replace(query="", fragment="").geturl()


def failure(status: int, text: str, address: str, headers: Mapping[str, str]) -> Exception:
    """The exception for an HTTP status that is an error; `text` is what the endpoint said."""
    said = f"{address} says: {text}" if text else f"{address} says nothing more"
    if status in (401, 403):
        return PermissionError(
            f"the endpoint refused the key (HTTP {status}): pass token=..., or set FALCON_KIT_TOKEN before "
            f"connecting. {said}"
        )
    if status in (429, 503):
        return Unavailable(f"the endpoint is busy (HTTP {status}): try again later. {said}", _retry_after(headers))
    if status == 404 or "pinned to" in text:
        return LookupError(
            f"the endpoint knows no such model or path (HTTP {status}): check model= and the URL. {said}"
        )
    if status in (400, 413, 422):
        hint = ": shorten the prompt or lower max_new_tokens" if re.search("context|token|length", text) else ""
        return ValueError(f"the endpoint refused the request (HTTP {status}){hint}. {said}")
    return ConnectionError(f"the endpoint failed (HTTP {status}). {said}")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the endpoint asks to wait (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "")
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else None


def unreachable(error: httpx2.HTTPError, address: str, timeout: float) -> Exception:
    """The exception for a connection that did not come about, or fell silent."""
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return Unavailable(f"nothing answers at {address}: start the server, or check host and port")
    if isinstance(error, httpx2.TimeoutException):
        return TimeoutError(
            f"{address} has not said a word for {timeout:g} s: give a longer timeout=, or look at its log"
        )
    return ConnectionError(f"{address} broke the connection off ({type(error).__name__}): look at its log")


async def get_json(url: str, wire: Connection) -> tuple[int, Any]:
    """What a GET brings: the status, and the content if it is JSON. Raises for a refused key and a busy endpoint."""
    try:
        async with httpx2.AsyncClient(headers=wire.headers, timeout=wire.waiting) as client:
            response = await client.get(url)
    except httpx2.HTTPError as error:
        raise unreachable(error, redact_url(url), wire.timeout) from None
    if response.status_code in (401, 403, 429, 503):
        said = wire.scrub(message_in(as_json(response.text) or response.text))
        raise failure(response.status_code, said, redact_url(url), response.headers)
    return response.status_code, as_json(response.text)


def as_json(text: str) -> Any:
    """The content of a JSON text, None if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def message_in(content: Any) -> str:
    """What an error answer says, in any of the forms in use: {"error": {"message"}}, {"error"}, {"detail"}."""
    for key in ("error", "detail", "message"):
        if isinstance(content, Mapping) and content.get(key):
            return message_in(content[key])
    return str(content)
