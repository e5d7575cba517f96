"""What one chunk of a streamed completion adds, as vLLM, llama.cpp and others write it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from falcon_kit.display.errors import printable
from falcon_kit.generation.text import Alternative, FinishReason
from falcon_kit.serving.protocol import FINISHED, Delta, likeliest, logprob_or


def read_chunk(chunk: Mapping[str, Any]) -> Iterator[Delta]:
    """The deltas of a chunk, completion or chat: one per token, and the text in the last.

    Raises ConnectionError after them for a text that is not whole: it ended by "abort", "error" or "content_filter".
    """
    counts = _counts(chunk)
    for choice in chunk.get("choices") or []:
        if choice.get("index") not in (None, 0):
            raise ValueError(f"it is of answer {choice['index']!r}, where one was asked for")
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        *tokens, last = _tokens(choice) or [Delta()]
        yield from tokens
        finish = _finish_reason(choice)
        yield replace(last, text=text, finish=finish, **counts)
        if choice.get("finish_reason") and not finish:
            raise ConnectionError(f"the server ended it for the reason {printable(choice['finish_reason'])!r}")
    if not chunk.get("choices"):
        yield Delta(**counts)


def _counts(chunk: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of tokens so far, by their names in a `Delta`."""
    usage, timings = chunk.get("usage") or {}, chunk.get("timings") or {}  # llama.cpp sends timings
    prompt = usage.get("prompt_tokens") or (timings.get("cache_n") or 0) + (timings.get("prompt_n") or 0) or None
    return {"prompt_tokens": prompt, "new_tokens": usage.get("completion_tokens") or timings.get("predicted_n")}


def _finish_reason(choice: Mapping[str, Any]) -> FinishReason | None:
    """The kit's finish reason: a server's "stop" means the end-of-sequence token unless it names a stop string."""
    reason = choice.get("finish_reason")
    if not isinstance(reason, str | None):
        raise TypeError(f"finish_reason is {reason!r}, not a text")
    return "stop" if reason == "stop" and isinstance(choice.get("stop_reason"), str) else FINISHED.get(reason or "")


def _tokens(choice: Mapping[str, Any]) -> list[Delta]:
    """A delta without text for each token of a chunk; none where it has no ids. Raises for lists of other lengths."""
    logprobs = choice.get("logprobs") or {}
    content = logprobs.get("content") or _as_content(logprobs)
    ids = choice.get("token_ids") or [each.get("id") for each in content]
    if all(each is None for each in ids):
        return []
    return [_token(token, entry) for token, entry in zip(ids, content or [{}] * len(ids), strict=True)]


def _as_content(logprobs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lists in the log-probabilities of vLLM's completions, as the objects that llama.cpp and all chats send."""
    values = logprobs.get("token_logprobs")
    if not values:
        return []
    tokens, tops = logprobs.get("tokens") or [None] * len(values), logprobs.get("top_logprobs") or [None] * len(values)
    return [
        {"token": token, "logprob": value, "top_logprobs": [{"token": text, "logprob": v} for text, v in top.items()]}
        for token, value, top in zip(tokens, values, (each or {} for each in tops), strict=True)
    ]


def _token(token_id: int | None, entry: Mapping[str, Any]) -> Delta:
    """The delta of one token. vLLM sends the id of the generated token only, so one alternative gets it.

    Raises TypeError for a token without an id.
    """
    if token_id is None:
        raise TypeError("a token among others has no id")
    generated, alternatives = (entry.get("token"), entry.get("logprob")), []
    for each in entry.get("top_logprobs") or []:
        same = token_id if (each["token"], each["logprob"]) == generated else None
        alternatives.append(
            Alternative(_token_text(each), each.get("id", same), logprob_or(-math.inf, each["logprob"]))
        )
    return Delta(
        token_id=token_id, logprob=logprob_or(math.nan, entry.get("logprob")), alternatives=likeliest(alternatives)
    )


def _token_text(entry: Mapping[str, Any]) -> Any:
    """A token by itself, from its bytes where they are sent: they may be an incomplete character."""
    octets = entry.get("bytes")
    return bytes(octets).decode(errors="replace") if isinstance(octets, list) else entry["token"]
