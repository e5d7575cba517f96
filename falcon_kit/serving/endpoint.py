"""`connect`: a Falcon on a server, with the methods of a local one."""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from falcon_kit.catalogue.names import spec
from falcon_kit.catalogue.spec import SPECIAL_TOKENS, FalconSpec
from falcon_kit.display.documented import documented
from falcon_kit.display.errors import check_whole, is_whole, printable, require, shown, unknown_name
from falcon_kit.display.tables import html_table
from falcon_kit.generation.calls import Generated, typed
from falcon_kit.generation.chat import ChatFormat, Message, chat_format, check_messages, default_format, render
from falcon_kit.generation.guarding import Guard, GuardedStream, check_given, checked, guarded
from falcon_kit.generation.prompts import Prompt, check_prompt, check_several, is_conversation
from falcon_kit.generation.sampling import Sampling, split_settings
from falcon_kit.generation.text import Generation, Piece
from falcon_kit.serving import openai_api, sagemaker, tgi
from falcon_kit.serving.background import wait_for
from falcon_kit.serving.connection import (
    Connection,
    check_credentials,
    check_seconds,
    check_token,
    check_urls,
    redact_url,
    token_from_environment,
)
from falcon_kit.serving.echo import PromptToken, prompt_logprobs
from falcon_kit.serving.protocol import Request, Server, gather, limit_tokens, retry
from falcon_kit.serving.replicas import Replicas
from falcon_kit.serving.stream import Answer, RemoteStream, request_answer, turn, with_shared_stats

Api = Literal["openai", "tgi"]
_SPECIAL_TOKENS = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))  # of the published vocabulary
_CONTROL_TOKENS = re.compile(r"<\|[^|<>]+\|>")  # as templates of other models write them


