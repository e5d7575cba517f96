"""Attention statistics of every head of a Falcon on a text, and attention maps of some.

A KV group is the set of query heads that share one KV head.

Shapes: T time, H query heads, G KV heads (and KV groups), L layers.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from math import isqrt
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from falcon_kit.display.documented import documented
from falcon_kit.display.errors import check_known, check_whole, is_whole, plain_scalar, printable, require, shown
from falcon_kit.display.page import HasPage, Page
from falcon_kit.display.tables import counted, format_bytes, html_table
from falcon_kit.inspection.hooks import TextOrIds, TextResult, check_index, check_indices, inspect_model
from falcon_kit.inspection.plots import attention as plots
from falcon_kit.inspection.probabilities import STATISTICS, Array, Measurements, measure
from falcon_kit.inspection.views.attention import attention_page, most_maps

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MAX_BYTES = 256 * 2**20


@documented
@dataclass(frozen=True, repr=False)
class AttentionView(TextResult, Measurements, HasPage):
    """Attention of every head of a Falcon on one text: a table in Jupyter, `figure` for all heads, `page` for maps."""

    def map(self, layer: int, head: int) -> Array:
        """The attention probabilities (T, T) of a head. Raises KeyError if they were not kept."""
        layer = check_index(layer, self.spec.layers, "layer")
        head = check_index(head, self.spec.query_heads, "head")
        if (layer, head) not in self.maps:
            kept = ", ".join(f"{each[0]}.{each[1]}" for each in list(self.maps)[:8]) or "none"
            raise KeyError(
                f"the map of layer {layer}, head {head} was not kept (kept: {kept}): request it with the arguments "
                "layers and heads"
            )
        return self.maps[layer, head]

    def group_map(self, layer: int, group: int) -> Array:
        """The mean map (T, T) of the query heads in a KV group. Raises KeyError if one of them was not kept."""
        check_index(group, self.spec.kv_heads, "KV group")
        size = self.spec.queries_per_kv_head
        heads = range(group * size, (group + 1) * size)
        return np.mean([self.map(layer, head) for head in heads], axis=0, dtype=np.float32)

    @property
    def similarity_within_groups(self) -> Array:
        """(L, G): mean similarity of two different query heads in a KV group; nan for groups of one head."""
        groups, size = self.spec.kv_heads, self.spec.queries_per_kv_head
        square = self.head_similarity.reshape(-1, groups, size, groups, size)
        within = np.einsum("lgagb->lgab", square)
        pairs = size * (size - 1)
        total = within.sum((-1, -2)) - np.einsum("lgaa->lg", within)
        return total / pairs if pairs else np.full_like(total, np.nan)

    @property
    def similarity_across_groups(self) -> Array:
        """(L,): mean similarity of two query heads of different KV groups; nan for a single KV group."""
        group = np.arange(self.spec.query_heads) // self.spec.queries_per_kv_head
        across = group[:, None] != group[None]
        if not across.any():
            return np.full(len(self.head_similarity), np.nan, np.float32)
        return self.head_similarity[:, across].mean(-1)

    def top(self, statistic: str = "induction", count: int = 5) -> list[tuple[int, int, float]]:
        """The heads with the highest values: (layer, head, value), highest first."""
        check_whole("count", count, 0)
        values = self.statistics[check_statistic(statistic)]
        best = np.argsort(-values, axis=None)[:count]  # nan comes last
        return [(*divmod(int(at), values.shape[1]), float(values.flat[at])) for at in best]

    def figure(self, statistic: str = "induction") -> Figure:
        """A statistic of all heads: a panel for each layer, with a row for each KV group."""
        values, label = self.statistics[check_statistic(statistic)], STATISTICS[statistic]
        title = f"{self.spec.name}: {statistic.replace('_', ' ')}"
        return plots.heads(values, self.spec.kv_heads, title, label, self.chance[statistic])

    def map_figure(self, layer: int, head: int | None = None, *, group: int | None = None) -> Figure:
        """One attention map: of a head, or the mean of a KV group. Raises KeyError if it was not kept."""
        if (head is None) == (group is None):
            raise ValueError("give either a head or a group: map_figure(layer, head) or map_figure(layer, group=...)")
        found = self.map(layer, head) if head is not None else self.group_map(layer, cast(int, group))
        which = f"head {head}" if head is not None else f"KV group {group}, mean of its heads"
        return plots.one_map(found, self.token_texts, f"{self.spec.name}: layer {layer}, {which}")

    def similarity_figure(self) -> Figure:
        """Head similarity by layer, within KV groups and across them."""
        return plots.head_similarity(self.similarity_within_groups, self.similarity_across_groups)

    def page(self) -> Page:
        """The kept maps as thumbnails, one of them large, linked to the text; at most a megabyte."""
        if not self.maps:
            raise ValueError(
                "no maps were kept, and the page shows maps: request some with layers and heads, as in "
                "fk.attention(falcon, text, layers=0), which keeps those of layer 0"
            )
        return attention_page(f"Attention of {self.spec.name}", self.token_texts, self._maps_by_group())

    def _maps_by_group(self) -> dict[str, dict[str, tuple[str, Array]]]:
        """The kept maps by KV group, with the mean map of each group that is complete, if these fit into a page too."""
        size, rows = self.spec.queries_per_kv_head, defaultdict[str, dict[str, tuple[str, Array]]](dict)
        for (layer, head), found in self.maps.items():
            rows[f"layer {layer}, KV group {head // size}"][f"layer {layer}, head {head}"] = (f"head {head}", found)
        counts = Counter((layer, head // size) for layer, head in self.maps)
        complete = [group for group, count in counts.items() if count == size > 1]
        for layer, group in complete if len(self.maps) + len(complete) <= most_maps(len(self.ids)) else ():
            name = f"layer {layer}, KV group {group}"
            rows[name][f"{name}, mean of its heads"] = ("mean", self.group_map(layer, group))
        return dict(rows)

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each head: layer, head, KV group, and its statistics."""
        import pandas as pd

        layers, heads = np.indices(self.head_similarity.shape[:2])
        columns: dict[str, Any] = {"layer": layers.ravel(), "head": heads.ravel()}
        columns["group"] = columns["head"] // self.spec.queries_per_kv_head
        return pd.DataFrame(columns | {name: values.ravel() for name, values in self.statistics.items()})

    def __repr__(self) -> str:
        layers, heads = self.head_similarity.shape[:2]
        kept = f"{counted(len(self.maps), 'map')} of {format_bytes(sum(each.nbytes for each in self.maps.values()))}"
        tokens = counted(len(self.ids), "token")
        return f"AttentionView({printable(self.spec.name)}, {tokens}, {layers} x {heads} heads, {kept})"

    def _repr_html_(self) -> str:
        rows = [
            (name.replace("_", " "), f"{layer}.{head}", f"{value:.3g}", f"{self.chance[name]:.3g}", STATISTICS[name])
            for name in self.statistics
            for layer, head, value in self.top(name, 1)
        ]
        header = ("statistic", "highest: layer.head", "value", "uniform attention", "definition")
        return html_table(repr(self), header, rows)


