"""Attention, looked at without holding all of it: statistics of every head, maps of those that are named.

The text goes through the model in blocks, with the model's own attention, whichever that is (sdpa, flash-attention,
quantised, on several devices). Hooks take each block's queries and the keys that the cache holds by then, and compute
the probabilities once more in float32. What a block was needed for is summed up before the next one comes, so memory
grows with T, not with its square.

**A linear statistic is a weight matrix.** The previous-token score, for instance, is the sum of all A[i, j] weighted by
1 / (T - 1) where j = i - 1, and by 0 elsewhere. The five such statistics of all heads are one matrix product, and the
chance level of each is the same sum over attention that is spread evenly.

Shapes: T time, K keys so far, H query heads, G KV heads, R = H / G, D head_dim, L layers; b rows (queries) of a block.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from falcon_kit.inspection.watch import Subject, watching
from falcon_kit.model.attention import alibi
from falcon_kit.model.layers import split_heads

Array = NDArray[np.float32]

STATISTICS = {
    "previous": "attention to the token before",
    "sink": "attention to the first token",
    "duplicate": "attention to earlier copies of the same token",
    "induction": "attention to what followed the same token before",
    "distance": "mean distance looked back, in tokens",
    "entropy": "entropy of a row, in nats",
    "effective_context": "tokens looked at, exp(entropy)",
}
"""What is known of every head, each (L, H). A is its attention, rows i are queries, columns j are keys.

- previous: mean of A[i, i-1].
- sink: 1/T sum of A[i, 0] (Gu et al. 2024, arXiv 2410.10781; Xiao et al. 2023, arXiv 2309.17453).
- duplicate: attention to all earlier copies of a query's own token, mean over the queries that have one.
- induction: attention to all tokens that followed an earlier copy of a query's own token, mean over the queries that
  have one. On random tokens repeated with period S it is the induction score, the mean of A[i, i-S+1] over the second
  copy (Olsson et al. 2022, arXiv 2209.11895): see `induction`.
