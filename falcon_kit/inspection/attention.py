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

import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from falcon_kit.catalogue import unknown_name
from falcon_kit.inspection.watch import Subject, Text, check_index, subject, watching
from falcon_kit.layers import split_heads
from falcon_kit.modeling import FalconModel, alibi
from falcon_kit.plots import attention as plots
from falcon_kit.shapes import FalconSpec, format_bytes, html_table
from falcon_kit.views.attention import attention_page
from falcon_kit.views.page import Page, visible

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]  # it brings no types of its own
    from matplotlib.figure import Figure

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
MAX_BYTES = 256 * 2**20
_CHUNK = 256  # tokens that go through the model at once
_BLOCK = {"cpu": 2**21}  # probabilities of all heads that are computed at once: what a CPU's caches like
_BLOCK_ELSEWHERE = 2**26


@dataclass(frozen=True, repr=False)
class AttentionView:
    """What the heads of a Falcon look at in one text: a grid of all heads in Jupyter, linked tokens by `to_html`."""

    spec: FalconSpec
    """The model's shape."""
    ids: tuple[int, ...]
    """The text's token ids."""
    words: tuple[str, ...]
    """Each token's text."""
    statistics: Mapping[str, Array]
    """By the names of `STATISTICS`: (L, H); nan where no query of the text counts, such as duplicates without any."""
    chance: Mapping[str, float]
    """What each statistic is for attention spread evenly over all that a query may see."""
    likeness: Array
    """(L, H, H): how alike two heads of a layer attend, the Bhattacharyya coefficient of their rows, sum over keys of
    sqrt(a b), mean over queries: 1 the same, 0 nothing in common (Bhattacharyya 1943)."""
    maps: Mapping[tuple[int, int], Array]
    """(T, T) probabilities of the heads that were asked for, by (layer, head)."""

    def map(self, layer: int, head: int) -> Array:
        """The probabilities (T, T) of a head. Raises KeyError, which says how to keep it, where it was not kept."""
        if (layer, head) not in self.maps:
            check_index(layer, self.spec.layers, "layer")
            check_index(head, self.spec.query_heads, "head")
            kept = ", ".join(f"{each[0]}.{each[1]}" for each in list(self.maps)[:8]) or "none"
            raise KeyError(
                f"the map of layer {layer}, head {head} was not kept (kept: {kept}): ask for it with layers, heads"
            )
        return self.maps[layer, head]

    def group_map(self, layer: int, group: int) -> Array:
        """The mean map (T, T) of the query heads that share a KV head. Raises KeyError where one was not kept."""
        check_index(group, self.spec.kv_heads, "KV group")
        shared = self.spec.queries_per_kv_head
        heads = range(group * shared, (group + 1) * shared)
        return np.mean([self.map(layer, head) for head in heads], axis=0, dtype=np.float32)

    @property
    def likeness_within(self) -> Array:
        """(L, G): mean likeness of two query heads that share a KV head; nan where a group has one head."""
        groups, shared = self.spec.kv_heads, self.spec.queries_per_kv_head
        square = self.likeness.reshape(-1, groups, shared, groups, shared)
        own = np.einsum("lgagb->lgab", square)
        pairs = shared * (shared - 1)
        total = own.sum((-1, -2)) - np.einsum("lgaa->lg", own)
        return total / pairs if pairs else np.full_like(total, np.nan)

    @property
    def likeness_across(self) -> Array:
        """(L,): mean likeness of two query heads of different KV heads; nan where there is one KV head."""
        heads, shared = self.spec.query_heads, self.spec.queries_per_kv_head
        group = np.arange(heads) // shared
        other = group[:, None] != group[None]
        return self.likeness[:, other].mean(-1) if other.any() else np.full(len(self.likeness), np.nan, np.float32)

    def top(self, statistic: str = "induction", count: int = 5) -> list[tuple[int, int, float]]:
        """The heads with the highest values: (layer, head, value), highest first."""
        values = self.statistics[check_statistic(statistic)]
        best = np.argsort(-np.nan_to_num(values, nan=-np.inf), axis=None)[:count]
        return [(int(at // values.shape[1]), int(at % values.shape[1]), float(values.flat[at])) for at in best]

    def figure(self, statistic: str = "induction") -> Figure:
        """All heads at a glance: a panel for each layer, in it a row for each KV group."""
        values, label = self.statistics[check_statistic(statistic)], STATISTICS[statistic]
        title = f"{self.spec.name}: {statistic.replace('_', ' ')}"
        return plots.heads(values, self.spec.kv_heads, title, label, self.chance[statistic])

    def map_figure(self, layer: int, head: int | None = None, *, group: int | None = None) -> Figure:
        """One map large: of a head, or the mean of a KV group. Raises KeyError where it was not kept."""
        if (head is None) == (group is None):
            raise ValueError("name either a head or a group: map_figure(layer, head) or map_figure(layer, group=...)")
        found = self.map(layer, head) if head is not None else self.group_map(layer, cast(int, group))
        which = f"head {head}" if head is not None else f"KV group {group}, mean of its heads"
        words = [visible(word, spaces=True) for word in self.words]
        return plots.one_map(found, words, f"{self.spec.name}: layer {layer}, {which}")

    def likeness_figure(self) -> Figure:
        """How alike the query heads are that share a KV head, layer by layer, beside those that do not."""
        return plots.likeness(self.likeness_within, self.likeness_across)

    def page(self) -> Page:
        """The linked view of the maps that were kept: thumbnails, one large, and the text to point at."""
        if not self.maps:
            raise ValueError("no maps were kept, and the view shows maps: name some by layers and heads")
        return attention_page(f"Attention of {self.spec.name}", self.words, self._rows())

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the linked view as a page of its own, at most a megabyte, and returns its path."""
        return self.page().write(path)

    def _rows(self) -> dict[str, dict[str, tuple[str, Array]]]:
        """The maps that were kept, by KV group; a group that is whole shows the mean of its heads too."""
        shared, rows = self.spec.queries_per_kv_head, defaultdict[str, dict[str, tuple[str, Array]]](dict)
        for (layer, head), found in self.maps.items():
            rows[f"layer {layer}, KV group {head // shared}"][f"layer {layer}, head {head}"] = (f"head {head}", found)
        for (layer, group), count in Counter((layer, head // shared) for layer, head in self.maps).items():
            if count == shared > 1:
                name = f"layer {layer}, KV group {group}"
                rows[name][f"{name}, mean of its heads"] = ("mean", self.group_map(layer, group))
        return dict(rows)

    def to_dataframe(self) -> pd.DataFrame:
        """A row for every head: layer, head, group, and its statistics."""
        import pandas as pd

        layers, heads = np.indices(self.likeness.shape[:2])
        columns: dict[str, Any] = {"layer": layers.ravel(), "head": heads.ravel()}
        columns["group"] = columns["head"] // self.spec.queries_per_kv_head
        return pd.DataFrame(columns | {name: values.ravel() for name, values in self.statistics.items()})

    def __repr__(self) -> str:
        layers, heads = self.likeness.shape[:2]
        kept = f"{len(self.maps)} maps of {format_bytes(sum(each.nbytes for each in self.maps.values()))}"
        return f"AttentionView({self.spec.name}, {len(self.ids)} tokens, {layers} x {heads} heads, {kept})"

    def _repr_html_(self) -> str:
        rows = [
            (name.replace("_", " "), f"{layer}.{head}", f"{value:.3g}", f"{self.chance[name]:.3g}", STATISTICS[name])
            for name in self.statistics
            for layer, head, value in self.top(name, 1)
        ]
        header = ("statistic", "highest: layer.head", "value", "spread evenly", "what it is")
        return html_table(repr(self), header, rows)


def attention(
    falcon: Any,
    text: Text,
    layers: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    chunk: int | None = None,
) -> AttentionView:
    """What every head attends to in a text: statistics of all, maps of those that `layers` and `heads` name.

    falcon: what `fk.load` gives, or (model, tokenizer); text: a text, or token ids. layers, heads: one, several, or
    unset for all; both unset: no maps. max_bytes: what the maps may take; 4 T^2 bytes each. chunk: tokens that go
    through the model at once; unset, 256, or all at once where weights are offloaded and would be read anew each time.

    Raises MemoryError, before anything is computed, for maps beyond `max_bytes`; IndexError for a head or layer that is
    not there; ValueError for a text that is empty or over the context; TypeError for what is not a Falcon.
    """
    watched = subject(falcon)
    ids = watched.encode(text)
    wanted = _wanted(watched.spec, layers, heads)
    _check_budget(len(wanted), len(ids), max_bytes)
    _check_backend(watched)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: read at least one token at a time")
    reader = _Reader(watched, ids, wanted)
    size = chunk or (len(ids) if _offloaded(watched.model) else _CHUNK)
    with torch.inference_mode(), watching(watched, reader.hooks()):
        for start in range(0, len(ids), size):
            reader.read(start, min(start + size, len(ids)))
    return reader.view()


def induction(falcon: Any, period: int = 50, copies: int = 2, seed: int = 0, **options: Any) -> AttentionView:
    """Attention on random tokens said again in the same order, which is how induction heads are told (Olsson et al.
    2022, arXiv 2209.11895): look at `statistics["induction"]`, beside `chance["induction"]`.

    The tokens are all different, none of them special. `options` are those of `attention`.
    """
    return attention(falcon, repeated_tokens(falcon, period, copies, seed), **options)


def repeated_tokens(falcon: Any, period: int = 50, copies: int = 2, seed: int = 0) -> list[int]:
    """`period` different random token ids, none of them special, `copies` times. Raises ValueError for too many."""
    watched = subject(falcon)
    special = {*watched.tokenizer.all_special_ids, *watched.tokenizer.added_tokens_decoder}
    plain = [each for each in range(watched.spec.vocabulary) if each not in special]
    context = watched.decoder.config.max_position_embeddings
    if not (2 <= period <= len(plain) and 2 <= copies <= context // period):
        raise ValueError(
            f"{copies} copies of {period} tokens: give at least 2 of each, within the {len(plain)} plain tokens of the "
            f"vocabulary and the context of {context}"
        )
    return random.Random(seed).sample(plain, period) * copies


def check_statistic(name: str) -> str:
    """A name of `STATISTICS`. Raises ValueError, which lists them, for any other."""
    if name not in STATISTICS:
        raise ValueError(unknown_name("statistic", name, list(STATISTICS)))
    return name


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

    def view(self) -> AttentionView:
        """The means, when all has been read."""
        time, (copies, followed) = len(self.ids), _repeats(self.ids)
        counts = np.array([time - 1, time, np.count_nonzero(copies), np.count_nonzero(followed), time])
        seen = np.arange(1, time + 1)  # keys that each query may look at
        weights = [1 / seen[1:], 1 / seen, copies / seen, followed / seen, (seen - 1) / 2, np.log(seen), seen]
        sums = [*np.moveaxis(self.linear, -1, 0), self.entropy, self.effective]
        of_all = [*counts, time, time]
        mean = {name: _over(total, count) for name, total, count in zip(STATISTICS, sums, of_all, strict=True)}
        chance = {name: float(_over(each.sum(), n)) for name, each, n in zip(STATISTICS, weights, of_all, strict=True)}
        return AttentionView(
            spec=self.spec,
            ids=tuple(self.ids),
            words=self.watched.words(self.ids),
            statistics=mean,
            chance=chance,
            likeness=_over(self.roots, time),
            maps=self.maps,
        )


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


def _wanted(
    spec: FalconSpec, layers: int | Iterable[int] | None, heads: int | Iterable[int] | None
) -> list[tuple[int, int]]:
    """The pairs of layer and head whose maps are to be kept."""
    if layers is None and heads is None:
        return []
    return [
        (check_index(layer, spec.layers, "layer"), check_index(head, spec.query_heads, "head"))
        for layer in _several(layers, spec.layers)
        for head in _several(heads, spec.query_heads)
    ]


def _several(given: int | Iterable[int] | None, count: int) -> list[int]:
    if given is None:
        return list(range(count))
    return [given] if isinstance(given, int) else list(dict.fromkeys(given))


def _check_budget(maps: int, time: int, max_bytes: int) -> None:
    """Refuses maps that would not fit, and says which would."""
    if (needed := maps * 4 * time**2) <= max_bytes:
        return
    fitting, longest = max_bytes // (4 * time**2), isqrt(max_bytes // (4 * maps))
    fewer = f"name at most {fitting} heads by layers and heads" if fitting else "name no layers and heads"
    raise MemoryError(
        f"maps of {maps} heads over {time} tokens are {format_bytes(needed)} ({needed:,} bytes), max_bytes is "
        f"{format_bytes(max_bytes)}: {fewer}, give a text of at most {longest} tokens, or raise max_bytes; the "
        "statistics of all heads need no maps"
    )


def _check_backend(watched: Subject) -> None:
    """Refuses the one model that does not compute what its config says."""
    config = watched.decoder.config
    if config.alibi and config._attn_implementation == "eager" and not isinstance(watched.decoder, FalconModel):
        raise ValueError(
            "transformers' own Falcon adds ALiBi twice in eager attention: load it with attention='grouped', or call "
            "model.set_attn_implementation('sdpa') first"
        )


def _offloaded(model: Any) -> bool:
    """Whether weights wait in host memory or on a disk while a GPU computes."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    return bool(places & {"cpu", "disk"}) and len(places) > 1
