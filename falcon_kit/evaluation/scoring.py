"""Log-probabilities of given tokens: many rows in batches, sorted by length, equal inputs computed once.

Shapes: B rows of a batch, T time, N scored tokens, d d_model, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from falcon_kit.display.errors import require
from falcon_kit.generation.control_tokens import encode_prompts
from falcon_kit.generation.prompts import check_tokens
from falcon_kit.inspection.hooks import InspectedModel, evaluation_mode
from falcon_kit.inspection.predictions import logits_in_chunks

_TOKENS, _TOKENS_ON_A_CPU = 16384, 2048
"""Tokens of a batch, padding included. More are no faster: on a CPU, 2048 fit its caches."""


@dataclass(frozen=True)
class Row:
    """Tokens of which the last ones are scored, each given all before it."""

    ids: tuple[int, ...]
    """The token ids: context, then what is scored. The model reads all but the last."""
    scored: int
    """The number of scored tokens, at most len(ids) - 1."""


@dataclass(frozen=True)
class Scores:
    """The scored tokens of a row."""

    logprobs: NDArray[np.float64]
    """Their natural log-probabilities, in order."""
    greedy: bool
    """Whether each is the most likely token at its place."""

    @property
    def total(self) -> float:
        """The log-probability of all of them together."""
        return float(self.logprobs.sum())


def score(inspected: InspectedModel, rows: Sequence[Row], batch_size: int | None = None) -> list[Scores]:
    """The scores of each row, in float32, whatever the order and the batches.

    batch_size: rows in a batch; None takes as many as fit a fixed number of tokens. Rows are padded on the right, where
    a causal model does not look. Raises ValueError for ids outside the vocabulary.
    """
    check_tokens([list(row.ids) for row in rows], inspected.spec.vocabulary)
    readers: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        readers.setdefault(row.ids[:-1], []).append(number)
    found: dict[int, Scores] = {}
    with torch.inference_mode(), evaluation_mode(inspected.model):
        for inputs in _batches(sorted(readers, key=len, reverse=True), inspected, batch_size):
            each_row = [(place, row, rows[row]) for place, ids in enumerate(inputs) for row in readers[ids]]
            found.update(_score_batch(inspected, inputs, each_row))
    return [found[number] for number in range(len(rows))]


def _batches(
    inputs: list[tuple[int, ...]], inspected: InspectedModel, batch_size: int | None
) -> Iterator[list[tuple[int, ...]]]:
    """The inputs, longest first, in batches."""
    device = inspected.decoder.get_input_embeddings().weight.device
    limit = _TOKENS_ON_A_CPU if device.type == "cpu" else _TOKENS
    start = 0
    while start < len(inputs):
        size = batch_size or max(1, limit // len(inputs[start]))
        yield inputs[start : start + size]
        start += size


def _score_batch(
    inspected: InspectedModel, inputs: list[tuple[int, ...]], readers: list[tuple[int, int, Row]]
) -> Iterator[tuple[int, Scores]]:
    """The number of each row and its scores. readers: the place of its input in the batch, its number, the row."""
    padded = np.zeros((len(inputs), len(inputs[0])), np.int64)
    for place, ids in enumerate(inputs):
        padded[place, : len(ids)] = ids
    device = inspected.decoder.get_input_embeddings().weight.device
    output: Any = inspected.decoder(input_ids=torch.from_numpy(padded).to(device), use_cache=False, return_dict=True)
    hidden = output.last_hidden_state  # (B, T, d), after the last LayerNorm; no mask, since padding is on the right
    places = np.concatenate([np.full(row.scored, place) for place, _, row in readers])
    times = np.concatenate([np.arange(len(row.ids) - 1 - row.scored, len(row.ids) - 1) for _, _, row in readers])
    targets = np.concatenate([row.ids[-row.scored :] for _, _, row in readers])
    picked = hidden[torch.from_numpy(places).to(hidden.device), torch.from_numpy(times).to(hidden.device)]  # (N, d)
    logprobs, greedy = _of_targets(inspected, picked, torch.from_numpy(targets))
    ends = np.cumsum([row.scored for _, _, row in readers])
    for (_, number, row), end in zip(readers, ends, strict=True):
        part = slice(end - row.scored, end)
        yield number, Scores(logprobs[part], bool(greedy[part].all()))


def _of_targets(
    inspected: InspectedModel, picked: Tensor, targets: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The log-probability of each target, and whether it is the most likely token."""
    logprobs, greedy = np.zeros(len(targets)), np.zeros(len(targets), bool)
    for rows, logits in logits_in_chunks(inspected, picked):
        wanted = targets[rows].to(logits.device)
        chosen = logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(-1)
        logprobs[rows] = chosen.double().cpu().numpy()
        greedy[rows] = (logits.argmax(-1) == wanted).cpu().numpy()
    require(
        bool(np.isfinite(logprobs).all()),
        "the model returns log-probabilities that are not finite: its numbers overflow in this dtype, or its weights "
        'are damaged. Load it with dtype="bfloat16" or "float32"',
    )
    return logprobs, greedy


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """The token ids of each context and of its continuation, split as lm-eval splits them.

    The continuation is what follows the context's tokens in the tokens of both together. White space at the end of the
    context belongs to the continuation, since a word's token begins with its space. An empty context becomes the token
    that stands before a text. Raises ValueError for a continuation without a token of its own.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    texts = list(dict.fromkeys(each for each in (*contexts, *(first + rest for first, rest in pairs)) if each))
    ids = dict(zip(texts, encode_prompts(texts, tokenizer), strict=True)) if texts else {}
    split = []
    for context, (before, after) in zip(contexts, pairs, strict=True):
        first = list(ids.get(context, ()))
        rest = list(ids.get(before + after, ()))[len(first) :]
        if not first:
            prefix = prefix_token(tokenizer)
            first, rest = [prefix], rest[1:] if rest[:1] == [prefix] else rest
        require(bool(rest), f"{after!r} has no token of its own after {before[-40:]!r}")
        split.append((first, rest))
    return split


def prefix_token(tokenizer: Any) -> int:
    """The token that stands before the first one of a text: the beginning-of-text token, or the end-of-text token."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    require(token is not None, "the tokenizer has no bos_token and no eos_token, one of which stands before a text")
    return int(token)
