"""What the heads of a Falcon look at in a text: `attention`, and what it gives.

Shapes: T time, H query heads, G KV heads, L layers.
"""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import unknown_name
from falcon_kit.display.page import Page, visible
from falcon_kit.display.tables import format_bytes, html_table
from falcon_kit.inspection.plots import attention as plots
from falcon_kit.inspection.probabilities import STATISTICS, Array, measure
from falcon_kit.inspection.views.attention import attention_page
from falcon_kit.inspection.watch import Subject, Text, check_index, subject
from falcon_kit.model.modeling import FalconModel

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]  # it brings no types of its own
    from matplotlib.figure import Figure

MAX_BYTES = 256 * 2**20


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
            raise ValueError(
                "no maps were kept, and the view shows maps: name some by layers and heads, as in "
                "fk.attention(falcon, text, layers=0), which keeps those of layer 0"
            )
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
    found = measure(watched, ids, wanted, chunk)
    return AttentionView(watched.spec, tuple(ids), watched.words(ids), *found)


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
