"""OpenAI-compatible endpoints: vLLM, llama.cpp's server, `transformers serve`, others.

They share the standard fields and differ in the rest. A server's own defaults (llama.cpp samples with top_k=40 and
min_p=0.05) must not change what the kit's settings mean, so every request overrides them.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from falcon_kit.display.errors import is_whole, require, unknown_name
from falcon_kit.generation.sampling import Sampling
from falcon_kit.serving.chunks import read_chunk
from falcon_kit.serving.connection import Connection, redact_url
from falcon_kit.serving.failures import error_message, http_error, json_or_none, length, nested, reading, token_count
from falcon_kit.serving.protocol import (
    Delta,
    Facts,
    Request,
    ask_about_prompt,
    ask_json,
    map_settings,
    probe,
    stream_data,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Dialect:
    """How a server differs from the standard."""

    name: str
    """The name in error messages."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Further settings: transformers' name and the server's."""
    neutral: Mapping[str, Any] = field(default_factory=dict)
    """Fields that switch off the server's own sampling defaults."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields that request token ids, stop strings in the text, or timings."""
    logprobs: bool = False
    """Whether it streams log-probabilities, those before temperature, top_k and top_p."""
    lists_generated: bool = False
    """Whether the generated token takes one of the places in a chat's top_logprobs, likely or not."""
    accepts_stop: bool = False
    """Whether a request may contain stop strings: the server names the one it found, or leaves it in the text."""
    token_prompts: bool = False
    """Whether a prompt may be token ids."""
    counts: bool = False
    """Whether it counts the tokens of a prompt."""


VLLM = Dialect(
    name="vLLM",
    fields={
        "top_k": "top_k",
        "min_p": "min_p",
        "repetition_penalty": "repetition_penalty",
        "min_new_tokens": "min_tokens",
    },
    neutral={"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},  # vLLM reads generation_config.json
    extra={"include_stop_str_in_output": True, "return_token_ids": True},
    logprobs=True,
    lists_generated=True,
    accepts_stop=True,
    token_prompts=True,
    counts=True,
)
LLAMA_CPP = Dialect(
    name="llama.cpp",
    fields={"top_k": "top_k", "min_p": "min_p", "typical_p": "typical_p", "repetition_penalty": "repeat_penalty"},
    neutral={"top_k": 0, "min_p": 0.0},
    extra={"timings_per_token": True},
    logprobs=True,
    token_prompts=True,
    counts=True,
)
_GENERATION = ("top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")
TRANSFORMERS = Dialect("transformers serve", {name: name for name in _GENERATION}, accepts_stop=True)
STANDARD = Dialect("an OpenAI-compatible server of another kind")


class OpenAIServer:
    """An endpoint with the OpenAI protocol."""

    api = "openai"

    def __init__(self, url: str, facts: Facts, dialect: Dialect, connection: Connection) -> None:
        self.facts, self._dialect, self.connection = facts, dialect, connection
        self.url, self._root = url, url.removesuffix("/v1")
        self._control_tokens: dict[int | None, str] = {}

    def body(self, request: Request) -> dict[str, Any]:
        return request_body(request, self.facts.model, self._dialect)

    async def deltas(self, body: dict[str, Any]) -> AsyncIterator[Delta]:
        address, begun = self.facts.address, False
        url = f"{self.url}/{'chat/completions' if 'messages' in body else 'completions'}"
        async with aclosing(stream_data(url, body, self.connection, address)) as events:  # type: ignore[type-var]
            async for event in events:
                for delta in read_event(event, address, begun):
                    yield await self._name_control_tokens(delta)
                begun = True

    async def count(self, request: Request) -> int:
        """The tokens of the prompt or of the conversation in the endpoint's template."""
        if not isinstance(request.prompt, str | None):
            return len(request.prompt)
        messages = {"messages": [dict(message) for message in request.messages]}
        if self._dialect is VLLM:
            given = messages if request.prompt is None else {"prompt": request.prompt}
            content = {"model": self.facts.model} | given
            return await self._ask("tokenize", content, lambda answer: token_count(answer["count"]))
        text = request.prompt or await self._ask("apply-template", messages, lambda answer: answer["prompt"])
        whole = {"content": text, "add_special": True, "parse_special": True}  # as in llama.cpp's completions
        return await self._ask("tokenize", whole, lambda answer: length(answer["tokens"]))

    def _ask(self, path: str, content: dict[str, Any], read: Callable[[Any], T | None]) -> Awaitable[T]:
        return ask_about_prompt(f"{self._root}/{path}", self.connection, content, read)

    async def _name_control_tokens(self, delta: Delta) -> Delta:
        """The delta with the texts of control tokens among its alternatives, which llama.cpp leaves out."""
        if self._dialect is not LLAMA_CPP or all(each.text for each in delta.alternatives):
            return delta
        for each in delta.alternatives:
            if not each.text and each.token_id not in self._control_tokens:
                answer = await probe(f"{self._root}/detokenize", self.connection, {"tokens": [each.token_id]})
                text = nested(answer, "content")  # none where llama.cpp does not return it
                self._control_tokens[each.token_id] = text if isinstance(text, str) else ""
        named = (replace(each, text=each.text or self._control_tokens[each.token_id]) for each in delta.alternatives)
        return replace(delta, alternatives=tuple(named))


def request_body(request: Request, model: str, dialect: Dialect) -> dict[str, Any]:
    """The fields of a completion, or of a chat completion."""
    sampling = request.sampling
    more = [name for name, has in (("alternatives", dialect.logprobs), ("max_length", dialect.counts)) if has]
    options = map_settings(request, dialect.name, dialect.fields, more)
    likely = max(1, sampling.alternatives)
    body: dict[str, Any] = {"model": model, "max_tokens": request.new_tokens, "stream": True}
    body |= dialect.extra
    if dialect is not TRANSFORMERS:  # which sends the token counts unasked
        body["stream_options"] = {"include_usage": True}
    if request.stop and dialect.accepts_stop:
        body["stop"] = list(request.stop)
    if request.prompt is None:
        body["messages"] = [dict(message) for message in request.messages]
        if dialect.lists_generated and sampling.alternatives:
            likely += 1
        body |= {"logprobs": True, "top_logprobs": likely} if dialect.logprobs else {}
    else:
        require(
            isinstance(request.prompt, str) or dialect.token_prompts,
            f"{dialect.name} takes no token ids for a prompt: give the text",
        )
        body["prompt"] = request.prompt
        body |= {"logprobs": likely} if dialect.logprobs else {}
    body |= _sampling_fields(sampling, options, dialect)
    return body if sampling.seed is None else body | {"seed": sampling.seed}


def read_event(event: str, address: str, begun: bool) -> Iterator[Delta]:
    """The deltas of an event. Raises for an error in it; a text that has begun was not refused, it broke off."""
    with reading(address):
        chunk: Any = json_or_none(event)
        error = chunk.get("error")
    if error:
        message, status = error_message(error), nested(error, "code")  # vLLM's for what it refuses after HTTP 200
        refused = is_whole(status, 400, 599) and not begun
        raise http_error(status, message, address, {}) if refused else ConnectionError(f"{address} reports: {message}")
    with reading(address):
        yield from read_chunk(chunk)


def _sampling_fields(sampling: Sampling, options: dict[str, Any], dialect: Dialect) -> dict[str, Any]:
    """The fields that decide how the next token is chosen."""
    if dialect is TRANSFORMERS:  # which reads all but the standard fields from a GenerationConfig as JSON
        return {"generation_config": json.dumps(sampling.generate_arguments() | options)}
    if not sampling.samples:
        return {**dialect.neutral, "temperature": 0.0, **options}
    defaults = {**dialect.neutral, "temperature": 1.0, "top_p": 1.0, **options}
    chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or None}
    return defaults | {name: value for name, value in chosen.items() if value is not None}