@documented
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
    concurrency: int
    """Requests that one call has in flight, at most."""
    _server: Replicas = field(repr=False)

    @property
    def addresses(self) -> list[str]:
        """The URLs without queries: one, or that of each replica."""
        return [each.connection.scrub(each.facts.address) for each in self._server.servers]

    @property
    def api(self) -> str:
        """The protocol, as `connect` takes it."""
        return self._server.api

    @typed
    def generate(self, prompt: Prompt, *, guardrails: Guard | None = None, **settings: Any) -> Generated:
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
        variants = [replace(sampling, seed=seed, num_return_sequences=1) for seed in seeds]
        requests = [_plain_request(each, variant, options) for each in prompts for variant in variants]
        generations = checked(guardrails, lambda: self._generate_all(requests))
        return generations[0] if single and copies == 1 else generations

    def stream(
        self, prompt: Prompt | Sequence[Message], *, guardrails: Guard | None = None, **settings: Any
    ) -> RemoteStream | GuardedStream:
        """Continues a prompt, or answers a conversation, piece by piece; closing the iterator closes the connection."""
        check_given(guardrails, prompt)
        return guarded(self._begin_stream(prompt, settings), guardrails)

    def _begin_stream(
        self, prompt: Prompt | Sequence[Message], settings: dict[str, Any], turns: asyncio.Semaphore | None = None
    ) -> RemoteStream:
        sampling, options = split_settings(settings)
        require(sampling.num_return_sequences == 1, "a stream yields one text: leave num_return_sequences at 1")
        if is_conversation(prompt):
            return self._stream(self._chat_request(prompt, sampling, options), turns)
        prompts, single = check_prompt(prompt)
        require(single, "a stream yields one text: give one prompt, or use generate()")
        return self._stream(_plain_request(prompts[0], sampling, options), turns)

    def chat(self, messages: Sequence[Message], *, guardrails: Guard | None = None, **settings: Any) -> Generation:
        """Answers a conversation: [{"role": "user", "content": "..."}]. The next user turn is a stop string.

        Raises what `generate` raises, and ValueError for unknown roles, messages out of order, or a message that
        contains a special token.
        """
        sampling, options = split_settings(settings)
        require(sampling.num_return_sequences == 1, "chat returns one answer: leave num_return_sequences at 1")
        check_given(guardrails, messages)
        request = self._chat_request(messages, sampling, options)
        return checked(guardrails, lambda: self._generate_all([request]))[0]

    def generate_each(
        self, prompts: Iterable[Prompt | Sequence[Message]], *, guardrails: Guard | None = None, **settings: Any
    ) -> Iterator[Generation]:
        """Continues any number of prompts, or answers conversations, and yields the results in the same order.

        `concurrency` requests are in flight, and at most as many results wait for an earlier one. Only these are lost
        when an error, Ctrl-C or closing the iterator closes the connections. All prompts have the same seed. `settings`
        and errors are those of `generate`.
        """
        check_several(prompts)
        sampling, options = split_settings(settings)
        require(sampling.num_return_sequences == 1, "each prompt gives one text: leave num_return_sequences at 1")
        self._server.body(_plain_request(" ", sampling, options))  # raises before anything is sent
        return self._each(prompts, guardrails, settings)

    def _each(self, prompts: Iterable[Any], guardrails: Guard | None, settings: dict[str, Any]) -> Iterator[Generation]:
        turns, begun = asyncio.Semaphore(self.concurrency), deque[RemoteStream]()
        try:
            for prompt in prompts:
                check_given(guardrails, prompt)
                begun.append(self._begin_stream(prompt, settings, turns))
                if len(begun) == 2 * self.concurrency:
                    yield checked(guardrails, begun[0].wait)
                    begun.popleft()
            while begun:
                yield checked(guardrails, begun[0].wait)
                begun.popleft()
        finally:
            for each in reversed(begun):  # those that wait for their turn first
                each.close()

    def accepts(self, **settings: Any) -> bool:
        """Whether the endpoint has a field for each of these settings of `generate`."""
        sampling, options = split_settings(settings)
        try:
            self._server.body(_plain_request(" ", sampling, options))
        except ValueError:
            return False
        return True

    def _chat_request(self, messages: Sequence[Message], sampling: Sampling, options: dict[str, Any]) -> Request:
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

    def _check(self) -> None:
        """Called before a request: raises if the server is known to have ended."""

    def _stream(self, request: Request, turns: asyncio.Semaphore | None = None) -> RemoteStream:
        self._check()
        self._server.body(request)  # raises before anything is sent
        answer = _answer(request)

        async def work(emit: Callable[[Piece], None]) -> Generation:
            async with turn(turns):
                answer.begin()  # not while it waits for its turn
                (body,) = await self._bodies([request])
                return await request_answer(self._server, body, answer, self.context, emit)

        return RemoteStream(answer, work)

    def _generate_all(self, requests: Sequence[Request]) -> list[Generation]:
        """All texts, `concurrency` at a time; the first error cancels the others."""
        self._check()
        for each in requests:
            self._server.body(each)  # raises before anything is sent
        answers = [_answer(each) for each in requests]

        async def work() -> list[Generation]:
            bodies = await self._bodies(requests)
            pairs = list(zip(bodies, answers, strict=True))
            calls = [partial(request_answer, self._server, *pair, self.context) for pair in pairs]
            return await gather(calls, self.concurrency)

        return with_shared_stats(wait_for(work()))

    def prompt_logprobs(self, prompts: Sequence[str]) -> list[list[PromptToken]]:
        """The tokens of each prompt with their log-probabilities, requested in parallel.

        Raises ValueError for a server that does not return them; vLLM does.
        """
        check_several(prompts)
        self._check()
        checked = [check_prompt(prompt)[0][0] for prompt in prompts]
        asks = [partial(self._prompt_logprobs, each) for each in checked]
        calls = [partial(retry, ask, self._server.connection) for ask in asks]
        return wait_for(gather(calls, self.concurrency))

    async def _prompt_logprobs(self, prompt: str) -> list[PromptToken]:
        async with self._server.choose() as server:
            return await prompt_logprobs(server, prompt)

    async def _bodies(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """The bodies of requests with the same settings; with `max_length`, the endpoint counts their prompts first."""
        limited = await limit_tokens(self._server, requests, self.context, self.concurrency)
        return [self._server.body(each) for each in limited]

    def _facts(self) -> dict[str, str]:
        context = f"{self.context} tokens" if self.context else "not reported"
        chat = f"the kit's {self.chat_format.name} format" if self.own_format else "the endpoint's own chat template"
        return {"model": self.model, "server": self.server, "address": self.address, "context": context, "chat": chat}

    def __repr__(self) -> str:
        context = f", context {self.context}" if self.context else ""
        return f"{type(self).__name__}({printable(self.model)} at {printable(self.address)}, {self.server}{context})"

    def _repr_html_(self) -> str:
        return html_table(self.model, (), self._facts().items())


def connect(
    url: str | Sequence[str],
    model: str | None = None,
    *,
    api: Api | None = None,
    token: str | None = None,
    chat: str | ChatFormat | None = None,
    context: int | None = None,
    timeout: float = 120.0,
    retries: int = 4,
    deadline: float = 1800.0,
    concurrency: int = 16,
    session: Any = None,
) -> Endpoint:
    """The endpoint at a URL: "http://host:8000/v1" or "sagemaker://endpoint-name".

    Several URLs are replicas with the same model: each request goes to the one with the fewest in flight, and from one
    that is busy or ended to another at once.
    model: its name at the endpoint; unset, the only one (`transformers serve` does not report it: give the name or
    directory that it was started with). api: "openai" or "tgi"; unset, detected ("tgi", which is also LMI's schema, on
    SageMaker). token: the API key, which is never shown; "" for none; unset, FALCON_KIT_TOKEN, or HF_TOKEN for the hub.
    chat: "falcon", "hub", "baize" or a ChatFormat renders conversations in that format and sends them as plain
    completions; unset, the endpoint's own chat template renders them, if its protocol has conversations (TGI's has
    not). context: its limit in tokens, if it does not report one. timeout: seconds without a byte from it until a
    request fails, and for the whole response to a request for anything but text. deadline: seconds for a whole text,
    however steadily it comes. retries: further attempts, after growing pauses, while the endpoint is busy (429, 503),
    refuses connections or closes them before the first piece. concurrency: requests that one call has in flight, at
    most, on all replicas together. session: a boto3.Session, for SageMaker.

    Raises ConnectionError if no server with such a protocol responds, LookupError for a model or endpoint that does not
    exist, PermissionError for a refused key, and ValueError for an invalid URL or argument, a key that no HTTP header
    can carry, or a proxy that cannot be used.
    """
    require(api is None or api in get_args(Api), unknown_name("api", str(api), get_args(Api)))
    check_whole("concurrency", concurrency, 1, 10_000)
    check_whole("retries", retries, 0, 1000)
    check_seconds(timeout=timeout, deadline=deadline)
    require(context is None or is_whole(context, 1), f"context={shown(context)} must be at least 1")
    given_format = None if chat is None else chat_format(chat)
    urls = check_urls(url)
    check_credentials(urls, token, session)
    connection = Connection(token_from_environment(urls) if token is None else token, timeout, retries, deadline)
    check_token(connection.token)
    discoveries = [partial(_discover, each, model, api, context, connection, session) for each in urls]
    found = wait_for(gather([partial(retry, each, connection) for each in discoveries], concurrency))
    return _endpoint(Replicas(found), given_format, context, concurrency)


def _endpoint(server: Replicas, given_format: ChatFormat | None, context: int | None, concurrency: int) -> Endpoint:
    connection, facts, shape = server.connection, server.facts, _find_spec(server.facts.model)
    return Endpoint(
        model=connection.scrub(facts.model),
        server=facts.server,
        address=connection.scrub(facts.address),
        context=context or facts.context or (shape.context if shape else None),
        spec=shape,
        chat_format=given_format or default_format(shape),
        own_format=given_format is not None or server.api == "tgi",
        concurrency=concurrency,
        _server=server,
    )


async def _discover(
    url: str, model: str | None, api: Api | None, context: int | None, connection: Connection, session: Any
) -> Server:
    """The server at the URL, with the protocol that it uses."""
    parts = urlsplit(url.strip())
    if parts.scheme == "sagemaker":
        return await sagemaker.discover(parts.netloc, api or "tgi", model, connection, session)
    base = parts._replace(path=parts.path.rstrip("/").removesuffix("/generate_stream"), query="", fragment="")
    if api == "tgi" or (api is None and not base.path):
        if server := await tgi.discover(base.geturl(), model, connection, certain=api == "tgi"):
            return server
        if api == "tgi":
            raise ConnectionError(f"{redact_url(url)} is no TGI server: its /info contains no model_id. Check the URL")
    return await openai_api.discover(base._replace(path=base.path or "/v1").geturl(), model, connection, context)


def _find_spec(model: str) -> FalconSpec | None:
    """The shape of a model by its name at the endpoint, from the catalogue or a local directory; None if unknown."""
    try:
        return spec(model if Path(model).is_dir() else model.rpartition("/")[2].removesuffix(".gguf"))
    except (LookupError, ValueError, OSError):
        return None


def _plain_request(prompt: str | Sequence[int], sampling: Sampling, options: dict[str, Any]) -> Request:
    """The request to continue a prompt."""
    return Request(prompt, (), sampling, options, sampling.stop_strings)


def _answer(request: Request) -> Answer:
    """An empty answer; its prompt is the text sent, or the last message if the endpoint renders the conversation."""
    prompt = request.messages[-1]["content"] if request.prompt is None else request.prompt
    text, in_chat = prompt if isinstance(prompt, str) else "", bool(request.messages)
    return Answer(text, request.stop, in_chat, request.sampling.alternatives, request.new_tokens)
