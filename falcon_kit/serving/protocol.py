"""What all protocols share: a request, the events of a response, and retries."""

import asyncio
import math
import random
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import httpx2

from falcon_kit.display.errors import require
from falcon_kit.generation.chat import Message
from falcon_kit.generation.prompts import DEFAULT_NEW_TOKENS, new_token_limit
from falcon_kit.generation.sampling import SAMPLING_FIELDS, Sampling, unknown_setting
from falcon_kit.generation.text import Alternative, FinishReason
from falcon_kit.serving.connection import Connection, next_event, redact_url
from falcon_kit.serving.failures import Unavailable, connection_error, error_message, http_error, json_or_none, within

FIRST_PAUSE = 0.5  # seconds before the second attempt; doubled for each further one
END_SECONDS = 1.0  # to wait for what a server sends after the text: its token counts, and the end of the response
MAX_PAUSE, MAX_RETRY_AFTER = 8.0, 60.0  # seconds: limits of the doubled pause, and of an endpoint's Retry-After
T = TypeVar("T")
FINISHED: Mapping[str, FinishReason] = {"length": "length", "eos_token": "eos", "stop": "eos", "stop_sequence": "stop"}
"""The kit's finish reason for those of servers; their "stop" means the end-of-sequence token."""
_SUPPORTED = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "num_return_sequences", "stop", "seed")
"""Fields of `Sampling` that every protocol supports, or that the kit handles itself."""
_ADVICE = {
    "max_length": "it counts no tokens of a prompt; give max_new_tokens",
    "truncate": "only the endpoint has the tokenizer; shorten the prompt",
}
"""What to do instead of an unsupported field."""


@dataclass(frozen=True)
class Request:
    """One text to generate."""

    prompt: str | Sequence[int] | None
    """What to continue; None for a conversation that the endpoint's own chat template renders."""
    messages: Sequence[Message]
    """The conversation; empty for a prompt."""
    sampling: Sampling
    """The kit's own settings."""
    options: Mapping[str, Any]
    """Further settings, by transformers' names."""
    stop: tuple[str, ...]
    """All stop strings."""

    @property
    def new_tokens(self) -> int:
        """The maximum number of new tokens; before the prompt is counted, `max_length`."""
        return self.sampling.max_new_tokens or self.sampling.max_length or DEFAULT_NEW_TOKENS


@dataclass(frozen=True)
class Delta:
    """What one event of a response adds."""

    text: str = ""
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
    alternatives: tuple[Alternative, ...] = ()
    """The most probable tokens of this step, in descending order, if the request asks for them."""

    def __post_init__(self) -> None:
        """Raises TypeError for values of other types, which come from a malformed event."""
        tokens: tuple[Delta | Alternative, ...] = (self, *self.alternatives)
        numbers = (self.prompt_tokens, self.new_tokens, *(each.token_id for each in tokens))
        if not (
            all(isinstance(each.text, str) and isinstance(each.logprob, int | float) for each in tokens)
            and all(each is None or type(each) is int for each in numbers)
        ):
            raise TypeError(f"wrong types in an event: {self}")


def likeliest(alternatives: Iterable[Alternative]) -> tuple[Alternative, ...]:
    """Alternatives in descending order of their log-probability: some servers list the generated token first."""
    return tuple(sorted(alternatives, key=lambda each: -each.logprob))


def logprob_or(unknown: float, value: Any) -> float:
    """A log-probability that a server sends, or `unknown` for null (JSON cannot write -inf) and for what is none."""
    known = value is not None and -1e300 <= value <= 1e-3  # sums are finite; rounding may leave it above 0
    return float(value) if known else unknown


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
    connection: Connection
    api: str
    """The name of its protocol, as `connect` takes it: "openai", or "tgi", which has no conversations."""

    def body(self, request: Request) -> dict[str, Any]:
        """The request in the endpoint's protocol; raises ValueError for what the protocol has no field for."""

    def deltas(self, body: dict[str, Any]) -> AsyncIterator[Delta]:
        """Sends the request and yields the events of the response."""

    async def count(self, request: Request) -> int:
        """The tokens of a request's prompt, counted by the endpoint; called where `body` accepts `max_length`."""


async def retry_stream(attempt: Callable[[], AsyncIterator[T]], connection: Connection) -> AsyncIterator[T]:
    """Yields the items of `attempt()`; calls it again when it raises `Unavailable` before its first item.

    Each error is raised without the API key.
    """
    for number in range(connection.retries + 1):
        begun = False
        try:
            async with aclosing(attempt()) as items:  # type: ignore[type-var]  # typed as an iterator, made as a generator
                async for item in items:
                    begun = True
                    yield item
            return
        except Unavailable as error:
            connection.clean(error)
            if begun or number == connection.retries:
                raise
            doubled = min(FIRST_PAUSE * 2**number, MAX_PAUSE) * random.uniform(0.75, 1.25)
            pause = doubled if error.retry_after is None else min(error.retry_after, MAX_RETRY_AFTER)
        except Exception as error:
            connection.clean(error)
            raise
        await asyncio.sleep(pause)


async def retry(call: Callable[[], Awaitable[T]], connection: Connection) -> T:
    """The result of `call`, which is called again as by `retry_stream`."""

    async def attempt() -> AsyncIterator[T]:
        yield await call()

    (result,) = [each async for each in retry_stream(attempt, connection)]
    return result


