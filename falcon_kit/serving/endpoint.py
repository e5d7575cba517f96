"""`connect`: a Falcon that runs elsewhere, with the interface of one that runs here."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args
from urllib.parse import urlsplit

from falcon_kit.catalogue.names import spec
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import require, unknown_name
from falcon_kit.display.tables import html_table
from falcon_kit.generation.chat import ChatFormat, Message, chat_format, check_messages, default_format, render
from falcon_kit.generation.prompts import Prompt, check_prompt
from falcon_kit.generation.sampling import Sampling, split_settings
from falcon_kit.generation.text import Generation, Piece
from falcon_kit.serving import openai_api, sagemaker, tgi
from falcon_kit.serving.protocol import Connection, Request, Server, redact_url, retry_stream
from falcon_kit.serving.stream import Answer, RemoteStream, wait_for, write

Api = Literal["openai", "tgi"]
AT_ONCE = 16
"""Requests of one call that are under way at the same time."""
_CONTROL = re.compile(r"<\|endoftext\|>|>>[A-Z]+<<")  # the published vocabulary's special tokens


@dataclass(frozen=True, repr=False)
class Endpoint:
    """A Falcon behind a URL: `generate`, `stream` and `chat` as those of `falcon_kit.Falcon`."""

    model: str
    """The name it goes by there."""
    server: str
    """What runs there."""
    address: str
    """Where, without a query."""
    context: int | None
    """Tokens of prompt and answer together that it takes; None where neither the endpoint nor the catalogue tells."""
    spec: FalconSpec | None
    """Its shape, where its name is in the catalogue or a directory here."""
    chat_format: ChatFormat
    """Whose stop strings end an answer of `chat`; it also writes the turns where `own_format` is set."""
    own_format: bool
    """Whether `chat` writes the turns in the kit's format; else the endpoint's own template does."""
    _server: Server = field(repr=False)
    _retries: int = field(repr=False)

    def generate(self, prompt: Prompt, **settings: Any) -> Any:  # one or a list: no overload can tell from `settings`
        """Continues a text: a `Generation`; for several texts or sequences, a list of them, written at the same time.

        `settings` are the fields of `falcon_kit.Sampling`, and of others those that the endpoint has a field for; the
        rest is refused with a ValueError that says what to do instead. A seed counts up over several sequences.
        Raises LookupError for a wrong model name, PermissionError for a refused key, ConnectionError where nobody
        answers, TimeoutError where nobody speaks, and `IncompleteAnswer`, with the text so far, where one breaks off.
        """
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
        generations = self._write_all(requests, strip=False)
        return generations[0] if single and copies == 1 else generations

    def stream(self, prompt: Prompt | Sequence[Message], **settings: Any) -> RemoteStream:
        """Continues a text, or answers a conversation, piece by piece; closing the iterator closes the connection."""
        sampling, options = split_settings(settings)
        require(sampling.num_return_sequences == 1, "a stream carries one text: leave num_return_sequences at 1")
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            return self._stream(self._turns(cast(Sequence[Message], prompt), sampling, options), strip=True)
        prompts, single = check_prompt(cast(Prompt, prompt))
        require(single, "a stream carries one text: give one prompt, or use generate()")
        return self._stream(Request(prompts[0], (), sampling, options, sampling.stop_strings), strip=False)

    def chat(self, messages: Sequence[Message], **settings: Any) -> Generation:
        """Answers a conversation: [{"role": "user", "content": "..."}]. Ends before the next speaker's turn.

        Raises ValueError for unknown roles, turns out of order, or a message that spells out a control token, besides
        what `generate` raises.
        """
        sampling, options = split_settings(settings)
        require(sampling.num_return_sequences == 1, "chat gives one answer: leave num_return_sequences at 1")
        return self._write_all([self._turns(messages, sampling, options)], strip=True)[0]

    def _turns(self, messages: Sequence[Message], sampling: Sampling, options: dict[str, Any]) -> Request:
        """The request for a conversation; the next speaker is a stop string."""
        checked = check_messages(messages)
        for number, message in enumerate(checked, 1):
            if found := _CONTROL.search(message["content"]):
                raise ValueError(
                    f"message {number} spells out {found[0]!r}, which the endpoint would take for a control token: "
                    "write it differently"
                )
        rendered = render(checked, self.chat_format)  # raises where there is nothing to answer
        stop = tuple(dict.fromkeys((*self.chat_format.stop, *sampling.stop_strings)))
        return Request(rendered if self.own_format else None, checked, sampling, options, stop)

    def _stream(self, request: Request, strip: bool) -> RemoteStream:
        body, answer = self._server.body(request), _answer(request, strip)

        async def work(emit: Callable[[Piece], None]) -> Generation:
            return await write(self._server, body, answer, self._retries, self.context, emit)

        return RemoteStream(answer, work)

    def _write_all(self, requests: Sequence[Request], strip: bool) -> list[Generation]:
        """All texts, some at a time; the first failure ends the others."""
        bodies = [self._server.body(each) for each in requests]  # raises before anything is sent
        answers = [_answer(each, strip) for each in requests]

        async def work() -> list[Generation]:
            semaphore = asyncio.Semaphore(AT_ONCE)

            async def one(body: dict[str, Any], answer: Answer) -> Generation:
                async with semaphore:
                    return await write(self._server, body, answer, self._retries, self.context)

            tasks = [asyncio.ensure_future(one(*each)) for each in zip(bodies, answers, strict=True)]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

        return _shared(wait_for(work()))

    def _facts(self) -> dict[str, str]:
        return {
            "model": self.model,
            "server": self.server,
            "address": self.address,
            "context": f"{self.context} tokens" if self.context else "it does not tell",
            "chat": f"the kit's {self.chat_format.name} format" if self.own_format else "the endpoint's own template",
        }

    def __repr__(self) -> str:
        context = f", context {self.context}" if self.context else ""
        return f"Endpoint({self.model} at {self.address}, {self.server}{context})"

    def _repr_html_(self) -> str:
        return html_table(self.model, (), self._facts().items())


def connect(
    url: str,
    model: str | None = None,
    *,
    api: Api | None = None,
    token: str | None = None,
    chat: str | None = None,
    context: int | None = None,
    timeout: float = 120.0,
    retries: int = 4,
    session: Any = None,
) -> Endpoint:
    """A Falcon that runs elsewhere: "http://host:8000/v1" or "sagemaker://endpoint-name".

    model: its name there; unset, the only one there is (`transformers serve` does not tell: give what it was started
    with). api: "openai" or "tgi"; unset, found out (on SageMaker "tgi", which is LMI's schema too).
    token: its key; unset, FALCON_KIT_TOKEN, and HF_TOKEN for huggingface.co itself. It is never shown.
    chat: "falcon", "hub" or "baize" writes conversations in that format as plain completions; unset, the endpoint's own
    template does, where its protocol has conversations (TGI's has none). context: tokens it takes, where it does not
    tell. timeout: seconds without a word from it. retries: further attempts, with growing pauses, where it is busy
    (429, 503) or refuses the connection; never once the first piece has come. session: a boto3.Session, for SageMaker.

    Raises ConnectionError where nothing answers in the protocol, LookupError for a model or endpoint that is not there,
    PermissionError for a refused key, and ValueError for a URL or word that is none.
    """
    require(api is None or api in get_args(Api), unknown_name("api", str(api), get_args(Api)))
    require(timeout > 0 and retries >= 0, f"timeout={timeout} must be above 0, retries={retries} at least 0")
    chosen = None if chat is None else chat_format(chat)
    wire = Connection(token or _token(url), timeout, retries)
    server = wait_for(_found(url, model, api, wire, session))
    facts, shape = server.facts, _shape(server.facts.model)
    return Endpoint(
        model=facts.model,
        server=facts.server,
        address=facts.address,
        context=context or facts.context or (shape.context if shape else None),
        spec=shape,
        chat_format=chosen or default_format(shape),
        own_format=chosen is not None or not server.chats,
        _server=server,
        _retries=retries,
    )


async def _found(url: str, model: str | None, api: Api | None, wire: Connection, session: Any) -> Server:
    """The endpoint, asked until it answers."""

    async def once() -> AsyncIterator[Server]:
        yield await _find(url, model, api, wire, session)

    async for server in retry_stream(once, wire.retries):
        return server
    raise AssertionError("retry_stream yields or raises")


async def _find(url: str, model: str | None, api: Api | None, wire: Connection, session: Any) -> Server:
    """What speaks at the URL."""
    parts = urlsplit(url.strip())
    require(
        parts.scheme in ("http", "https", "sagemaker") and bool(parts.netloc),
        f"{redact_url(url)!r} is no endpoint: give http://host:port/v1, or sagemaker://endpoint-name",
    )
    require("@" not in parts.netloc, "the URL holds a user or password, which logs would show: give a key by token=")
    if parts.scheme == "sagemaker":
        server = await asyncio.to_thread(sagemaker.SageMakerServer, parts.netloc, api or "tgi", model, wire, session)
        await asyncio.to_thread(server.check)
        return server
    base = parts._replace(path=parts.path.rstrip("/").removesuffix("/generate_stream"), query="", fragment="")
    if api == "tgi" or (api is None and not base.path):
        if found := await tgi.discover(base.geturl(), model, wire):
            return found
        if api == "tgi":
            raise ConnectionError(f"{redact_url(url)} is no TGI: its /info tells no model. Check the URL")
    return await openai_api.discover(base._replace(path=base.path or "/v1").geturl(), model, wire)


def _token(url: str) -> str | None:
    """The key from the environment; that of Hugging Face goes to its own hosts only, and never in the clear.

    Those under huggingface.cloud are anybody's endpoints: who trusts one gives it the key by `token`.
    """
    parts = urlsplit(url.strip())
    host = parts.hostname or ""
    ours = parts.scheme == "https" and (host == "huggingface.co" or host.endswith(".huggingface.co"))
    return os.environ.get("FALCON_KIT_TOKEN") or (os.environ.get("HF_TOKEN") if ours else None)


def _shape(model: str) -> FalconSpec | None:
    """What the catalogue, or a directory here, knows of a model by its name there."""
    try:
        return spec(model if Path(model).is_dir() else model.rpartition("/")[2].removesuffix(".gguf"))
    except (LookupError, ValueError, OSError):
        return None


def _answer(request: Request, strip: bool) -> Answer:
    """An empty answer; its prompt is the text sent, or the last turn where the endpoint writes the turns out."""
    prompt = request.messages[-1]["content"] if request.prompt is None else request.prompt
    return Answer(prompt if isinstance(prompt, str) else "", request.stop, strip)


def _shared(generations: list[Generation]) -> list[Generation]:
    """Statistics of the whole call for each of its texts, as a batch has them."""
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
