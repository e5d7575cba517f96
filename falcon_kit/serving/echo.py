"""The log-probabilities of a prompt, by the fields `echo` and `logprobs` of a completion: vLLM returns them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from falcon_kit.display.errors import is_whole, require
from falcon_kit.serving.failures import error_message, http_error, reading
from falcon_kit.serving.openai_api import OpenAIServer
from falcon_kit.serving.protocol import Server, ask_json, logprob_or


@dataclass(frozen=True)
class PromptToken:
    """A token of a prompt, as the server cuts it."""

    start: int
    """Where it begins in the prompt, in characters."""
    text: str
    """Its text."""
    logprob: float
    """Its natural log-probability after the tokens before it; nan for the first one."""
    greedy: bool
    """Whether it is the most likely token there."""


async def prompt_logprobs(server: Server, prompt: str) -> list[PromptToken]:
    """The tokens of a prompt. Raises ValueError for a server that does not return them."""
    name, address = server.facts.server, server.facts.address
    refused = f"{name} at {address} does not return the log-probabilities of a prompt: use vLLM, or load the model here"
    if not isinstance(server, OpenAIServer):
        raise ValueError(refused)
    content = {"model": server.facts.model, "prompt": prompt, "echo": True, "logprobs": 1}
    content |= {"max_tokens": 1, "temperature": 0}
    status, answer = await ask_json(f"{server.url}/completions", server.connection, content)
    if status != 200:
        raise http_error(status, error_message(answer), address, {})
    with reading(address):
        tokens = _read(answer, prompt)
    require(bool(tokens), refused)
    return tokens


def _read(completion: Mapping[str, Any], prompt: str) -> list[PromptToken]:
    """The tokens of the prompt in an echoed completion; none where the server did not echo it."""
    choice = completion["choices"][0]
    found = choice.get("logprobs") or {}
    if not str(choice.get("text") or "").startswith(prompt) or not found.get("tokens"):
        return []
    names = ("text_offset", "tokens", "token_logprobs", "top_logprobs")
    rows = zip(*(found[name] for name in names), strict=True)
    return [_token(*row) for row in rows if row[0] < len(prompt)]


def _token(start: int, text: str, logprob: float | None, top: Mapping[str, float] | None) -> PromptToken:
    """A token. Raises TypeError for values that are none of a token; only the first has no log-probability."""
    value = logprob_or(math.nan, logprob)
    greedy = bool(logprob is not None and top and logprob >= max(top.values()))
    if not (is_whole(start, 0) and isinstance(text, str) and (start == 0 or not math.isnan(value))):
        raise TypeError(f"no token: {text!r} at {start!r} with {logprob!r}")
    return PromptToken(start, text, value, greedy)