async def gather(calls: Sequence[Callable[[], Awaitable[T]]], concurrency: int) -> list[T]:
    """The results of all calls, some at a time; the first error cancels the others."""
    semaphore = asyncio.Semaphore(concurrency)

    async def one(call: Callable[[], Awaitable[T]]) -> T:
        async with semaphore:
            return await call()

    tasks = [asyncio.ensure_future(one(call)) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def map_settings(request: Request, server: str, names: Mapping[str, str], more: Collection[str] = ()) -> dict[str, Any]:
    """The request's options under the endpoint's names; `names` maps transformers' names to these.

    `more`: the fields of `Sampling` that this endpoint supports beside those that all support.
    Raises ValueError for a setting that has no field, with what to do instead: no setting is dropped silently.
    """
    sampling = request.sampling
    for each in fields(sampling):
        value = getattr(sampling, each.name)
        advice = _ADVICE.get(each.name, "leave it out")
        supported = each.name in (*_SUPPORTED, *more) or value == each.default
        require(supported, f"{server} has no field for {each.name}={value!r}: {advice}")
    require(
        not sampling.top_k or "top_k" in names,
        f"{server} has no field for top_k={sampling.top_k}: give top_p instead",
    )
    for name in request.options:
        if name not in names:
            raise ValueError(unknown_setting(name, [*dict.fromkeys((*SAMPLING_FIELDS, *names))], server))
    return {names[name]: value for name, value in request.options.items()}


async def ask_json(url: str, connection: Connection, content: Mapping[str, Any] | None = None) -> tuple[int, Any]:
    """The status of a GET, or of a POST of `content`, and what is returned if that is JSON.

    Raises for a refused key, a redirect, a busy endpoint.
    """
    # A server that does not know a GET may close the connection, as uvicorn does: the next request needs another one.
    method, headers = ("GET", {"Connection": "close"}) if content is None else ("POST", {})
    try:
        async with within(connection.timeout, redact_url(url), connection.timeout_name):
            response = await connection.client.request(method, url, json=content, headers=headers)
    except httpx2.HTTPError as error:
        raise connection_error(error, redact_url(url), connection, first=content is None) from None
    text = response.content.decode(errors="replace")  # JSON is UTF-8, whatever the header says
    if response.is_redirect or response.status_code in (401, 403, 429, 503):
        raise http_error(response.status_code, error_message(text), redact_url(url), response.headers)
    return response.status_code, json_or_none(text)


async def probe(url: str, connection: Connection, content: Mapping[str, Any] | None = None) -> Any:
    """What is returned if that is JSON, where the answer is optional: None if there is none, as gateways refuse,
    redirect or limit paths that they do not know."""
    with suppress(ConnectionError, PermissionError, TimeoutError):
        return (await ask_json(url, connection, content))[1]
    return None


async def stream_data(url: str, body: dict[str, Any], connection: Connection, address: str) -> AsyncIterator[str]:
    """The data of the server-sent events in the response to a POST, until "[DONE]"."""
    try:
        async with connection.client.stream("POST", url, json=body) as response:
            if not response.is_success:
                text = (await response.aread()).decode(errors="replace")
                message = error_message(text)
                raise http_error(response.status_code, message, address, response.headers)
            lines = lines_of(response.aiter_bytes())
            async for line in lines:
                field, _, data = line.decode(errors="replace").removeprefix("\ufeff").partition(":")
                if field != "data" or not (data := data.strip()):
                    continue
                next_event(response)
                if data == "[DONE]":
                    await _read_to_the_end(lines)
                    return
                yield data
    except httpx2.HTTPError as error:
        raise connection_error(error, address, connection) from None


async def _read_to_the_end(lines: AsyncIterable[bytes]) -> None:
    """Reads what is left of a response, for a second at most: its connection then serves the next request."""
    with suppress(TimeoutError, httpx2.HTTPError):
        async with asyncio.timeout(END_SECONDS):
            async for _ in lines:
                pass


async def lines_of(parts: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The lines of a response, which may be cut anywhere. A line ends at LF, CR or CRLF and at nothing else: generated
    text in JSON may contain the other characters that `str.splitlines` knows."""
    line = bytearray()
    async for part in parts:
        first, *others = part.replace(b"\r", b"\n").split(b"\n")  # CRLF becomes an empty line more, which says nothing
        line += first
        for other in others:
            yield bytes(line)
            line = bytearray(other)
    yield bytes(line)


async def limit_tokens(
    server: Server, requests: Sequence[Request], context: int | None, concurrency: int
) -> Sequence[Request]:
    """The requests, with `max_new_tokens` in place of `max_length`: the endpoint counts the tokens of the prompts.

    As on a local model, the longest prompt sets the limit for all. Raises ValueError if it leaves no room.
    """
    sampling, connection = requests[0].sampling, server.connection
    if sampling.max_length is None:
        return requests
    distinct = {str(each.prompt): each for each in requests}.values()  # several sequences have the same prompt
    calls = [partial(retry, partial(server.count, each), connection) for each in distinct]
    counts = await gather(calls, concurrency)
    context = context or sampling.max_length
    require(
        not context <= max(counts) < sampling.max_length,
        f"a prompt has {max(counts)} tokens, the endpoint's context is {context}, and the answer needs at least one: "
        "shorten it",
    )
    limit = new_token_limit([range(each) for each in counts], context, sampling)
    return [replace(each, sampling=replace(each.sampling, max_length=None, max_new_tokens=limit)) for each in requests]


async def ask_about_prompt(
    url: str, connection: Connection, content: Mapping[str, Any], read: Callable[[Any], T | None]
) -> T:
    """What `read` finds in the response to a POST. Raises ValueError if there is nothing."""
    status, answer = await ask_json(url, connection, content)
    with suppress(TypeError, LookupError):
        if status == 200 and (found := read(answer)) is not None:
            return found
    raise ValueError(
        f"{redact_url(url)} does not count the tokens of the prompt (HTTP {status}), which max_length needs: give "
        "max_new_tokens"
    )
