"""`connect`: a Falcon on a server, with the methods of a local one."""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args
from urllib.parse import urlsplit

import httpx2

from falcon_kit.catalogue.names import spec
from falcon_kit.catalogue.spec import SPECIAL_TOKENS, FalconSpec
from falcon_kit.display.errors import is_number, is_whole, printable, require, shown, unknown_name
from falcon_kit.display.tables import html_table
from falcon_kit.generation.chat import ChatFormat, Message, chat_format, check_messages, default_format, render
from falcon_kit.generation.guarding import Guard, GuardedStream, check_given, checked, guarded
from falcon_kit.generation.prompts import Prompt, check_prompt
from falcon_kit.generation.sampling import Sampling, split_settings
from falcon_kit.generation.text import Generation, Piece
from falcon_kit.serving import openai_api, sagemaker, tgi
from falcon_kit.serving.connection import Connection, check_token, redact_url
from falcon_kit.serving.echo import PromptToken, prompt_logprobs
from falcon_kit.serving.failures import Redirected
from falcon_kit.serving.protocol import Request, Server, limit_tokens, retry
from falcon_kit.serving.stream import Answer, RemoteStream, request_answer, wait_for

Api = Literal["openai", "tgi"]
T = TypeVar("T")
MAX_CONCURRENT_REQUESTS = 16
"""Requests that one call sends at the same time."""
_SPECIAL_TOKENS = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))  # of the published vocabulary
_CONTROL_TOKENS = re.compile(r"<\|[^|<>]+\|>")  # as templates of other models write them


