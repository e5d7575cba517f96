"""OpenAI-compatible endpoints through the `openai` client: vLLM, llama.cpp's server, `transformers serve`, others.

They agree on the standard fields and differ in the rest. What the kit's settings mean must not depend on a server's
defaults (llama.cpp draws with top_k=40 and min_p=0.05 unless told otherwise), so those are always spelled out.
"""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai

from falcon_kit.display.errors import require, unknown_name
from falcon_kit.serving.protocol import (
    Connection,
    Delta,
    Facts,
    Request,
    failure,
    get_json,
    map_settings,
    message_in,
    redact_url,
    unreachable,
)


@dataclass(frozen=True)
class Dialect:
    """In what a server differs from the standard."""

    name: str
    """For people."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Further settings: transformers' name, and the server's."""
    neutral: Mapping[str, Any] = field(default_factory=dict)
    """Fields that switch the server's own sampling defaults off."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields that make it tell more."""
    logprobs: bool = False
    """Whether it gives log-probabilities in a stream, those before temperature, top_k and top_p."""
    stops: bool = False
    """Whether stop strings may be sent: it says why it ended, or leaves the string in the text."""
    usage: bool = True
    """Whether it has to be asked for its count of tokens."""
    token_prompts: bool = False
    """Whether a prompt may be token ids."""


