"""A KV cache with room for the next tokens, so that a decoding step writes one token and copies no others.

transformers' `DynamicCache` concatenates at each step, which reads and writes all keys and values once more. On an H200
that took 45% of a step's time on the GPU, with 12 layers of the 40B and 32 texts of 1,900 tokens.

Shapes: B batch, T time (new tokens), K time (all tokens), G KV heads, D head_dim.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from falcon_kit.generation.arguments import CACHE, rename_cache

ROOM = 64
"""Tokens that a full layer makes room for: the most that a cache keeps unused."""


class _Buffer:
    """Keys and values with room, and those of the layer that wrote last, since copies of a layer share a buffer."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        shape = [*keys.shape[:-2], keys.shape[-2] + ROOM, keys.shape[-1]]
        self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        self.written = self.write(keys, values, 0)

    def write(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Writes (B, G, T, D) from `start` on, and returns all until then: (B, G, K, D)."""
        end = start + keys.shape[-2]
        self.keys[..., start:end, :] = keys
        self.values[..., start:end, :] = values
        self.written = self.keys[..., :end, :], self.values[..., :end, :]
        return self.written


class GrowingLayer(DynamicLayer):
    """transformers' DynamicLayer, which writes the tokens of a decoding step in place."""

    keys: Any  # tensors once there are some
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self._buffer: _Buffer | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values (B, G, K, D), with the new ones (B, G, T, D) at the end."""
        if not self._in_place(key_states):
            self._buffer = None
            result: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return result
        if self._buffer is None or not self._has_room(self._buffer, key_states.shape[-2]):
            self._buffer = _Buffer(self.keys, self.values)
        self.keys, self.values = self._buffer.write(key_states, value_states, self.keys.shape[-2])
        return self.keys, self.values

    def _in_place(self, new: Tensor) -> bool:
        """Whether the new keys are a step of decoding. A prompt needs no room, and gradients need what was there."""
        if self.get_seq_length() == 0 or new.shape[-2] > ROOM:
            return False
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        alike = [(each.shape[:-2], each.shape[-1], each.dtype, each.device) for each in (self.keys, new)]
        return alike[0] == alike[1]  # else concatenation promotes the dtype, or raises

    def _has_room(self, buffer: _Buffer, new: int) -> bool:
        """Whether this layer wrote last and there is room for more.

        It did not if its keys were replaced, as beam search does, or cut, or if a copy of this layer wrote since.
        """
        mine = buffer.written[0] is self.keys and buffer.written[1] is self.values
        writable = torch.is_inference_mode_enabled() or not buffer.keys.is_inference()
        return mine and writable and self.keys.shape[-2] + new <= buffer.keys.shape[-2]

    def reset(self) -> None:
        """Drops keys, values and the room."""
        self._buffer = None
        super().reset()


def with_room(cache: Cache) -> Cache:
    """The same cache, in which the empty layers of transformers' DynamicLayer are `GrowingLayer`s."""
    cache.layers = [
        GrowingLayer() if type(each) is DynamicLayer and not each.is_initialized else each for each in cache.layers
    ]
    return cache


class MakesRoom(GenerationMixin):
    """A model whose dynamic caches, in `generate`, have room for the next tokens."""

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *rest: Any) -> Any:
        """As in transformers. A cache of the caller and an offloaded one stay as they are."""
        rename_cache(model_kwargs)
        given = model_kwargs.get(CACHE)
        stock: Any = super()  # transformers misdeclares its self
        stock._prepare_cache_for_generation(generation_config, model_kwargs, *rest)
        cache = model_kwargs.get(CACHE)
        if given is None and type(cache) is DynamicCache and not cache.offloading:
            with_room(cache)