- distance: mean of sum A[i, j] (i - j).
- entropy: mean of H_i = -sum A[i, j] ln A[i, j]; effective_context: mean of exp(H_i).
"""
LINEAR = tuple(STATISTICS)[:5]
_CHUNK = 256  # tokens that go through the model at once
_BLOCK = {"cpu": 2**21}  # probabilities of all heads that are computed at once: what a CPU's caches like
_BLOCK_ELSEWHERE = 2**26


class Measured(NamedTuple):
    """What is known of all heads after a text."""

    statistics: dict[str, Array]
    """By the names of `STATISTICS`, (L, H)."""
    chance: dict[str, float]
    """The same for attention that is spread evenly."""
    likeness: Array
    """(L, H, H): mean over queries of the sum over keys of sqrt(a b)."""
    maps: dict[tuple[int, int], Array]
    """(T, T), by (layer, head)."""


def measure(watched: Subject, ids: list[int], wanted: list[tuple[int, int]], chunk: int | None) -> Measured:
    """Reads a text, `chunk` tokens at a time, and keeps the maps of the `wanted` pairs of layer and head.

    chunk: unset, 256, or all at once where weights are offloaded and would be read anew each time.
    """
    reader = _Reader(watched, ids, wanted)
    size = chunk or (len(ids) if _offloaded(watched.model) else _CHUNK)
    with torch.inference_mode(), watching(watched, reader.hooks()):
        for start in range(0, len(ids), size):
            reader.read(start, min(start + size, len(ids)))
    return reader.measured()


class _Reader:
    """Reads a text block by block, and sums up what its heads look at."""

    def __init__(self, watched: Subject, ids: list[int], wanted: list[tuple[int, int]]) -> None:
        self.watched, self.spec, self.ids = watched, watched.spec, ids
        layers, heads = self.spec.layers, self.spec.query_heads
        self.cache = DynamicCache(config=watched.decoder.config)
        self.fused: Tensor | None = None  # the projection of the layer at work
        self.start = 0
        self.weights: dict[tuple[int, int, torch.device], Tensor] = {}
        self.linear = np.zeros((layers, heads, len(LINEAR)))
        self.entropy, self.effective = np.zeros((layers, heads)), np.zeros((layers, heads))
        self.roots = np.zeros((layers, heads, heads))
        self.maps = {each: np.zeros((len(ids), len(ids)), np.float32) for each in wanted}

    def hooks(self) -> list[tuple[Any, Any]]:
        """On each layer: one that takes the projection as it comes, one that uses it when the cache has the keys."""
        found = []
        for index, layer in enumerate(self.watched.layers):
            found.append((layer.self_attention.query_key_value, self._keep))
            found.append((layer.self_attention, partial(self._measure, index)))
        return found

    def read(self, start: int, stop: int) -> None:
        """Sends tokens `start` to `stop` through the model."""
        self.start = start
        self.weights.clear()
        tokens = self.watched.tensor(self.ids[start:stop])
        self.watched.decoder(input_ids=tokens, past_key_values=self.cache, use_cache=True)

    def _keep(self, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        self.fused = output

    def _measure(self, layer: int, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        spec, fused = self.spec, cast(Tensor, self.fused)
        self.fused = None
        if fused.shape[-1] != (spec.query_heads + 2 * spec.kv_heads) * spec.head_dim:
            raise ValueError("this process holds some of the heads only: load the model without tensor_parallel")
        rotation = kwargs.get("rotation") if "rotation" in kwargs else kwargs.get("position_embeddings")
        if rotation is not None:
            rotation = tuple(each.to(fused.device) for each in rotation)
        if spec.positions == "alibi":
            rotation = None  # transformers hands one over all the same
        query = split_heads(fused, spec.queries_per_kv_head, spec.head_dim, rotation)[0][0]  # (H, T, D)
        keys = cast(Any, self.cache.layers[layer]).keys[
            0
        ]  # (G, K, D); transformers' own Falcon repeats each for its queries
        keys = keys[:: len(keys) // spec.kv_heads].float()
        bias = None
        if spec.positions == "alibi":
            bias = alibi(spec, torch.arange(keys.shape[1], device=keys.device)[None], fused.dtype)[0].float()  # (H, K)
        grouped = query.float().unflatten(0, (spec.kv_heads, -1)) * spec.head_dim**-0.5  # (G, R, T, D)
        done, end = self.start, self.start + query.shape[1]
        while done < end:
            stop = min(end, done + self._rows(end, keys.device))
            rows = grouped[:, :, done - self.start : stop - self.start].flatten(1, 2)  # (G, R x b, D)
            self._sum_up(layer, rows @ keys[:, :stop].mT, bias, done, stop)
            done = stop

    def _rows(self, keys: int, device: torch.device) -> int:
        return max(1, _BLOCK.get(device.type, _BLOCK_ELSEWHERE) // (keys * self.spec.query_heads))

    def _sum_up(self, layer: int, scores: Tensor, bias: Tensor | None, first: int, stop: int) -> None:
        """Adds what the queries `first` to `stop` show to the sums; scores (G, R x b, K) with K = `stop`."""
        scores = scores.view(self.spec.query_heads, stop - first, stop)  # (H, b, K)
        if bias is not None:
            scores += bias[:, None, :stop]
        future = torch.ones(stop - first, stop - first, dtype=torch.bool, device=scores.device).triu(1)
        # Finite, since 0 x infinity is not a number.
        scores[:, :, first:].masked_fill_(future, torch.finfo(torch.float32).min)
        found = scores.softmax(-1)
        flat = found.flatten(1)  # (H, b x K)
        self.linear[layer] += (flat @ self._weights(first, stop, flat.device).T).cpu().numpy()
        # -sum p ln p with ln p = score - ln Z, where ln Z is the highest score less the ln of the highest p.
        normaliser = scores.amax(-1) - found.amax(-1).log()
        entropy = (normaliser - torch.linalg.vecdot(found, scores)).clamp(min=0)  # (H, b)
        self.entropy[layer] += entropy.sum(-1).cpu().numpy()
        self.effective[layer] += entropy.exp().sum(-1).cpu().numpy()
        for (_, head), kept in ((name, kept) for name, kept in self.maps.items() if name[0] == layer):
            kept[first:stop, :stop] = found[head].cpu().numpy()
        flat = flat.sqrt_()
        self.roots[layer] += (flat @ flat.T).cpu().numpy()

    def _weights(self, first: int, stop: int, device: torch.device) -> Tensor:
        """`_weights`, kept for the other layers of the same device."""
        if (first, stop, device) not in self.weights:
            self.weights[first, stop, device] = _weights(self.ids, first, stop, device)
        return self.weights[first, stop, device]

    def measured(self) -> Measured:
        """The means, when all has been read."""
        time, (copies, followed) = len(self.ids), _repeats(self.ids)
        counts = np.array([time - 1, time, np.count_nonzero(copies), np.count_nonzero(followed), time])
        seen = np.arange(1, time + 1)  # keys that each query may look at
        weights = [1 / seen[1:], 1 / seen, copies / seen, followed / seen, (seen - 1) / 2, np.log(seen), seen]
        sums = [*np.moveaxis(self.linear, -1, 0), self.entropy, self.effective]
        of_all = [*counts, time, time]
        mean = {name: _over(total, count) for name, total, count in zip(STATISTICS, sums, of_all, strict=True)}
        chance = {name: float(_over(each.sum(), n)) for name, each, n in zip(STATISTICS, weights, of_all, strict=True)}
        return Measured(mean, chance, _over(self.roots, time), self.maps)


def _over(total: Any, count: int) -> Any:
    """A mean; nan where nothing was counted."""
    return np.asarray(total / count if count else total * np.nan, np.float32)


def _weights(ids: list[int], first: int, stop: int, device: torch.device) -> Tensor:
    """Which pairs of the queries `first` to `stop` and the keys before `stop` each linear statistic counts, and how:
    (len(LINEAR), b x K).
    """
    tokens = torch.tensor(ids[:stop], device=device)
    query, key = torch.arange(first, stop, device=device)[:, None], torch.arange(stop, device=device)[None]
    past = key < query
    copies = (tokens[first:, None] == tokens[None]) & past
    followed = torch.zeros_like(copies)
    followed[:, 1:] = copies[:, :-1] & past[:, 1:]
    weights = (key == query - 1, (key == 0).expand_as(past), copies, followed, (query - key) * past)
    return torch.stack([each.float() for each in weights]).flatten(1)


def _repeats(ids: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each token (T,): earlier copies of it, and earlier tokens that follow one of them."""
    seen: Counter[int] = Counter()
    copies = []
    for each in ids:
        copies.append(seen[each])
        seen[each] += 1
    doubled = [at > 0 and ids[at - 1] == each for at, each in enumerate(ids)]  # there the follower is the token itself
    return np.array(copies), np.array(copies) - np.array(doubled)


def _offloaded(model: Any) -> bool:
    """Whether weights wait in host memory or on a disk while a GPU computes."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    return bool(places & {"cpu", "disk"}) and len(places) > 1