@dataclass(frozen=True, repr=False)
class Endpoint:
    """A Falcon behind a URL, with the methods `generate`, `stream` and `chat` of `falcon_kit.Falcon`."""

    model: str
    """The model's name at the endpoint."""
    server: str
    """The server software."""
    address: str
    """The URL without a query."""
    context: int | None
    """The limit for tokens of prompt and answer together; None if neither endpoint nor catalogue contains it."""
    spec: FalconSpec | None
    """The model's shape, if its name is in the catalogue or a local directory."""
    chat_format: ChatFormat
    """Its stop strings end an answer of `chat`; with `own_format` it also renders the conversation."""
    own_format: bool
    """Whether `chat_format` renders the conversation; otherwise the endpoint's own chat template does."""
    _server: Server = field(repr=False)
    _retries: int = field(repr=False)

    def generate(self, prompt: Prompt, *, guardrails: Guard | None = None, **settings: Any) -> Any:
        """Continues a prompt: a `Generation`; for several prompts or sequences a list of them, requested in parallel.

        `settings` are the fields of `falcon_kit.Sampling`, and others that the endpoint has a field for. Sequence
        number n of a prompt has the seed `seed + n`. Raises ValueError for a setting without a field, with what to do
        instead, LookupError for a wrong model name, PermissionError for a refused key, ConnectionError if there is no
        response, TimeoutError if the response pauses too long, and `IncompleteAnswer`, with the text so far, if it
        breaks, or goes on after `max_new_tokens`. guardrails: as in `Falcon.generate`; a blocked prompt is not sent.
        """
        check_given(guardrails, prompt)
        sampling, options = split_settings(settings)
        prompts, single = check_prompt(prompt)
        copies = sampling.num_return_sequences
        require(
            copies == 1 or sampling.samples,
            f"num_return_sequences={copies} without sampling would give {copies} equal texts: set do_sample=True",
        )
        seeds = [None if sampling.seed is None else sampling.seed + copy for copy in range(copies)]
        requests = [
            Request(each, (), replace(sampling, seed=seed, num_return_sequences=1), options, sampling.stop_strings)
            for each in prompts
            for seed in seeds
        ]
        generations = checked(guardrails, lambda: self._generate_all(requests, strip=False))
        return generations[0] if single and copies == 1 else generations

    def stream(
        self, prompt: Prompt | Sequence[Message], *, guardrails: Guard | None = None, **settings: Any
    ) -> RemoteStream | GuardedStream:
        """Continues a prompt, or answers a conversation, piece by piece; closing the iterator closes the connection."""
        check_given(guardrails, prompt)
        return guarded(self._begin_stream(prompt, settings), guardrails)

    def _begin_stream(self, prompt: Prompt | Sequence[Message], settings: dict[str, Any]) -> RemoteStream:
        sampling, options = split_settings(settings)
        require(sampling.num_return_sequences == 1, "a stream yields one text: leave num_return_sequences at 1")
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            return self._stream(self._chat_request(cast(Sequence[Message], prompt), sampling, options), strip=True)
        prompts, single = check_prompt(cast(Prompt, prompt))
        require(single, "a stream yields one text: give one prompt, or use generate()")
        return self._stream(Request(prompts[0], (), sampling, options, sampling.stop_strings), strip=False)

    def chat(self, messages: Sequence[Message], *, guardrails: Guard | None = None, **settings: Any) -> Generation:
        """Answers a conversation: [{"role": "user", "content": "..."}]. The next user turn is a stop string.

        Raises what `generate` raises, and ValueError for unknown roles, messages out of order, or a message that
        contains a special token.
        """
        sampling, options = split_settings(settings)
        require(sampling.num_return_sequences == 1, "chat returns one answer: leave num_return_sequences at 1")
        check_given(guardrails, messages)
        request = self._chat_request(messages, sampling, options)
        return checked(guardrails, lambda: self._generate_all([request], strip=True))[0]

    def accepts(self, **settings: Any) -> bool:
        """Whether the endpoint has a field for each of these settings of `generate`."""
        sampling, options = split_settings(settings)
        try:
            self._server.body(Request(" ", (), sampling, options, sampling.stop_strings))
        except ValueError:
            return False
        return True

    def _chat_request(self, messages: Sequence[Message], sampling: Sampling, options: dict[str, Any]) -> Request:
        """The request for a conversation."""
        checked = check_messages(messages)
        written = _CONTROL_TOKENS.findall(self.chat_format.template) if self.own_format else []
        for number, message in enumerate(checked, 1):
            content = message["content"]
            if special := [*_SPECIAL_TOKENS.findall(content), *(each for each in written if each in content)]:
                raise ValueError(
                    f"message {number} contains {special[0]!r}, which the endpoint would read as a special token: "
                    "write it differently"
                )
        rendered = render(checked, self.chat_format)  # raises ValueError if the last message is the assistant's
        stop = tuple(dict.fromkeys((*self.chat_format.stop, *sampling.stop_strings)))
        return Request(rendered if self.own_format else None, checked, sampling, options, stop)

    def _stream(self, request: Request, strip: bool) -> RemoteStream:
        self._server.body(request)  # raises before anything is sent
        answer = _answer(request, strip)

        async def work(emit: Callable[[Piece], None]) -> Generation:
            (body,) = await self._bodies([request])
            return await request_answer(self._server, body, answer, self._retries, self.context, emit)

        return RemoteStream(answer, work)

    def _generate_all(self, requests: Sequence[Request], strip: bool) -> list[Generation]:
        """All texts, `MAX_CONCURRENT_REQUESTS` at a time; the first error cancels the others."""
        for each in requests:
            self._server.body(each)  # raises before anything is sent
        answers = [_answer(each, strip) for each in requests]

        async def work() -> list[Generation]:
            bodies = await self._bodies(requests)
            pairs = list(zip(bodies, answers, strict=True))
            return await _gather(
                [partial(request_answer, self._server, *pair, self._retries, self.context) for pair in pairs]
            )

        return _with_shared_stats(wait_for(work()))

    def prompt_logprobs(self, prompts: Sequence[str]) -> list[list[PromptToken]]:
        """The tokens of each prompt with their log-probabilities, requested in parallel.

        Raises ValueError for a server that does not return them; vLLM does.
        """
        checked = [check_prompt(prompt)[0][0] for prompt in prompts]
        server, retries = self._server, self._retries
        ask = [partial(prompt_logprobs, server, each) for each in checked]
        return wait_for(_gather([partial(retry, call, retries, server.connection) for call in ask]))

    async def _bodies(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """The bodies of requests with the same settings; with `max_length`, the endpoint counts their prompts first."""
        limited = await limit_tokens(self._server, requests, self.context, self._retries)
        return [self._server.body(each) for each in limited]

    def _facts(self) -> dict[str, str]:
        return {
            "model": self.model,
            "server": self.server,
            "address": self.address,
            "context": f"{self.context} tokens" if self.context else "not reported",
            "chat": f"the kit's {self.chat_format.name} format"
            if self.own_format
            else "the endpoint's own chat template",
        }

    def __repr__(self) -> str:
        context = f", context {self.context}" if self.context else ""
        return f"Endpoint({printable(self.model)} at {printable(self.address)}, {self.server}{context})"

    def _repr_html_(self) -> str:
        return html_table(self.model, (), self._facts().items())


def connect(
    url: str,
    model: str | None = None,
    *,
    api: Api | None = None,
    token: str | None = None,
    chat: str | ChatFormat | None = None,
    context: int | None = None,
    timeout: float = 120.0,
    retries: int = 4,
    deadline: float = 1800.0,
    session: Any = None,
) -> Endpoint:
    """The endpoint at a URL: "http://host:8000/v1" or "sagemaker://endpoint-name".

    model: its name at the endpoint; unset, the only one (`transformers serve` does not report it: give the name or
    directory that it was started with). api: "openai" or "tgi"; unset, detected ("tgi", which is also LMI's schema, on
    SageMaker). token: the API key, which is never shown; unset, FALCON_KIT_TOKEN, or HF_TOKEN for huggingface.co only.
    chat: "falcon", "hub", "baize" or a ChatFormat renders conversations in that format and sends them as plain
    completions; unset, the endpoint's own chat template renders them, if its protocol has conversations (TGI's has
    not). context: its limit in tokens, if it does not report one. timeout: seconds without a byte from it until a
    request fails, and for the whole response to a request for anything but text. deadline: seconds for a whole text,
    however steadily it comes. retries: further attempts, after growing pauses, while the endpoint is busy (429, 503),
    refuses connections or closes them before the first piece. session: a boto3.Session, for SageMaker.

    Raises ConnectionError if no server with such a protocol responds, LookupError for a model or endpoint that does not
    exist, PermissionError for a refused key, and ValueError for an invalid URL or argument, a key that no HTTP header
    can carry, or a proxy that cannot be used.
    """
    require(api is None or api in get_args(Api), unknown_name("api", str(api), get_args(Api)))
    _check_limits(timeout, deadline, retries)
    require(context is None or is_whole(context, 1), f"context={shown(context)} must be at least 1")
    own_format = None if chat is None else chat_format(chat)
    _check_url(url)
    connection = Connection(token or _token_from_environment(url), timeout, retries, deadline)
    check_token(connection.token)
    discover = partial(_discover, url, model, api, connection, session)
    server = wait_for(retry(discover, retries, connection))
    facts, shape = server.facts, _find_spec(server.facts.model)
    return Endpoint(
        model=connection.scrub(facts.model),
        server=facts.server,
        address=connection.scrub(facts.address),
        context=context or facts.context or (shape.context if shape else None),
        spec=shape,
        chat_format=own_format or default_format(shape),
        own_format=own_format is not None or not server.accepts_messages,
        _server=server,
        _retries=retries,
    )


async def _gather(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """The results of all calls, `MAX_CONCURRENT_REQUESTS` at a time; the first error cancels the others."""
    semaphore = asyncio.Semaphore(MAX_CONCURRENT_REQUESTS)

    async def one(call: Callable[[], Awaitable[T]]) -> T:
        async with semaphore:
            return await call()

    tasks = [asyncio.ensure_future(one(call)) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _discover(url: str, model: str | None, api: Api | None, connection: Connection, session: Any) -> Server:
    """The server at the URL, with the protocol that it uses."""
    parts = urlsplit(url.strip())
    if parts.scheme == "sagemaker":
        return await sagemaker.discover(parts.netloc, api or "tgi", model, connection, session)
    base = parts._replace(path=parts.path.rstrip("/").removesuffix("/generate_stream"), query="", fragment="")
    if api == "tgi" or (api is None and not base.path):
        with suppress(*([Redirected] if api is None else [])):  # a server of another kind may redirect an unknown path
            if server := await tgi.discover(base.geturl(), model, connection):
                return server
        if api == "tgi":
            raise ConnectionError(f"{redact_url(url)} is no TGI server: its /info contains no model_id. Check the URL")
    return await openai_api.discover(base._replace(path=base.path or "/v1").geturl(), model, connection)


def _check_limits(timeout: float, deadline: float, retries: int) -> None:
    require(
        all(is_number(each, 0, 1e9) and each > 0 for each in (timeout, deadline)) and is_whole(retries, 0, 1000),
        f"timeout={shown(timeout)} and deadline={shown(deadline)} must be above 0, and at most 1e9; "
        f"retries={shown(retries)} from 0 to 1000",
    )


def _check_url(url: str) -> None:
    """Raises ValueError for what is no URL of an endpoint, without repeating user name, password or query."""
    valid = False
    with suppress(ValueError, httpx2.InvalidURL):  # both may quote a password
        parts = urlsplit(url.strip())
        host, port = httpx2.URL(parts.geturl()).host, parts.port
        valid = parts.scheme in ("http", "https", "sagemaker") and bool(parts.netloc) and port != 0 and bool(host)
    require(
        not valid or "@" not in parts.netloc,
        "the URL contains a user name or password, which logs would show: give a key by token=",
    )
    require(valid, f"{redact_url(url)!r} is no endpoint URL: give http://host:port/v1, or sagemaker://endpoint-name")


def _token_from_environment(url: str) -> str | None:
    """FALCON_KIT_TOKEN for any host, HF_TOKEN over https for huggingface.co and its subdomains only.

    Hosts under huggingface.cloud belong to other users, so they get no key unless it is passed as `token`.
    """
    parts = urlsplit(url.strip())
    host = parts.hostname or ""
    is_hub = parts.scheme == "https" and (host == "huggingface.co" or host.endswith(".huggingface.co"))
    return os.environ.get("FALCON_KIT_TOKEN") or (os.environ.get("HF_TOKEN") if is_hub else None)


def _find_spec(model: str) -> FalconSpec | None:
    """The shape of a model by its name at the endpoint, from the catalogue or a local directory; None if unknown."""
    try:
        return spec(model if Path(model).is_dir() else model.rpartition("/")[2].removesuffix(".gguf"))
    except (LookupError, ValueError, OSError):
        return None


def _answer(request: Request, strip: bool) -> Answer:
    """An empty answer; its prompt is the text sent, or the last message if the endpoint renders the conversation."""
    prompt = request.messages[-1]["content"] if request.prompt is None else request.prompt
    return Answer(
        prompt if isinstance(prompt, str) else "",
        request.stop,
        strip,
        request.sampling.alternatives,
        request.new_tokens,
    )


def _with_shared_stats(generations: list[Generation]) -> list[Generation]:
    """The generations, each with the statistics of the whole call, as for a local batch."""
    if len(generations) == 1:
        return generations
    each = [generation.stats for generation in generations]
    stats = replace(
        each[0],
        rows=len(each),
        prompt_tokens=sum(one.prompt_tokens for one in each),
        new_tokens=sum(one.new_tokens for one in each),
        first_token_seconds=min(one.first_token_seconds for one in each),
        seconds=max(one.seconds for one in each),
    )
    return [replace(generation, stats=stats) for generation in generations]
