"""Next-token predictions of a Falcon for every token of a text, and the surprisal of each token.

Logits are computed for a few tokens at a time, never for the whole text at once.

Shapes: T time, V vocabulary, K tokens that are kept.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from falcon_kit.display.errors import check_encodable, is_whole, plain_scalar, require, shown
from falcon_kit.generation.control_tokens import encoding
from falcon_kit.inspection.hooks import InspectedModel, forward_hooks, language_head

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_MAX_LOGITS = 2**24  # logits in memory at once: 64 MiB in float32


@dataclass(frozen=True)
class Candidate:
    """A possible next token."""

    id: int
    text: str
    probability: float
    rank: int
    """Its rank by probability; 0 is the most likely token."""


@dataclass(frozen=True, repr=False)
class Predictions:
    """The model's predictions after each token of a text."""

    top_ids: Ints
    """(T, K): the K most likely next tokens, most likely first."""
    top_probabilities: Floats
    """(T, K): their probabilities."""
    surprisal: Floats
    """(T,): -log2 of the probability of each token given the tokens before it, in bits; nan for the first token."""
    rank: Ints
    """(T,): the rank of each token in the prediction before it, 0 for the most likely; -1 for the first token."""
    target_logits: Floats
    """(T,): the model's logits of the targets."""

    def candidates(self, texts: Callable[[list[int]], Iterable[str]], position: int = -1) -> tuple[Candidate, ...]:
        """The most likely tokens after the token at `position`, most likely first. texts: gives the texts of ids."""
        ids, probabilities = self.top_ids[position].tolist(), self.top_probabilities[position].tolist()
        return tuple(map(Candidate, ids, texts(ids), probabilities, range(len(ids))))


@dataclass(frozen=True, repr=False)
class TargetPredictions(Predictions):
    """Predictions, and the two values of each position from which the logit lens computes contributions."""

    target_ids: Tensor
    """(T,): the target after each token: the most likely next token, or the one that the caller gave."""
    inverse_deviation: Tensor
    """(T,): 1 / sqrt(variance + eps) of the last hidden state, by which the last LayerNorm scales it."""


def predict(inspected: InspectedModel, ids: list[int], top_k: int, target: int | None = None) -> TargetPredictions:
    """Runs the model once. `target` is a token id; None takes the most likely next token of each position."""
    _head(inspected)  # raises before the model runs
    norm, time = inspected.decoder.ln_f, len(ids)
    states: list[tuple[Tensor, Tensor]] = []
    hook = (norm, lambda module, args, kwargs, output: states.append((args[0][0], output[0])))
    with torch.inference_mode(), forward_hooks(inspected, [hook]):
        inspected.decoder(input_ids=inspected.input_ids(ids), use_cache=False)
        ((last, normed),) = states  # (T, d_model) each
        found = TargetPredictions(
            top_ids=np.zeros((time, top_k), np.int64),
            top_probabilities=np.zeros((time, top_k), np.float32),
            surprisal=np.full(time, np.nan, np.float32),
            rank=np.full(time, -1),
            target_ids=torch.zeros(time, dtype=torch.long, device="cpu"),
            target_logits=np.zeros(time, np.float32),
            inverse_deviation=(last.float().var(-1, correction=0) + norm.eps).rsqrt(),
        )
        for rows, logits in logits_in_chunks(inspected, normed):
            _record(found, ids, rows, logits, target)
    return found


def _record(found: TargetPredictions, ids: list[int], rows: slice, logits: Tensor, target: int | None) -> None:
    """Writes the predictions at the positions `rows`, from their logits (t, V), into `found`."""
    log_probabilities, best = logits.log_softmax(-1), logits.topk(found.top_ids.shape[1])
    found.target_ids[rows] = best.indices[:, 0].cpu() if target is None else target
    targets = found.target_ids[rows, None].to(logits.device)
    found.target_logits[rows] = logits.gather(-1, targets)[:, 0].cpu().numpy()
    found.top_ids[rows] = best.indices.cpu().numpy()
    found.top_probabilities[rows] = log_probabilities.gather(-1, best.indices).exp().cpu().numpy()
    following = torch.tensor(ids[rows.start + 1 : rows.stop + 1], dtype=torch.long, device=logits.device)
    after = slice(rows.start + 1, rows.start + 1 + len(following))  # the last token of the text has no next one
    log_probability, rank = log_probability_and_rank(log_probabilities[: len(following)], following)
    found.surprisal[after] = -log_probability / math.log(2)
    found.rank[after] = rank


def logits_in_chunks(inspected: InspectedModel, normed: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Positions, and their float32 logits (t, V), from hidden states (T, d_model) after the last LayerNorm."""
    head = _head(inspected)
    size = max(1, _MAX_LOGITS // inspected.spec.vocabulary)
    for start in range(0, len(normed), size):
        rows = slice(start, min(start + size, len(normed)))
        yield rows, head(normed[rows].to(head.weight.device)).float()


def _head(inspected: InspectedModel) -> Any:
    """The language-modelling head. Raises ValueError if the model has none, or one that is not whole in memory."""
    head = language_head(inspected)
    if getattr(head, "weight", None) is None or len(head.weight) != inspected.spec.vocabulary:
        raise ValueError(f"{type(head).__name__} is not a whole language-modelling head: load without tensor_parallel")
    places = {each.weight.device.type for each in (head, inspected.decoder.ln_f)}
    require("meta" not in places, "the last LayerNorm or the language-modelling head is on disk: load it in memory")
    return head


def log_probability_and_rank(log_probabilities: Tensor, ids: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """The log-probability and the rank of one token id in each row of (t, V)."""
    selected = log_probabilities.gather(-1, ids[:, None])  # (t, 1)
    return selected[:, 0].cpu().numpy(), (log_probabilities > selected).sum(-1).cpu().numpy()


def mean_surprisal(surprisal: Floats) -> float:
    """Mean surprisal in bits per token; nan for a text of one token, since nothing predicts the first."""
    return float(np.mean(surprisal[1:])) if len(surprisal) > 1 else math.nan


def check_top_k(inspected: InspectedModel, top_k: int) -> None:
    """Raises ValueError for a number of candidates out of range."""
    size = inspected.spec.vocabulary
    require(is_whole(top_k, 1, size), f"top_k={shown(top_k)} is not between 1 and {size}, the size of the vocabulary")


def target_id(inspected: InspectedModel, target: str | int) -> int:
    """The id of a token given by its text or id. Raises ValueError for a text that is not exactly one token."""
    given: Any = plain_scalar(target)
    if isinstance(given, str):
        check_encodable(f"target {given!r}", given)
        ids = list(encoding(given, inspected.tokenizer).ids)  # without the token that may begin a text
    else:
        several: Any = given if isinstance(given, Iterable) else [given]
        ids = inspected.encode(several)
    if len(ids) != 1:
        pieces = ", ".join(map(repr, inspected.token_texts(ids)))
        raise ValueError(
            f"target {target!r} is {len(ids)} tokens ({pieces}): give one token; a space before a word is part of it"
        )
    return ids[0]
