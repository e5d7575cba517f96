"""The static cache of a compiled model, kept from one call to the next."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import StaticCache

from falcon_kit.catalogue.spec import context_limit

_KEPT: WeakKeyDictionary[Any, StaticCache] = WeakKeyDictionary()
"""By model, the cache of its last call. It is taken out while a call uses it."""


@contextmanager
def kept_cache(model: Any, rows: int) -> Iterator[StaticCache]:
    """An empty static cache of the whole context: that of the last call, or a new one for another number of rows.

    A CUDA graph is recorded for the addresses of a cache (transformers' StaticLayer marks them as static), so a new
    cache for each call would record it again. A second call at the same time gets a cache of its own.
    """
    cache = _KEPT.pop(model, None)
    if cache is None or not _fits(cache, model, rows):
        cache = StaticCache(config=model.config, max_cache_len=_slots(model))
    cache.reset()
    try:
        yield cache
    finally:
        _KEPT[model] = cache


def _slots(model: Any) -> int:
    """One more than the context: torch compiles a step that reads all slots apart from those that read a part."""
    return context_limit(model.config) + 1


def _fits(cache: StaticCache, model: Any, rows: int) -> bool:
    layer: Any = cache.layers[0]
    if not layer.is_initialized or layer.max_cache_len != _slots(model):
        return False
    if layer.keys.is_inference() and not torch.is_inference_mode_enabled():
        return False  # torch writes to it in inference mode only
    return bool(layer.keys.shape[0] == rows and layer.keys.dtype == model.dtype and layer.keys.device == model.device)