VLLM = Dialect(
    name="vLLM",
    fields={
        "top_k": "top_k",
        "min_p": "min_p",
        "repetition_penalty": "repetition_penalty",
        "min_new_tokens": "min_tokens",
    },
    neutral={"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},  # it takes defaults from generation_config.json
    extra={"include_stop_str_in_output": True, "return_token_ids": True},
    logprobs=True,
    stops=True,
    token_prompts=True,
)
LLAMA_CPP = Dialect(
    name="llama.cpp",
    fields={"top_k": "top_k", "min_p": "min_p", "typical_p": "typical_p", "repetition_penalty": "repeat_penalty"},
    neutral={"top_k": 0, "min_p": 0.0},
    extra={"timings_per_token": True},
    logprobs=True,
    token_prompts=True,
)
_GENERATION = ("top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")
TRANSFORMERS = Dialect("transformers serve", {name: name for name in _GENERATION}, stops=True, usage=False)
STANDARD = Dialect("an OpenAI-compatible server of another kind")


class OpenAIServer:
    """Speaks with one endpoint of this kind."""

    chats = True

    def __init__(self, url: str, facts: Facts, dialect: Dialect, wire: Connection) -> None:
        self.facts, self.stops, self._dialect, self._wire = facts, dialect.stops, dialect, wire
        self._client = openai.AsyncOpenAI(
            base_url=url,
            api_key=wire.token or "none",  # the client insists on one
            max_retries=0,  # `retry_stream` knows when to
            timeout=wire.waiting,
        )

    def body(self, request: Request) -> dict[str, Any]:
        """The fields of a completion, or of a chat completion."""
        dialect, sampling = self._dialect, request.sampling
        carried = map_settings(request, dialect.name, dialect.fields)
        body: dict[str, Any] = {"model": self.facts.model, "max_tokens": request.new_tokens, "stream": True}
        body |= dialect.extra
        if dialect.usage:
            body["stream_options"] = {"include_usage": True}
        if request.stop and dialect.stops:
            body["stop"] = list(request.stop)
        if request.prompt is None:
            body["messages"] = [dict(message) for message in request.messages]
            body |= {"logprobs": True, "top_logprobs": 1} if dialect.logprobs else {}
        else:
            require(
                isinstance(request.prompt, str) or dialect.token_prompts,
                f"{dialect.name} takes no token ids for a prompt: give the text",
            )
            body["prompt"] = request.prompt
            body |= {"logprobs": 1} if dialect.logprobs else {}
        chosen = _transformers_choice if dialect is TRANSFORMERS else _choice
        body |= chosen(request, carried, dialect)
        return body if sampling.seed is None else body | {"seed": sampling.seed}

    async def deltas(self, body: dict[str, Any]) -> AsyncIterator[Delta]:
        """Sends the request and yields what each chunk says."""
        call = self._client.chat.completions if "messages" in body else self._client.completions
        standard = {"model", "messages", "prompt", "stream"}
        extra = {name: value for name, value in body.items() if name not in standard}
        given = {name: value for name, value in body.items() if name in standard}
        try:
            stream: Any = await call.create(**given, extra_body=extra)
            async with stream:
                async for chunk in stream:
                    for delta in read(chunk.to_dict()):
                        yield delta
        except (openai.OpenAIError, httpx2.HTTPError, json.JSONDecodeError) as error:
            raise self._explain(error) from None  # the client's own error may quote the request

    def _explain(self, error: Exception) -> Exception:
        address = self.facts.address
        if isinstance(error, openai.APIStatusError):
            said = message_in(error.body or error.response.text)
            return failure(error.status_code, self._wire.scrub(said), address, error.response.headers)
        if isinstance(error, openai.APIConnectionError) and isinstance(error.__cause__, httpx2.HTTPError):
            error = error.__cause__
        if isinstance(error, httpx2.HTTPError):
            return unreachable(error, address, self._wire.timeout)
        return ConnectionError(f"{address} reports: {self._wire.scrub(str(error))}")


def _choice(request: Request, carried: dict[str, Any], dialect: Dialect) -> dict[str, Any]:
    """The fields that say how a token is chosen."""
    sampling = request.sampling
    if not sampling.samples:
        return {"temperature": 0.0, **carried}
    chosen = {**dialect.neutral, "temperature": 1.0, "top_p": 1.0, **carried}
    given = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return chosen | {name: value for name, value in given.items() if value is not None}


def _transformers_choice(request: Request, carried: dict[str, Any], _: Dialect) -> dict[str, Any]:
    """The same for `transformers serve`, which takes all but the standard fields from a GenerationConfig as JSON."""
    return {"generation_config": json.dumps(request.sampling.generate_arguments() | carried)}


def read(chunk: Mapping[str, Any]) -> Iterator[Delta]:
    """What a chunk of a stream says, completion or chat; the text goes with the last of its tokens."""
    usage, timings = chunk.get("usage") or {}, chunk.get("timings") or {}
    prompt = usage.get("prompt_tokens") or (timings.get("cache_n") or 0) + (timings.get("prompt_n") or 0) or None
    counted: dict[str, Any] = {
        "prompt_tokens": prompt,
        "new_tokens": usage.get("completion_tokens") or timings.get("predicted_n"),
    }
    for choice in chunk.get("choices") or []:
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        tokens = _tokens(choice)
        yield from (Delta(token_id=token, logprob=logprob) for token, logprob in tokens[:-1])
        token, logprob = tokens[-1] if tokens else (None, float("nan"))
        yield Delta(text, token, logprob, _finish(choice.get("finish_reason"), choice.get("stop_reason")), **counted)
    if not chunk.get("choices"):
        yield Delta(**counted)


def _finish(reason: str | None, stop: Any) -> Any:
    """The kit's word for the end: "stop" is the end token, unless the server names a stop string."""
    if reason is None:
        return None
    if reason == "length":
        return "length"
    return "stop" if isinstance(stop, str) else "eos"


def _tokens(choice: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Ids and log-probabilities: llama.cpp's form, where each has its id, and vLLM's, where they lie side by side."""
    logprobs = choice.get("logprobs") or {}
    if logprobs.get("content"):
        entries, ids = [each["logprob"] for each in logprobs["content"]], choice.get("token_ids")
        ids = ids or [each.get("id") for each in logprobs["content"]]
    else:
        ids = choice.get("token_ids") or []
        entries = logprobs.get("token_logprobs") or [float("nan")] * len(ids)
    return [(id, logprob) for id, logprob in zip(ids, entries, strict=False) if id is not None]


async def discover(url: str, model: str | None, wire: Connection) -> OpenAIServer:
    """Finds out what serves at `url`, by its list of models or else the paths it documents, and which model."""
    status, listed = await get_json(f"{url}/models", wire)
    data = listed.get("data") if isinstance(listed, dict) else None
    models = [each for each in data if isinstance(each, dict) and each.get("id")] if isinstance(data, list) else []
    dialect = await _dialect(url, models, wire)
    if dialect is None:
        raise ConnectionError(
            f"{redact_url(url)} does not speak the OpenAI protocol: its list of models is HTTP {status}. Check the URL"
        )
    entry = {"id": model} if dialect is TRANSFORMERS else _chosen(models, model)
    if not entry["id"]:
        raise ValueError("`transformers serve` does not tell: pass model=, the name or directory it was started with")
    facts = Facts(dialect.name, redact_url(url), entry["id"], await _context(url, entry, dialect, wire))
    return OpenAIServer(url, facts, dialect, wire)


async def _dialect(url: str, models: list[dict[str, Any]], wire: Connection) -> Dialect | None:
    """By the owner that the list names; `transformers serve` has a path that no other has, and maybe no list."""
    owners = {each.get("owned_by") for each in models}
    for owner, dialect in (("vllm", VLLM), ("llamacpp", LLAMA_CPP)):
        if owner in owners:
            return dialect
    _, documented = await get_json(f"{url.removesuffix('/v1')}/openapi.json", wire)
    if isinstance(documented, dict) and "/load_model" in documented.get("paths", {}):
        return TRANSFORMERS
    return STANDARD if models else None


def _chosen(models: list[dict[str, Any]], model: str | None) -> dict[str, Any]:
    """The entry of the model asked for, or of the only one."""
    names = [str(each["id"]) for each in models]
    if model is None and len(names) > 1:
        raise ValueError(f"the endpoint serves several models, pass model=, one of: {', '.join(names)}")
    for each in models:
        if model is None or model in (each["id"], *(each.get("aliases") or ())):
            return each
    raise LookupError(unknown_name("model", str(model), names))


async def _context(url: str, entry: dict[str, Any], dialect: Dialect, wire: Connection) -> int | None:
    """Tokens of prompt and answer that one request may have, as vLLM lists and llama.cpp's /props tells."""
    if dialect is not LLAMA_CPP:
        return entry.get("max_model_len")
    _, properties = await get_json(f"{url.removesuffix('/v1')}/props", wire)
    settings = properties.get("default_generation_settings") if isinstance(properties, dict) else None
    return settings.get("n_ctx") if isinstance(settings, dict) else None