async def discover(url: str, model: str | None, connection: Connection, context: int | None = None) -> OpenAIServer:
    """The server at `url`. Its list of models and its documented paths show which software it is. context: if known."""
    status, listed = await ask_json(f"{url}/models", connection)
    data = nested(listed, "data")
    entries = data if isinstance(data, list) else []
    models = [each for each in entries if isinstance(nested(each, "id"), str) and each["id"]]
    dialect = await _dialect(url, models, connection)
    if dialect is None:
        raise ConnectionError(
            f"{redact_url(url)} is no OpenAI-compatible server: GET /models returned HTTP {status}. Check the URL"
        )
    entry = {"id": model} if dialect is TRANSFORMERS else _find_model(models, model)
    if not entry["id"]:
        raise ValueError(
            "`transformers serve` does not report its model: pass model=, the name or directory it was started with"
        )
    context = context or await _context(url, entry, dialect, connection)
    return OpenAIServer(url, Facts(dialect.name, redact_url(url), entry["id"], context), dialect, connection)


async def _dialect(url: str, models: list[dict[str, Any]], connection: Connection) -> Dialect | None:
    """The dialect by the owner in the list of models; `transformers serve` has no owner but a path of its own."""
    owners = [each.get("owned_by") for each in models]
    for owner, dialect in (("vllm", VLLM), ("llamacpp", LLAMA_CPP)):
        if owner in owners:
            return dialect
    documented = await probe(f"{url.removesuffix('/v1')}/openapi.json", connection)
    if nested(documented, "paths", "/load_model") is not None:
        return TRANSFORMERS
    return STANDARD if models else None


def _find_model(models: list[dict[str, Any]], model: str | None) -> dict[str, Any]:
    """The entry of that model, or of the only one."""
    names = [str(each["id"]) for each in models]
    require(
        model is not None or len(names) <= 1,
        f"the endpoint serves several models, pass model=, one of: {', '.join(names)}",
    )
    for each in models:
        aliases = each.get("aliases")
        if model in (None, each["id"]) or (isinstance(aliases, list) and model in aliases):
            return each
    raise LookupError(unknown_name("model", str(model), names))


async def _context(url: str, entry: dict[str, Any], dialect: Dialect, connection: Connection) -> int | None:
    """The limit for tokens of prompt and answer, from vLLM's list of models or llama.cpp's /props."""
    if dialect is not LLAMA_CPP:
        return token_count(entry.get("max_model_len"))
    properties = await probe(f"{url.removesuffix('/v1')}/props", connection)
    return token_count(nested(properties, "default_generation_settings", "n_ctx"))