def attention(
    falcon: Any,
    text: TextOrIds,
    layers: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    prefill_chunk_size: int | None = None,
) -> AttentionView:
    """Attention statistics of every head on a text, and the attention maps of the heads in `layers` and `heads`.

    falcon: what `fk.load` returns, or (model, tokenizer). text: a text, or token ids. layers, heads: one index or
    several; None for one of them takes all, None for both keeps no maps. max_bytes: the most memory for the maps, 4 T^2
    bytes each. prefill_chunk_size: tokens in one forward pass; None takes 256, or the whole text if weights are
    offloaded, because every pass loads them again.

    Raises MemoryError, before the model runs, if the maps need more than `max_bytes`; IndexError for a head or layer
    that does not exist; ValueError for a text that is empty or longer than the context; TypeError for anything but a
    Falcon.
    """
    inspected = inspect_model(falcon)
    ids, spec = inspected.encode(text), inspected.spec
    asked = layers is not None or heads is not None
    chosen = check_indices(layers, spec.layers, "layer"), check_indices(heads, spec.query_heads, "head")
    pairs = list(product(*chosen)) if asked else []
    check_whole("max_bytes", max_bytes, 0)
    _check_max_bytes(len(pairs), len(ids), max_bytes)
    require(
        prefill_chunk_size is None or is_whole(prefill_chunk_size, 1),
        f"prefill_chunk_size={shown(prefill_chunk_size)}: must be at least 1",
    )
    found = measure(inspected, ids, pairs, prefill_chunk_size)
    texts = inspected.token_texts(ids)
    return AttentionView(spec=spec, ids=tuple(ids), token_texts=texts, **vars(found))


def induction(falcon: Any, period: int = 50, copies: int = 2, seed: int = 0, **options: Any) -> AttentionView:
    """Attention on a repeated sequence of random tokens, which identifies induction heads (Olsson et al. 2022, arXiv
    2209.11895): compare `statistics["induction"]` with `chance["induction"]`.

    The sequence is that of `repeated_tokens`. `options` are arguments of `attention`. Raises what these two raise.
    """
    return attention(falcon, repeated_tokens(falcon, period, copies, seed), **options)


def repeated_tokens(falcon: Any, period: int = 50, copies: int = 2, seed: int = 0) -> list[int]:
    """`period` different random token ids without special tokens, repeated `copies` times. Raises ValueError if they do
    not fit into the vocabulary or the context."""
    inspected = inspect_model(falcon)
    period, copies = plain_scalar(period), plain_scalar(copies)
    special = {*inspected.tokenizer.all_special_ids, *inspected.tokenizer.added_tokens_decoder}
    plain = [each for each in range(inspected.spec.vocabulary) if each not in special]
    context = inspected.spec.context
    if not (is_whole(period, 2, len(plain)) and is_whole(copies, 2, context // period)):
        raise ValueError(
            f"{shown(copies)} copies of {shown(period)} tokens: give at least 2 of each, within the {len(plain)} plain "
            f"tokens of the vocabulary and the context of {context}"
        )
    seed = plain_scalar(seed)
    check_whole("seed", seed, 0)
    return random.Random(seed).sample(plain, period) * copies


def check_statistic(name: str) -> str:
    """A name in `STATISTICS`. Raises ValueError, which lists them, for any other."""
    check_known("statistic", name, list(STATISTICS))
    return name


def _check_max_bytes(maps: int, time: int, max_bytes: int) -> None:
    """Raises MemoryError, with the number of maps that fit, if `maps` need more than `max_bytes`."""
    if (needed := maps * 4 * time**2) <= max_bytes:
        return
    fitting, longest = max_bytes // (4 * time**2), isqrt(max_bytes // (4 * maps))
    fewer = f"request at most {fitting} heads with layers and heads" if fitting else "omit layers and heads"
    raise MemoryError(
        f"maps of {maps} heads over {time} tokens are {format_bytes(needed)} ({needed:,} bytes), max_bytes is "
        f"{format_bytes(max_bytes)}: {fewer}, give a text of at most {longest} tokens, or raise max_bytes; the "
        "statistics of all heads need no maps"
    )
