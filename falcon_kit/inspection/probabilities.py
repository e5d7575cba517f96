"""Attention statistics of every head without T x T maps, and the maps of requested heads.

The text goes through the model in blocks, with the model's own attention (sdpa, flash-attention, quantised, on several
devices). Forward hooks take the queries of each block and the keys in the KV cache, and compute the attention
probabilities again in float32. The statistics of a block are added to running sums before the next block is read, so
memory grows with T, not with T^2.

**A linear statistic is a weight matrix.** The previous-token score, for example, is the sum of all A[i, j] with weight
1 / (T - 1) where j = i - 1, and 0 elsewhere. So the five linear statistics of all heads are one matrix product, and the
chance level of each is the same sum for uniform attention.

Shapes: T time, K keys so far, H query heads, G KV heads, R = H / G, D head_dim, L layers; b rows (queries) of a block.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.generation.arguments import CACHE
from falcon_kit.inspection.hooks import InspectedModel, forward_hooks
from falcon_kit.model.attention import alibi
from falcon_kit.model.checks import is_offloaded
from falcon_kit.model.layers import split_heads
from falcon_kit.model.modeling import FalconModel

Array = NDArray[np.float32]

STATISTICS = {
    "previous": "attention to the previous token",
    "sink": "attention to the first token",
    "duplicate": "attention to earlier copies of the same token",
    "induction": "attention to tokens that followed an earlier copy of the same token",
    "distance": "mean attention distance, in tokens",
    "entropy": "entropy of the attention probabilities, in nats",
    "effective_context": "effective number of attended tokens, exp(entropy)",
}
"""The statistics of every head, each (L, H). A is the attention of a head: rows i are queries, columns j are keys.

- previous: mean of A[i, i-1].
- sink: 1/T sum of A[i, 0] (Gu et al. 2024, arXiv 2410.10781; Xiao et al. 2023, arXiv 2309.17453).
- duplicate: attention to all earlier copies of the query's token, mean over the queries that have such copies.
- induction: attention to all tokens that followed an earlier copy of the query's token, mean over the queries that have
  such tokens. On random tokens repeated with period S it is the induction score, the mean of A[i, i-S+1] over the
  second copy (Olsson et al. 2022, arXiv 2209.11895): see `induction`.
- distance: mean of sum A[i, j] (i - j).
- entropy: mean of H_i = -sum A[i, j] ln A[i, j]; effective_context: mean of exp(H_i).
"""
LINEAR = ("previous", "sink", "duplicate", "induction", "distance")  # the first ones of STATISTICS
_PREFILL_CHUNK_SIZE = 256  # tokens in one forward pass
BLOCK_SIZE = 2**21
"""Attention probabilities of all heads that are computed at once; fits a CPU's caches."""
_BLOCK_SIZE_ELSEWHERE = 2**26


@dataclass(frozen=True, repr=False)
class Measurements:
    """The statistics of all heads, and the requested maps."""

    statistics: Mapping[str, Array]
    """(L, H) for each name in `STATISTICS`; nan if no query counts, as for "duplicate" in a text without duplicates."""
    chance: Mapping[str, float]
    """The value of each statistic for uniform attention over all tokens that a query may attend to."""
    head_similarity: Array
    """(L, H, H): the similarity of the attention of two heads in a layer, from 0 to 1 for equal attention. It is the
    Bhattacharyya coefficient (Bhattacharyya 1943), the sum over keys of sqrt(a b), averaged over queries."""
    maps: Mapping[tuple[int, int], Array]
    """(T, T) attention probabilities of the requested heads, by (layer, head)."""


def measure(
    inspected: InspectedModel, ids: list[int], pairs: list[tuple[int, int]], prefill_chunk_size: int | None
) -> Measurements:
    """Runs the model over a text and measures every head. Keeps the maps of the given pairs (layer, head).

    prefill_chunk_size: see `attention`.
    """
    reader = _AttentionReader(inspected, ids, pairs)
    size = prefill_chunk_size or (len(ids) if is_offloaded(inspected.model) else _PREFILL_CHUNK_SIZE)
    hooks = attention_hooks(inspected, range(inspected.spec.layers), reader.measure)
    with torch.inference_mode(), forward_hooks(inspected, hooks):
        for start in range(0, len(ids), size):
            reader.read(start, min(start + size, len(ids)))
    return reader.measurements()


Rotation = tuple[Tensor, Tensor] | None
"""The cosines and sines, (1, T, D) each, of the rotary embedding; None with ALiBi."""


def attention_hooks(
    inspected: InspectedModel, layers: Iterable[int], use: Callable[[int, Tensor, Rotation, Any], None]
) -> list[tuple[Any, Any]]:
    """Hooks on some layers that call `use` when a layer's attention is computed and its keys are in the KV cache.

    use: gets the layer, the fused projection (1, T, (H + 2 G) x D), the rotation, and the attention module's output.
    Raises ValueError for attention that differs from the model's definition, and in the hooks for a part of the heads.
    """
    check_attention_implementation(inspected)
    kept: list[Tensor] = []
    hooks: list[tuple[Any, Any]] = []

    def keep(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        kept.append(output)

    def hand_over(layer: int, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        fused = kept.pop()
        _check_all_heads(inspected.spec, fused)
        use(layer, fused, _rotation(inspected.spec, kwargs, fused.device), output)

    for layer in layers:
        module = inspected.layers[layer].self_attention
        hooks += [(module.query_key_value, keep), (module, partial(hand_over, layer))]
    return hooks


def check_attention_implementation(inspected: InspectedModel) -> None:
    """Raises ValueError for transformers' eager attention with ALiBi, which differs from the model's definition."""
    config = inspected.decoder.config
    if config.alibi and config._attn_implementation == "eager" and not isinstance(inspected.decoder, FalconModel):
        raise ValueError(
            "transformers' own Falcon adds ALiBi twice in eager attention: load it with attention='grouped', or call "
            "model.set_attn_implementation('sdpa') first"
        )


def _check_all_heads(spec: FalconSpec, fused: Tensor) -> None:
    """Raises ValueError for a fused projection of some of the heads only, as a rank of tensor parallelism has it."""
    if fused.shape[-1] != (spec.query_heads + 2 * spec.kv_heads) * spec.head_dim:
        raise ValueError("the model in this process has only some of the heads: load it without tensor_parallel")


def _rotation(spec: FalconSpec, keywords: Mapping[str, Any], device: torch.device) -> Rotation:
    """The rotation among the keyword arguments of an attention module; transformers passes it with ALiBi too."""
    pair = keywords.get("rotation") if "rotation" in keywords else keywords.get("position_embeddings")
    return None if pair is None or spec.positions == "alibi" else (pair[0].to(device), pair[1].to(device))


def alibi_bias(spec: FalconSpec, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """ALiBi's bias (H, keys) on the score of each key; None for rotary embeddings."""
    if spec.positions != "alibi":
        return None
    return alibi(spec, torch.arange(keys, device=device)[None], dtype)[0].float()


def attention_scores(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """The scores (H, b, K) of queries (H, b, D) and keys (G, K, D) before the mask: q k / sqrt(D), and ALiBi's bias."""
    rows = (query * query.shape[-1] ** -0.5).unflatten(0, (len(key), -1)).flatten(1, 2)  # (G, R x b, D)
    scores = (rows @ key.mT).view(len(query), -1, key.shape[1])
    return scores if bias is None else scores.add_(bias[:, None, : key.shape[1]])


class _AttentionReader:
    """Computes attention probabilities block by block and adds up the statistics."""

    def __init__(self, inspected: InspectedModel, ids: list[int], pairs: list[tuple[int, int]]) -> None:
        self.inspected, self.spec, self.ids = inspected, inspected.spec, ids
        layers, heads = self.spec.layers, self.spec.query_heads
        self.cache = DynamicCache(config=inspected.decoder.config)
        self.start = 0  # the position of the first token in the current forward pass
        self.weights: dict[tuple[int, int, torch.device], Tensor] = {}
        self.sums = np.zeros((len(STATISTICS), layers, heads))
        self.similarity = np.zeros((layers, heads, heads))
        self.maps = {each: np.zeros((len(ids), len(ids)), np.float32) for each in pairs}

    def read(self, start: int, stop: int) -> None:
        """Runs the model on the tokens `start` to `stop`."""
        self.start = start
        self.weights.clear()
        tokens = self.inspected.input_ids(self.ids[start:stop])
        self.inspected.decoder(input_ids=tokens, **{CACHE: self.cache}, use_cache=True)

    def measure(self, layer: int, fused: Tensor, rotation: Rotation, output: Any) -> None:
        """Adds the tokens that the model reads now to the sums of a layer; called by `attention_hooks`."""
        spec = self.spec
        query = split_heads(fused, spec.queries_per_kv_head, spec.head_dim, rotation)[0][0]  # (H, T, D)
        keys = cast(Any, self.cache.layers[layer]).keys[0]  # (G, K, D); (H, K, D) in transformers' own Falcon
        keys = keys[:: len(keys) // spec.kv_heads].float()
        bias = alibi_bias(spec, keys.shape[1], fused.dtype, keys.device)
        query, end = query.float(), self.start + query.shape[1]
        size = BLOCK_SIZE if keys.device.type == "cpu" else _BLOCK_SIZE_ELSEWHERE
        block = max(1, size // (end * spec.query_heads))  # queries
        for first in range(self.start, end, block):
            stop = min(end, first + block)
            rows = query[:, first - self.start : stop - self.start]
            self._accumulate(layer, attention_scores(rows, keys[:, :stop], bias), first, stop)

    def _accumulate(self, layer: int, scores: Tensor, first: int, stop: int) -> None:
        """Adds the queries `first` to `stop` to the sums, from their scores (H, b, K) with K = `stop`."""
        future = torch.ones(stop - first, stop - first, dtype=torch.bool, device=scores.device).triu(1)
        # A finite number, because 0 x infinity is nan.
        scores[:, :, first:].masked_fill_(future, torch.finfo(torch.float32).min)
        probabilities = scores.softmax(-1)
        flat = probabilities.flatten(1)  # (H, b x K)
        linear = (flat @ self._block_weights(first, stop, flat.device).T).T  # (len(LINEAR), H)
        # Entropy is -sum p ln p with ln p = score - ln Z; ln Z is the largest score minus the ln of its probability.
        log_z = scores.amax(-1) - probabilities.amax(-1).log()
        entropy = (log_z - torch.linalg.vecdot(probabilities, scores)).clamp(min=0)  # (H, b)
        self.sums[:, layer] += torch.vstack([linear, entropy.sum(-1), entropy.exp().sum(-1)]).cpu().numpy()
        for (at, head), kept in self.maps.items():
            if at == layer:
                kept[first:stop, :stop] = probabilities[head].cpu().numpy()
        flat = flat.sqrt_()
        self.similarity[layer] += (flat @ flat.T).cpu().numpy()

    def _block_weights(self, first: int, stop: int, device: torch.device) -> Tensor:
        """`_linear_weights`, computed once for all layers on a device."""
        if (first, stop, device) not in self.weights:
            self.weights[first, stop, device] = _linear_weights(self.ids, first, stop, device)
        return self.weights[first, stop, device]

    def measurements(self) -> Measurements:
        """The means over all queries, after the whole text."""
        time, (copies, followers) = len(self.ids), _count_copies(self.ids)
        visible = np.arange(1, time + 1)  # keys that each query may attend to
        # The number of queries that count, and the value of each of them for uniform attention.
        rows: dict[str, tuple[Any, Any]] = {
            "previous": (time - 1, 1 / visible[1:]),
            "sink": (time, 1 / visible),
            "duplicate": (np.count_nonzero(copies), copies / visible),
            "induction": (np.count_nonzero(followers), followers / visible),
            "distance": (time, (visible - 1) / 2),
            "entropy": (time, np.log(visible)),
            "effective_context": (time, visible),
        }
        means = {name: _mean(total, rows[name][0]) for name, total in zip(STATISTICS, self.sums, strict=True)}
        chance = {name: float(_mean(rows[name][1].sum(), rows[name][0])) for name in STATISTICS}
        return Measurements(means, chance, _mean(self.similarity, time), self.maps)


def _mean(total: Any, count: int) -> Any:
    """A mean in float32; nan for a count of 0."""
    return np.asarray(total / count if count else total * np.nan, np.float32)


def _linear_weights(ids: list[int], first: int, stop: int, device: torch.device) -> Tensor:
    """The weight of each pair of a query, `first` to `stop`, and a key before `stop` in each linear statistic:
    (len(LINEAR), b x K).
    """
    tokens = torch.tensor(ids[:stop], device=device)
    query, key = torch.arange(first, stop, device=device)[:, None], torch.arange(stop, device=device)[None]
    past = key < query
    copies = (tokens[first:, None] == tokens[None]) & past
    followers = torch.zeros_like(copies)
    followers[:, 1:] = copies[:, :-1] & past[:, 1:]
    weights = {
        "previous": key == query - 1,
        "sink": (key == 0).expand_as(past),
        "duplicate": copies,
        "induction": followers,
        "distance": (query - key) * past,
    }
    return torch.stack([weights[name].float() for name in LINEAR]).flatten(1)


def _count_copies(ids: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each token (T,): the number of earlier copies, and of earlier tokens that follow such a copy."""
    counter: Counter[int] = Counter()
    copies = []
    for each in ids:
        copies.append(counter[each])
        counter[each] += 1
    doubled = [at > 0 and ids[at - 1] == each for at, each in enumerate(ids)]  # the token itself follows its copy
    return np.array(copies), np.array(copies) - np.array(doubled)
